//! What is going on right now, for status: live streams and the last handshakes.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ktls_offload::{ResetReason, Session, StreamHandle};

use super::pods::Pod;
use super::policy::Judged;
use crate::status;

/// Handshakes kept for the status page.
const HANDSHAKES_KEPT: usize = 64;

/// Which side of a tunnel this agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// We dialled for a pod of ours.
    Outbound,
    /// A peer dialled a pod of ours.
    Inbound,
}

impl Direction {
    /// Name in status, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Direction::Outbound => "outbound",
            Direction::Inbound => "inbound",
        }
    }
}

/// A live stream.
#[derive(Debug, Clone)]
pub struct Stream {
    pub id: [u8; 16],
    pub direction: Direction,
    /// The application's own address.
    pub source: SocketAddr,
    /// The workload's address and application port.
    pub destination: SocketAddr,
    /// The tunnel's: who the other side is, by which certificate.
    pub session: Arc<Session>,
    pub handle: Arc<StreamHandle>,
    pub since: Instant,
    /// Our pod: the source of an outbound stream, the destination of an inbound one.
    pub pod: Arc<Pod>,
    /// Inbound: what the kernel admitted it as.
    pub judged: Option<Judged>,
}

/// The live streams and the last handshakes.
#[derive(Debug, Default)]
pub struct Activity {
    next: AtomicU64,
    streams: Mutex<BTreeMap<u64, Stream>>,
    handshakes: Mutex<VecDeque<status::Handshake>>,
}

impl Activity {
    /// Lists a stream for as long as the returned entry lives.
    pub fn enter(self: &Arc<Self>, stream: Stream) -> Entry {
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.streams).insert(key, stream);
        Entry {
            activity: self.clone(),
            key,
        }
    }

    /// Ends the streams for which `reason` gives one, and says how many. The other side
    /// gets a RESET and both applications a reset.
    pub fn cut(&self, reason: impl Fn(&Stream) -> Option<ResetReason>) -> usize {
        let streams = lock(&self.streams);
        let doomed = streams.values().filter_map(|s| reason(s).map(|r| (s, r)));
        doomed
            .map(|(stream, reason)| stream.handle.cut(reason))
            .count()
    }

    /// Remembers a handshake.
    pub fn handshake(&self, handshake: status::Handshake) {
        let mut kept = lock(&self.handshakes);
        kept.truncate(HANDSHAKES_KEPT - 1);
        kept.push_front(handshake);
    }

    /// Id, source and admission of the live inbound streams of a pod, by its namespace's
    /// cookie.
    pub fn judged(&self, cookie: u64) -> Vec<([u8; 16], SocketAddr, Judged)> {
        let streams = lock(&self.streams);
        let own = streams.values().filter(|s| s.pod.netns.cookie() == cookie);
        own.filter_map(|s| Some((s.id, s.source, s.judged?)))
            .collect()
    }

    /// Live streams, oldest first.
    pub fn streams(&self) -> Vec<status::Stream> {
        lock(&self.streams).values().map(describe).collect()
    }

    /// Handshakes, newest first.
    pub fn handshakes(&self) -> Vec<status::Handshake> {
        lock(&self.handshakes).iter().cloned().collect()
    }
}

/// A listed stream; it is taken off the list on drop.
#[derive(Debug)]
pub struct Entry {
    activity: Arc<Activity>,
    key: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.activity.streams).remove(&self.key);
    }
}

fn describe(stream: &Stream) -> status::Stream {
    status::Stream {
        id: hex(&stream.id),
        direction: stream.direction.as_str().into(),
        source: stream.source,
        destination: stream.destination,
        peer: stream.session.peer().id().to_string(),
        tx: stream.handle.bytes_tx(),
        rx: stream.handle.bytes_rx(),
        age_seconds: stream.since.elapsed().as_secs(),
    }
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
            // Writing to a String cannot fail.
            let _ = write!(out, "{byte:02x}");
            out
        })
}

/// A panic elsewhere leaves these lists as they were: nothing in them is half-written.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
