//! The scheduling task.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::{self, error::RecvError};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;

use super::entry::{Due, Entry};
use super::{MAX_CONCURRENT_FETCHES, Shared, SvidEvent, schedule};
use crate::source::{FetchError, FetchProblem, Issued, SourceUpdate};
use crate::spiffe_id::TrustDomain;
use crate::svid::{SvidError, unix_seconds};
use crate::verifier::PeerRefusal;

/// Runs until it is aborted; its fetches end with it.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut updates = shared.source.updates();
    let mut trust = shared.trust.changes();
    let mut fetches = Fetches {
        shared,
        tasks: JoinSet::new(),
        whose: HashMap::new(),
        started: 0,
        roots_as_of: HashMap::new(),
    };
    loop {
        let next = fetches.start_due();
        let wake = Arc::clone(&fetches.shared);
        tokio::select! {
            Some(ended) = fetches.tasks.join_next_with_id() => fetches.finish(ended),
            update = next_update(&mut updates) => fetches.nudge(&update),
            _ = trust.changed() => fetches.judge_own(),
            () = wake.wake.notified() => {}
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

/// What the source has that is new. Pending for ever when it never tells.
async fn next_update(updates: &mut Option<broadcast::Receiver<SourceUpdate>>) -> SourceUpdate {
    if let Some(receiver) = updates {
        match receiver.recv().await {
            Ok(update) => return update,
            // Which ones were missed is not known.
            Err(RecvError::Lagged(_)) => return SourceUpdate::All,
            Err(RecvError::Closed) => *updates = None,
        }
    }
    std::future::pending().await
}

type FetchResult = Result<Issued, FetchError>;

struct Fetches {
    shared: Arc<Shared>,
    tasks: JoinSet<FetchResult>,
    whose: HashMap<Id, (u64, Arc<Entry>)>,
    /// Fetches started so far.
    started: u64,
    /// For each trust domain the newest fetch whose roots are in use: an answer
    /// that was overtaken must not bring old roots back.
    roots_as_of: HashMap<TrustDomain, u64>,
}

impl Fetches {
    /// Starts what is due, as far as there is room, and says when to look again.
    fn start_due(&mut self) -> Instant {
        let (now, wall) = (Instant::now(), self.shared.config.clock.now());
        // Also bounds how late a jump of the wall clock is noticed.
        let mut next = now + LONGEST_SLEEP;
        let mut ready = Vec::new();
        for entry in self.shared.entries.load().values() {
            match entry.due() {
                Some(due) if due.at <= now || due.wall <= wall => {
                    ready.push((entry.urgency(wall), due.at, Arc::clone(entry)));
                }
                Some(due) => next = next.min(due.at),
                None => {}
            }
        }
        ready.sort_by_key(|(urgency, at, _)| (*urgency, *at));
        let room = MAX_CONCURRENT_FETCHES.saturating_sub(self.tasks.len());
        for (_, _, entry) in ready.into_iter().take(room) {
            self.start(entry);
        }
        next
    }

    fn nudge(&self, update: &SourceUpdate) {
        let now = self.in_(Duration::ZERO);
        match update {
            SourceUpdate::Svid(identity) => {
                if let Some(entry) = self.shared.entry(identity) {
                    entry.nudge(now);
                }
            }
            SourceUpdate::All => {
                let entries = self.shared.entries.load();
                entries.values().for_each(|entry| entry.nudge(now));
            }
        }
    }

    /// After a change of revocation lists or roots: what they take back is not
    /// presented any more, and is replaced as soon as the source can.
    fn judge_own(&self) {
        let wall = self.shared.config.clock.now();
        for entry in self.shared.entries.load().values() {
            let Some(svid) = entry.held() else {
                continue;
            };
            let verdict = self.shared.trust.own_revoked(&svid, wall);
            if !entry.set_revoked(verdict.is_err()) {
                continue;
            }
            if verdict.is_ok() {
                tracing::info!(identity = %entry.identity, serial = svid.serial(), "SVID no longer revoked");
                continue;
            }
            tracing::error!(
                identity = %entry.identity,
                serial = svid.serial(),
                issuer = svid.issuer(),
                "our own SVID is revoked: no handshake is made with it, another one is asked for"
            );
            entry.nudge(self.in_(Duration::ZERO));
            self.shared.tell(SvidEvent::Revoked {
                identity: entry.identity.clone(),
                svid,
            });
        }
    }

    fn start(&mut self, entry: Arc<Entry>) {
        entry.begin();
        let shared = Arc::clone(&self.shared);
        let identity = entry.identity.clone();
        let fetch = self.tasks.spawn(async move {
            let limit = shared.config.fetch_timeout;
            let fetch = shared.source.fetch(&identity, shared.config.ttl);
            tokio::time::timeout(limit, fetch)
                .await
                .unwrap_or_else(|_| {
                    Err(FetchProblem::TimedOut(limit).of(&identity, shared.source.name()))
                })
        });
        self.started = self.started.saturating_add(1);
        self.whose.insert(fetch.id(), (self.started, entry));
    }

    fn finish(&mut self, ended: Result<(Id, FetchResult), JoinError>) {
        let (id, result) = match ended {
            Ok((id, result)) => (id, Some(result)),
            Err(error) => (error.id(), None),
        };
        let Some((sequence, entry)) = self.whose.remove(&id) else {
            return;
        };
        match self.shared.entry(&entry.identity) {
            Some(current) if Arc::ptr_eq(&current, &entry) => {}
            // Wanted anew meanwhile: another fetch is for that.
            Some(_) => return,
            None => return self.shared.source.forget(&entry.identity),
        }
        let accepted = match result {
            Some(Ok(issued)) => self.accept(sequence, &entry, issued),
            Some(Err(error)) => Err(error),
            None => Err(self.problem(
                &entry,
                FetchProblem::Internal("the source panicked".to_owned()),
            )),
        };
        if let Err(error) = accepted {
            self.reject(&entry, error);
        }
    }

    /// Puts an answer to use. The source has checked it, but the manager
    /// answers for what it presents, whatever the source.
    fn accept(&mut self, sequence: u64, entry: &Entry, issued: Issued) -> Result<(), FetchError> {
        let Issued { svid, roots } = issued;
        let wall = self.shared.config.clock.now();
        if svid.id() != entry.identity.spiffe_id() {
            let error = SvidError::OtherIdentity(svid.id().clone());
            return Err(self.problem(entry, error.into()));
        }
        if svid.expired_at(wall) {
            let error = SvidError::Expired {
                not_after: svid.not_after(),
                now: unix_seconds(wall),
            };
            return Err(self.problem(entry, error.into()));
        }
        // Roots first: a peer that already has an SVID of a new root must be
        // trusted by the time we show ours.
        let domain = entry.identity.trust_domain();
        let newest = self.roots_as_of.get(domain).copied().unwrap_or(0);
        let roots_changed = if sequence > newest && !self.shared.source.keeps_bundles() {
            let changed = self
                .shared
                .trust
                .bundles()
                .replace(self.shared.source.name(), domain, &roots)
                .map_err(|error| self.problem(entry, error.into()))?;
            self.roots_as_of.insert(domain.clone(), sequence);
            changed
        } else {
            false
        };
        // Judged with the roots that came with it.
        if let Err(PeerRefusal::Revoked { serial, issuer }) =
            self.shared.trust.own_revoked(&svid, wall)
        {
            return Err(self.problem(entry, FetchProblem::Revoked { serial, issuer }));
        }
        let remaining = svid.not_after().saturating_sub(unix_seconds(wall));
        let remaining = Duration::from_secs(u64::try_from(remaining).unwrap_or(0));
        let after = schedule::refresh_after(remaining, &mut rand::rng());
        let (due, now) = (self.in_(after), self.in_(Duration::ZERO));
        let before = entry.succeeded(Arc::clone(&svid), due, now);
        if before.as_ref().map(|old| old.chain()) == Some(svid.chain()) {
            tracing::debug!(identity = %entry.identity, "the source still gives the same SVID");
            return Ok(());
        }
        tracing::info!(
            identity = %entry.identity,
            serial = svid.serial(),
            not_after = svid.not_after(),
            refresh_in_s = after.as_secs(),
            roots_changed,
            "SVID issued"
        );
        self.shared.tell(SvidEvent::Renewed {
            identity: entry.identity.clone(),
            replaced: before.map(|old| old.serial().to_owned()),
            svid,
        });
        Ok(())
    }

    fn reject(&self, entry: &Entry, error: FetchError) {
        let (message, label) = (error.to_string(), error.problem.as_str());
        let failures = entry.failed(error, self.in_(Duration::ZERO), |failures| {
            self.in_(schedule::retry_after(failures, &mut rand::rng()))
        });
        let usable = entry.urgency(self.shared.config.clock.now()).0;
        tracing::warn!(
            identity = %entry.identity,
            reason = label,
            failures,
            old_svid_still_valid = usable,
            "{message}"
        );
    }

    fn in_(&self, after: Duration) -> Due {
        let wall = self.shared.config.clock.now();
        Due {
            at: Instant::now() + after,
            wall: wall.checked_add(after).unwrap_or(wall),
        }
    }

    fn problem(&self, entry: &Entry, problem: FetchProblem) -> FetchError {
        problem.of(&entry.identity, self.shared.source.name())
    }
}

const LONGEST_SLEEP: Duration = Duration::from_secs(30);
