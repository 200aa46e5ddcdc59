//! What the agent holds of a live stream: its byte counts and the means to cut it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use crate::protocol::ResetReason;

/// Shared with a running [`relay`](crate::relay): progress to read, and a switch.
///
/// One handle belongs to one stream.
#[derive(Debug, Default)]
pub struct StreamHandle {
    pub(crate) counters: Counters,
    cut: Mutex<Option<ResetReason>>,
    notify: Notify,
}

impl StreamHandle {
    pub fn new() -> Self {
        Self::default()
    }

    /// Application bytes handed to the tunnel so far.
    pub fn bytes_tx(&self) -> u64 {
        self.counters.tx.load(Ordering::Relaxed)
    }

    /// Bytes from the tunnel handed to the application's socket so far.
    pub fn bytes_rx(&self) -> u64 {
        self.counters.rx.load(Ordering::Relaxed)
    }

    /// Ends the stream: `RESET{reason}` to the peer, RST to the application. The first
    /// reason stays. Takes effect even if the relay has not started yet.
    pub fn cut(&self, reason: ResetReason) {
        self.lock().get_or_insert(reason);
        self.notify.notify_one();
    }

    /// Waits until somebody calls [`StreamHandle::cut`].
    pub(crate) async fn cut_requested(&self) -> ResetReason {
        loop {
            if let Some(reason) = *self.lock() {
                return reason;
            }
            // `notify_one` leaves a permit when nobody waits: no call is missed.
            self.notify.notified().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<ResetReason>> {
        self.cut
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Byte counts of both directions.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    tx: AtomicU64,
    rx: AtomicU64,
}

impl Counters {
    pub(crate) fn add_tx(&self, n: usize) {
        self.tx.fetch_add(n as u64, Ordering::Relaxed);
    }

    pub(crate) fn add_rx(&self, n: usize) {
        self.rx.fetch_add(n as u64, Ordering::Relaxed);
    }
}
