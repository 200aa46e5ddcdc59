//! One wanted identity.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{NoSvid, SvidState, SvidStatus};
use crate::source::FetchError;
use crate::spiffe_id::WorkloadIdentity;
use crate::svid::{Svid, unix_seconds};

pub(super) struct Entry {
    pub(super) identity: WorkloadIdentity,
    held: ArcSwapOption<Held>,
    last_error: ArcSwapOption<FetchError>,
    /// Someone waits for it, or a connection was refused for want of it.
    demanded: AtomicBool,
    progress: Mutex<Progress>,
    changed: watch::Sender<()>,
}

/// An SVID and whether a list has taken it back since.
struct Held {
    svid: Arc<Svid>,
    revoked: AtomicBool,
}

impl Held {
    fn revoked(&self) -> bool {
        self.revoked.load(Ordering::Relaxed)
    }

    /// Whether it may be presented.
    fn usable(&self, now: SystemTime) -> bool {
        !self.revoked() && !self.svid.expired_at(now)
    }
}

struct Progress {
    in_flight: bool,
    /// The source changed while it was being asked: ask again.
    again: bool,
    failures: u32,
    due: Due,
}

/// The earlier of two clocks: the monotonic one makes progress when the wall
/// clock is set back, the wall clock when the machine was suspended.
#[derive(Clone, Copy)]
pub(super) struct Due {
    pub(super) at: Instant,
    pub(super) wall: SystemTime,
}

impl Entry {
    pub(super) fn new(identity: WorkloadIdentity, due: Due) -> Self {
        Self {
            identity,
            held: ArcSwapOption::empty(),
            last_error: ArcSwapOption::empty(),
            demanded: AtomicBool::new(false),
            progress: Mutex::new(Progress {
                in_flight: false,
                again: false,
                failures: 0,
                due,
            }),
            changed: watch::Sender::new(()),
        }
    }

    /// The SVID, if it is valid at `now`. Takes no lock.
    pub(super) fn current(&self, now: SystemTime) -> Result<Arc<Svid>, NoSvid> {
        let refusal = match &*self.held.load() {
            Some(held) if held.usable(now) => return Ok(Arc::clone(&held.svid)),
            Some(held) if held.revoked() => NoSvid::Revoked {
                serial: held.svid.serial().to_owned(),
            },
            Some(held) => NoSvid::Expired {
                not_after: held.svid.not_after(),
            },
            None => match self.last_error.load_full() {
                Some(error) => NoSvid::FetchFailed(error),
                None => NoSvid::Pending,
            },
        };
        self.demand();
        Err(refusal)
    }

    pub(super) fn demand(&self) {
        self.demanded.store(true, Ordering::Relaxed);
    }

    /// Told of each success, failure and of the entry's end.
    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(super) fn announce(&self) {
        self.changed.send_replace(());
    }

    /// When the next fetch is due; `None` while one is under way.
    pub(super) fn due(&self) -> Option<Due> {
        let progress = self.progress();
        (!progress.in_flight).then_some(progress.due)
    }

    /// Smaller goes first: without a valid SVID before refreshes, demanded
    /// before prefetched.
    pub(super) fn urgency(&self, now: SystemTime) -> (bool, bool) {
        let held = self.held.load();
        let valid = held.as_ref().is_some_and(|held| held.usable(now));
        (valid, !self.demanded.load(Ordering::Relaxed))
    }

    pub(super) fn begin(&self) {
        self.progress().in_flight = true;
    }

    /// The source has something new: due at once, or again after the fetch
    /// under way, which may have come too early for it.
    pub(super) fn nudge(&self, now: Due) {
        let mut progress = self.progress();
        if progress.in_flight {
            progress.again = true;
        } else {
            progress.due = now;
        }
    }

    /// The SVID that is held, whether or not it may be presented.
    pub(super) fn held(&self) -> Option<Arc<Svid>> {
        self.held.load().as_ref().map(|held| Arc::clone(&held.svid))
    }

    /// Notes whether a list takes the SVID back that is held. Answers whether
    /// that is news.
    pub(super) fn set_revoked(&self, revoked: bool) -> bool {
        let held = self.held.load();
        let news = held
            .as_ref()
            .is_some_and(|held| held.revoked.swap(revoked, Ordering::Relaxed) != revoked);
        if news {
            self.announce();
        }
        news
    }

    /// Answers the SVID that was held before.
    pub(super) fn succeeded(&self, svid: Arc<Svid>, due: Due, now: Due) -> Option<Arc<Svid>> {
        let before = self.held.swap(Some(Arc::new(Held {
            svid,
            revoked: AtomicBool::new(false),
        })));
        self.last_error.store(None);
        self.demanded.store(false, Ordering::Relaxed);
        {
            let mut progress = self.progress();
            *progress = Progress {
                in_flight: false,
                again: false,
                failures: 0,
                due: if progress.again { now } else { due },
            };
        }
        self.announce();
        before.map(|held| Arc::clone(&held.svid))
    }

    /// `due` is told how many failures in a row there are now.
    pub(super) fn failed(&self, error: FetchError, now: Due, due: impl FnOnce(u32) -> Due) -> u32 {
        self.last_error.store(Some(Arc::new(error)));
        let failures = {
            let mut progress = self.progress();
            progress.in_flight = false;
            progress.failures = progress.failures.saturating_add(1);
            progress.due = if std::mem::take(&mut progress.again) {
                now
            } else {
                due(progress.failures)
            };
            progress.failures
        };
        self.announce();
        failures
    }

    pub(super) fn status(&self, now: SystemTime, wanted: usize) -> SvidStatus {
        let held = self.held.load();
        let last_error = self.last_error.load_full();
        let state = match &*held {
            None if last_error.is_none() => SvidState::Pending,
            None => SvidState::Failing,
            Some(held) if held.revoked() => SvidState::Revoked,
            Some(held) if held.svid.expired_at(now) => SvidState::Expired,
            Some(_) if last_error.is_none() => SvidState::Ready,
            Some(_) => SvidState::RefreshFailing,
        };
        let svid = held.as_ref().map(|held| &held.svid);
        SvidStatus {
            identity: self.identity.clone(),
            wanted,
            state,
            serial: svid.map(|svid| svid.serial().to_owned()),
            issuer: svid.map(|svid| svid.issuer().to_owned()),
            not_before: svid.map(|svid| svid.not_before()),
            not_after: svid.map(|svid| svid.not_after()),
            expires_in: svid.map(|svid| svid.not_after().saturating_sub(unix_seconds(now))),
            last_error: last_error.map(|error| error.to_string()),
            next_fetch: self.due().map(|due| due.wall),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
