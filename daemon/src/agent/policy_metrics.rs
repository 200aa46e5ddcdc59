//! Metrics of policy: verdicts by policy and rule, the kernel's tables, and how long a
//! change takes.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::metrics::registered;
use crate::authz::report::{Decision, Usage};

/// Series of verdicts at most; what comes later counts under `(other)`.
const MOST_SERIES: usize = 2000;
const OTHER: &str = "(other)";

/// One series of verdicts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct VerdictLabels {
    /// Of this node: `namespace/name`.
    workload: String,
    /// Empty when no policy decided.
    policy: String,
    rule: String,
    /// `allow` or `deny`.
    action: String,
    reason: String,
}

/// See the help texts.
#[derive(Debug)]
pub struct PolicyMetrics {
    verdicts: Family<VerdictLabels, Counter>,
    dry_run: Family<VerdictLabels, Counter>,
    series: Mutex<HashSet<VerdictLabels>>,
    pub audit_lost: Counter,
    pub audit_errors: Counter,
    entries: Family<[(&'static str, String); 1], Gauge>,
    limits: Family<[(&'static str, String); 1], Gauge>,
    kernel: Family<[(&'static str, &'static str); 1], Counter>,
    pub compile_seconds: Histogram,
    enforcement_seconds: Histogram,
    /// When the first change came that is not in force yet.
    pushed: Mutex<Option<Instant>>,
}

impl PolicyMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let time = |first, factor, count| Histogram::new(exponential_buckets(first, factor, count));
        PolicyMetrics {
            verdicts: registered(
                registry,
                "verdicts",
                "Connections that the kernel judged, by workload, policy, rule, action and \
                 reason; without those of ringfence_kernel_total{event=\"events_lost\"}",
                Family::default(),
            ),
            dry_run: registered(
                registry,
                "dry_run_verdicts",
                "What the same connections would have got with the workload's dry-run policies",
                Family::default(),
            ),
            series: Mutex::default(),
            audit_lost: registered(
                registry,
                "audit_lines_lost",
                "Audit lines that could not be written",
                Counter::default(),
            ),
            audit_errors: registered(
                registry,
                "audit_write_errors",
                "Writes to the audit log that failed; they are tried again",
                Counter::default(),
            ),
            entries: registered(
                registry,
                "policy_table_entries",
                "Entries of the kernel's policy tables in use",
                Family::default(),
            ),
            limits: registered(
                registry,
                "policy_table_limit",
                "Entries that the kernel's policy tables hold at most",
                Family::default(),
            ),
            kernel: registered(
                registry,
                "kernel",
                "Events that the kernel's programs counted since the tables were made",
                Family::default(),
            ),
            compile_seconds: registered(
                registry,
                "policy_compile_seconds",
                "Time to compile the policies of one set",
                time(0.000_1, 4.0, 10),
            ),
            enforcement_seconds: registered(
                registry,
                "policy_enforcement_seconds",
                "Time from a change of policy reaching the agent to the kernel deciding by it",
                time(0.001, 2.0, 14),
            ),
            pushed: Mutex::default(),
        }
    }

    /// The kernel judged a connection of a workload.
    pub fn verdict(&self, workload: &str, decision: &Decision, dry_run: Option<&Decision>) {
        let series = self.bounded(labels(workload, decision));
        self.verdicts.get_or_create(&series).inc();
        if let Some(decision) = dry_run {
            let series = self.bounded(labels(workload, decision));
            self.dry_run.get_or_create(&series).inc();
        }
    }

    /// The workload is no longer of this node.
    pub fn forget(&self, workload: &str) {
        lock(&self.series).retain(|labels| {
            let gone = labels.workload == workload;
            if gone {
                self.verdicts.remove(labels);
                self.dry_run.remove(labels);
            }
            !gone
        });
    }

    /// A change of policy has come.
    pub fn pushed(&self) {
        lock(&self.pushed).get_or_insert_with(Instant::now);
    }

    /// When the first change came whose enforcement begins now.
    pub fn take_pushed(&self) -> Option<Instant> {
        lock(&self.pushed).take()
    }

    /// What began with [`PolicyMetrics::take_pushed`] ended: all is in force, or it is to be
    /// tried again.
    pub fn enforced(&self, since: Option<Instant>, complete: bool) {
        match since {
            Some(since) if complete => self
                .enforcement_seconds
                .observe(since.elapsed().as_secs_f64()),
            Some(since) => {
                *lock(&self.pushed) = Some(since);
            }
            None => {}
        }
    }

    /// Replaces what the kernel says.
    pub fn set_kernel(&self, tables: &[Usage], counters: &[(&'static str, u64)]) {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        for usage in tables {
            let label = [("table", usage.table.clone())];
            self.entries.get_or_create(&label).set(number(usage.used));
            self.limits.get_or_create(&label).set(number(usage.limit));
        }
        for (event, value) in counters {
            let counter = self.kernel.get_or_create(&[("event", *event)]);
            counter
                .inner()
                .store(*value, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// The labels themselves while there is room, and fixed ones after that.
    fn bounded(&self, labels: VerdictLabels) -> VerdictLabels {
        let mut series = lock(&self.series);
        if series.contains(&labels) {
            return labels;
        }
        if series.len() < MOST_SERIES {
            series.insert(labels.clone());
            return labels;
        }
        VerdictLabels {
            workload: OTHER.into(),
            policy: OTHER.into(),
            rule: String::new(),
            ..labels
        }
    }
}

fn labels(workload: &str, decision: &Decision) -> VerdictLabels {
    VerdictLabels {
        workload: workload.into(),
        policy: decision.policy.clone().unwrap_or_default(),
        rule: decision
            .rule
            .map(|rule| rule.to_string())
            .unwrap_or_default(),
        action: decision.verdict.clone(),
        reason: decision.reason.clone(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use prometheus_client::encoding::text::encode;

    use super::*;

    fn decision(rule: usize) -> Decision {
        Decision {
            verdict: "deny".into(),
            reason: "denied-by-policy".into(),
            policy: Some("demo/no".into()),
            rule: Some(rule),
        }
    }

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn verdicts_are_counted_by_policy_and_forgotten_with_their_workload() {
        let mut registry = Registry::default();
        let metrics = PolicyMetrics::register(&mut registry);
        metrics.verdict("demo/web", &decision(2), None);
        metrics.verdict("demo/web", &decision(2), Some(&decision(3)));
        let series = "verdicts_total{workload=\"demo/web\",policy=\"demo/no\",rule=\"2\",\
                      action=\"deny\",reason=\"denied-by-policy\"} 2";
        let before = text(&registry);
        assert!(before.contains(series), "{before}");
        assert!(
            before.contains("dry_run_verdicts_total{workload=\"demo/web\""),
            "{before}"
        );
        metrics.forget("demo/other");
        assert!(text(&registry).contains(series));
        metrics.forget("demo/web");
        assert!(!text(&registry).contains("demo/web"));
    }

    #[test]
    fn series_are_bounded() {
        let mut registry = Registry::default();
        let metrics = PolicyMetrics::register(&mut registry);
        for rule in 0..MOST_SERIES + 500 {
            metrics.verdict("demo/web", &decision(rule), None);
        }
        let text = text(&registry);
        let series = text
            .lines()
            .filter(|l| l.starts_with("verdicts_total{"))
            .count();
        assert_eq!(series, MOST_SERIES + 1);
        assert!(text.contains("workload=\"(other)\""));
    }

    #[test]
    fn time_to_enforcement_counts_from_the_first_change_that_is_not_in_force() {
        let mut registry = Registry::default();
        let metrics = PolicyMetrics::register(&mut registry);
        metrics.pushed();
        let first = metrics.take_pushed();
        metrics.enforced(first, false);
        metrics.pushed();
        assert_eq!(metrics.take_pushed(), first);
        metrics.enforced(first, true);
        assert_eq!(metrics.take_pushed(), None);
        assert!(text(&registry).contains("policy_enforcement_seconds_count 1"));
    }
}
