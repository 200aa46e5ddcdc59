//! Waiting for policies that a workload names and that have not arrived. Workloads and
//! policies are two subscriptions: a name may come before the policy that has it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// Whether new connections of one pod wait, and until when.
#[derive(Debug, Default)]
pub struct Hold {
    /// Missing policies, and since when the pod has needed them.
    missing: Mutex<BTreeMap<String, Instant>>,
    until: watch::Sender<Option<Instant>>,
}

impl Hold {
    /// Notes which policies are missing at `now`, and says until when they are waited
    /// for; `None`: nothing is missing, or something has been for longer than `patience`.
    pub fn note(&self, missing: &[String], patience: Duration, now: Instant) -> Option<Instant> {
        let mut since = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        since.retain(|name, _| missing.contains(name));
        for name in missing {
            since.entry(name.clone()).or_insert(now);
        }
        // The first one that is given up closes the pod, whatever else may come.
        let first = since.values().min()?;
        let until = *first + patience;
        (until > now).then_some(until)
    }

    /// What was decided by [`Hold::note`] holds from here on.
    pub fn set(&self, until: Option<Instant>) {
        self.until.send_replace(until);
    }

    /// Until when connections wait, if they do.
    pub fn until(&self) -> Option<Instant> {
        *self.until.borrow()
    }

    /// Completes when nothing is to be waited for any more: what is in force then decides.
    pub async fn over(&self) {
        let mut changes = self.until.subscribe();
        loop {
            let Some(until) = *changes.borrow_and_update() else {
                return;
            };
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn policy_that_arrives_in_time_ends_the_wait() {
        let (hold, begin) = (Hold::default(), Instant::now());
        hold.set(hold.note(&names(&["a/late"]), PATIENCE, begin));
        assert_eq!(hold.until(), Some(begin + PATIENCE));
        let arrive = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            hold.set(hold.note(&[], PATIENCE, Instant::now()));
        };
        tokio::join!(hold.over(), arrive);
        assert_eq!(begin.elapsed(), Duration::from_secs(2));
        assert_eq!(hold.until(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn policy_that_never_comes_is_waited_for_once_and_not_longer() {
        let (hold, begin) = (Hold::default(), Instant::now());
        let missing = names(&["a/never"]);
        hold.set(hold.note(&missing, PATIENCE, begin));
        hold.over().await;
        assert_eq!(begin.elapsed(), PATIENCE);
        // Another look does not begin anew.
        assert_eq!(hold.note(&missing, PATIENCE, Instant::now()), None);
        // Nor does a policy that is missing since only now: the pod is closed anyway.
        let more = names(&["a/never", "b/new"]);
        assert_eq!(hold.note(&more, PATIENCE, Instant::now()), None);
        // It came and went: that is a new wait.
        assert_eq!(hold.note(&[], PATIENCE, Instant::now()), None);
        let again = hold.note(&missing, PATIENCE, Instant::now());
        assert_eq!(again, Some(Instant::now() + PATIENCE));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_missing_is_no_wait() {
        let (hold, begin) = (Hold::default(), Instant::now());
        hold.set(hold.note(&[], PATIENCE, begin));
        hold.over().await;
        assert_eq!(begin.elapsed(), Duration::ZERO);
        assert_eq!(hold.note(&names(&["a/b"]), Duration::ZERO, begin), None);
    }

    #[test]
    fn static_strict_needs_no_arrival() {
        let store = ringfence_policies::PolicyStore::new("root");
        let policies = store.applicable("a", ["root/istio_converted_static_strict"]);
        let hold = Hold::default();
        assert_eq!(hold.note(&policies.missing, PATIENCE, Instant::now()), None);
        let policies = store.applicable("a", ["root/another"]);
        let until = hold.note(&policies.missing, PATIENCE, Instant::now());
        assert!(until.is_some(), "the reject twin");
    }
}
