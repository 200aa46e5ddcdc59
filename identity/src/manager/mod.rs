//! Keeps an SVID for each identity that this node needs.
//!
//! Threading: one task schedules; fetches are its children. A handshake reads
//! the current SVID without a lock ([`SvidManager::current`]).

mod entry;
mod schedule;
mod task;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::entry::{Due, Entry};
use crate::source::{FetchError, SvidSource};
use crate::spiffe_id::WorkloadIdentity;
use crate::svid::Svid;
use crate::trust::TrustStore;

/// Fetches, refreshes and forgets SVIDs.
///
/// An identity has an SVID while someone [wants](Self::want) it. A valid SVID
/// keeps serving while its refresh fails; an expired one never does, and one
/// that a revocation list takes back no longer does: another is fetched at once.
/// Each issuance replaces the source's roots in the
/// [`TrustBundles`](crate::TrustBundles), unless the source does that itself. A
/// source that announces updates is asked again at once.
///
/// Dropping the manager ends its task and the fetches under way; SVIDs that
/// were handed out stay usable.
pub struct SvidManager {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl SvidManager {
    /// Starts the manager's task on the current tokio runtime; like
    /// `tokio::spawn` this panics outside of one. `trust` is a [`TrustStore`], or
    /// an `Arc<TrustBundles>` where there are no revocation lists.
    pub fn start(
        source: Arc<dyn SvidSource>,
        trust: impl Into<TrustStore>,
        config: ManagerConfig,
    ) -> Self {
        let shared = Arc::new(Shared {
            source,
            trust: trust.into(),
            config,
            entries: ArcSwap::default(),
            wants: Mutex::default(),
            wake: Notify::new(),
            events: broadcast::Sender::new(EVENT_BACKLOG),
        });
        let task = tokio::spawn(task::run(Arc::clone(&shared)));
        Self { shared, task }
    }

    /// One more reason to have an SVID for `identity`; each call is to be
    /// matched by one [`release`](Self::release).
    pub fn want(&self, identity: &WorkloadIdentity) {
        let mut wants = self.shared.wants();
        if let Some(count) = wants.get_mut(identity) {
            *count = count.saturating_add(1);
            return;
        }
        let now = Due {
            at: Instant::now(),
            wall: self.shared.config.clock.now(),
        };
        let entry = Arc::new(Entry::new(identity.clone(), now));
        wants.insert(identity.clone(), 1);
        let mut entries = HashMap::clone(&self.shared.entries.load());
        entries.insert(identity.clone(), entry);
        self.shared.entries.store(Arc::new(entries));
        drop(wants);
        self.shared.wake.notify_one();
    }

    /// One reason less. With the last one the SVID is dropped. Answers whether
    /// the identity was wanted at all.
    pub fn release(&self, identity: &WorkloadIdentity) -> bool {
        let mut wants = self.shared.wants();
        let Some(count) = wants.get_mut(identity) else {
            return false;
        };
        *count = count.saturating_sub(1);
        if *count == 0 {
            wants.remove(identity);
            let mut entries = HashMap::clone(&self.shared.entries.load());
            let removed = entries.remove(identity);
            self.shared.entries.store(Arc::new(entries));
            if let Some(entry) = removed {
                entry.announce();
            }
            drop(wants);
            self.shared.source.forget(identity);
            self.shared.tell(SvidEvent::Dropped {
                identity: identity.clone(),
            });
        }
        true
    }

    /// The SVID to present now. Takes no lock and never waits.
    pub fn current(&self, identity: &WorkloadIdentity) -> Result<Arc<Svid>, NoSvid> {
        self.shared
            .entry(identity)
            .ok_or(NoSvid::NotWanted)?
            .current(self.shared.config.clock.now())
    }

    /// Waits until there is a valid SVID, at most for `timeout`; then says why
    /// there is none. Whoever waits goes before those who do not.
    pub async fn ready(
        &self,
        identity: &WorkloadIdentity,
        timeout: Duration,
    ) -> Result<Arc<Svid>, NoSvid> {
        let entry = self.shared.entry(identity).ok_or(NoSvid::NotWanted)?;
        let mut changed = entry.subscribe();
        let wait = async {
            loop {
                match self.current(identity) {
                    Err(NoSvid::NotWanted) => return,
                    Ok(_) => return,
                    Err(_) => self.shared.wake.notify_one(),
                }
                if changed.changed().await.is_err() {
                    return;
                }
            }
        };
        // On a timeout the last failure says more than "timed out" would.
        let _ = tokio::time::timeout(timeout, wait).await;
        self.current(identity)
    }

    /// Tells of each SVID that is put to use, and of each that is dropped, from
    /// now on. A receiver that falls behind by more than 1024 events learns that
    /// it has (`RecvError::Lagged`) and should look at all with
    /// [`current`](Self::current).
    pub fn subscribe(&self) -> broadcast::Receiver<SvidEvent> {
        self.shared.events.subscribe()
    }

    /// All wanted identities in order, for status pages.
    pub fn snapshot(&self) -> Vec<SvidStatus> {
        let now = self.shared.config.clock.now();
        let wants = self.shared.wants();
        let mut all: Vec<SvidStatus> = self
            .shared
            .entries
            .load()
            .values()
            .map(|entry| {
                let wanted = wants.get(&entry.identity).copied().unwrap_or(0);
                entry.status(now, wanted)
            })
            .collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }
}

impl Drop for SvidManager {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::fmt::Debug for SvidManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SvidManager")
            .field("source", &self.shared.source.name())
            .field("wanted", &self.shared.entries.load().len())
            .finish_non_exhaustive()
    }
}

/// How the manager works.
#[derive(Clone, Debug)]
pub struct ManagerConfig {
    /// The lifetime to ask for. A CA may give less.
    pub ttl: Duration,
    /// After which a fetch is given up, whatever the source does.
    pub fetch_timeout: Duration,
    /// The wall clock by which SVIDs expire.
    pub clock: Clock,
}

impl Default for ManagerConfig {
    /// 24 hours, 30 seconds, the system's clock.
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(24 * 3600),
            fetch_timeout: Duration::from_secs(30),
            clock: Clock::system(),
        }
    }
}

/// A wall clock.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// The system's.
    pub fn system() -> Self {
        Self::from_fn(SystemTime::now)
    }

    /// Any other.
    pub fn from_fn(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// What it shows.
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

/// Why there is no SVID to present: traffic of the workload is refused.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoSvid {
    /// Ours: nobody asked for this identity.
    #[error("the identity belongs to no workload enrolled on this node")]
    NotWanted,
    /// The first fetch has not ended yet.
    #[error("the SVID has not been issued yet")]
    Pending,
    /// There never was one.
    #[error(transparent)]
    FetchFailed(Arc<FetchError>),
    /// There was one; refreshing it fails.
    #[error("the SVID expired at {not_after} (Unix seconds) and could not be refreshed")]
    Expired {
        /// Unix seconds.
        not_after: i64,
    },
    /// A revocation list takes it back; there is no other yet.
    #[error("the SVID's certificate (serial {serial}) or its issuer's is revoked")]
    Revoked {
        /// Lower-case hex.
        serial: String,
    },
}

impl NoSvid {
    /// A short fixed name: a metric label.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NotWanted => "not-wanted",
            Self::Pending => "pending",
            Self::FetchFailed(_) => "fetch-failed",
            Self::Expired { .. } => "expired",
            Self::Revoked { .. } => "revoked",
        }
    }
}

/// What [`SvidManager::subscribe`] tells of.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SvidEvent {
    /// From now on [`SvidManager::current`] gives this SVID: idle tunnels under
    /// the one before can be retired.
    Renewed {
        /// Whose SVID.
        identity: WorkloadIdentity,
        /// The new one.
        svid: Arc<Svid>,
        /// The serial number of the one before, if there was any.
        replaced: Option<String>,
    },
    /// A revocation list takes the SVID in use back: from now on there is none,
    /// until the next [`Renewed`](Self::Renewed). What was handshaken under it is
    /// to be retired.
    Revoked {
        /// Whose SVID.
        identity: WorkloadIdentity,
        /// The one that is no good any more.
        svid: Arc<Svid>,
    },
    /// Nobody wants the identity any more.
    Dropped {
        /// Whose SVID it was.
        identity: WorkloadIdentity,
    },
}

/// One line of a status page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SvidStatus {
    /// Whose SVID.
    pub identity: WorkloadIdentity,
    /// How many reasons there are to have it.
    pub wanted: usize,
    /// How it stands.
    pub state: SvidState,
    /// Lower-case hex.
    pub serial: Option<String>,
    /// A distinguished name.
    pub issuer: Option<String>,
    /// Unix seconds.
    pub not_before: Option<i64>,
    /// Unix seconds.
    pub not_after: Option<i64>,
    /// Seconds from now to `not_after`: the countdown while refreshing fails.
    /// Negative once expired.
    pub expires_in: Option<i64>,
    /// Of the last fetch, if it failed.
    pub last_error: Option<String>,
    /// When the source is asked (again); `None` while it is being asked.
    pub next_fetch: Option<SystemTime>,
}

/// How an SVID stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SvidState {
    /// Never fetched yet.
    Pending,
    /// Never fetched, and the last try failed.
    Failing,
    /// Valid.
    Ready,
    /// Valid, but the last refresh failed.
    RefreshFailing,
    /// No longer valid: refused.
    Expired,
    /// Taken back by a revocation list: refused.
    Revoked,
}

impl SvidState {
    /// A short fixed name: a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Failing => "failing",
            Self::Ready => "ready",
            Self::RefreshFailing => "refresh-failing",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

/// Fetches under way at any moment.
pub const MAX_CONCURRENT_FETCHES: usize = 8;

type Entries = HashMap<WorkloadIdentity, Arc<Entry>>;

struct Shared {
    source: Arc<dyn SvidSource>,
    trust: TrustStore,
    config: ManagerConfig,
    /// Changed only with `wants` locked; read by anyone.
    entries: ArcSwap<Entries>,
    wants: Mutex<HashMap<WorkloadIdentity, usize>>,
    wake: Notify,
    events: broadcast::Sender<SvidEvent>,
}

const EVENT_BACKLOG: usize = 1024;

impl Shared {
    fn tell(&self, event: SvidEvent) {
        // Nobody needs to listen.
        let _ = self.events.send(event);
    }

    fn entry(&self, identity: &WorkloadIdentity) -> Option<Arc<Entry>> {
        self.entries.load().get(identity).cloned()
    }

    fn wants(&self) -> MutexGuard<'_, HashMap<WorkloadIdentity, usize>> {
        self.wants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
