//! Counters of the agent, under typed reasons.

use std::collections::BTreeMap;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};

use super::policy_metrics::PolicyMetrics;

/// Label set with one reason.
type Reasons = Family<[(&'static str, &'static str); 1], Counter>;

/// The agent's metrics. Names are those of the registry, without prefix and suffix.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Connections accepted from enrolled applications.
    pub outbound_accepted: Counter,
    /// Tunnel connections accepted from peers.
    pub inbound_accepted: Counter,
    /// Full handshakes completed, by either side.
    pub handshakes: Counter,
    /// Streams that went over a tunnel that was already there.
    pub tunnels_reused: Counter,
    /// Streams opened, by direction.
    streams: Reasons,
    /// Streams ended, by how.
    stream_ends: Reasons,
    /// Connections that never became a stream, by why.
    refused: Reasons,
    /// Plaintext connections that were ended, by direction.
    plaintext_ends: Reasons,
    /// Handshakes that failed, by why.
    handshake_failures: Reasons,
    /// Resources of the control plane that were rejected.
    pub rejected_resources: Counter,
    /// Seconds that each certificate is still valid.
    svid_seconds_left: Family<[(&'static str, String); 1], Gauge>,
    /// Verdicts, tables and times of policy.
    pub policy: PolicyMetrics,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("ringfence");
        let mut counter = |name, help| registered(&mut registry, name, help, Counter::default());
        let outbound_accepted = counter(
            "outbound_accepted",
            "Connections taken over from enrolled pods",
        );
        let inbound_accepted =
            counter("inbound_accepted", "Tunnel connections accepted from peers");
        let handshakes = counter("handshakes", "TLS handshakes completed");
        let tunnels_reused = counter("tunnels_reused", "Streams that needed no handshake");
        let rejected_resources =
            counter("rejected_resources", "xDS resources refused as malformed");
        let svid_seconds_left = registered(
            &mut registry,
            "svid_seconds_left",
            "Seconds that the certificate of an identity is still valid",
            Family::default(),
        );
        let mut family = |name, help| registered(&mut registry, name, help, Reasons::default());
        let streams = family("streams", "Streams opened, by direction");
        let stream_ends = family("stream_ends", "Streams ended, by how they ended");
        let refused = family(
            "refused",
            "Connections refused before they became a stream, by reason",
        );
        let plaintext_ends = family(
            "plaintext_ends",
            "Plaintext connections ended because they are no longer admitted, by direction",
        );
        let handshake_failures = family(
            "handshake_failures",
            "TLS handshakes that failed, by reason",
        );
        let policy = PolicyMetrics::register(&mut registry);
        Metrics {
            policy,
            registry,
            outbound_accepted,
            inbound_accepted,
            handshakes,
            tunnels_reused,
            streams,
            stream_ends,
            refused,
            plaintext_ends,
            handshake_failures,
            rejected_resources,
            svid_seconds_left,
        }
    }
}

impl Metrics {
    /// A stream began.
    pub fn stream_opened(&self, direction: &'static str) {
        self.streams
            .get_or_create(&[("direction", direction)])
            .inc();
    }

    /// A stream ended.
    pub fn stream_ended(&self, reason: &'static str) {
        self.stream_ends.get_or_create(&[("reason", reason)]).inc();
    }

    /// A connection never became a stream.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&[("reason", reason)]).inc();
    }

    /// Plaintext connections were ended.
    pub fn plaintext_ended(&self, direction: &'static str, number: usize) {
        self.plaintext_ends
            .get_or_create(&[("direction", direction)])
            .inc_by(number as u64);
    }

    /// A handshake failed.
    pub fn handshake_failed(&self, reason: &'static str) {
        self.handshake_failures
            .get_or_create(&[("reason", reason)])
            .inc();
    }

    /// Replaces the certificates' remaining life times (identity, seconds).
    pub fn set_svids(&self, svids: impl Iterator<Item = (String, i64)>) {
        self.svid_seconds_left.clear();
        for (identity, seconds) in svids {
            self.svid_seconds_left
                .get_or_create(&[("identity", identity)])
                .set(seconds);
        }
    }

    /// OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// Name (with labels) and value of every counter, for the status page; without those of
    /// policy, which are many.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        self.encode()
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter(|line| !OF_POLICY.iter().any(|name| line.starts_with(name)))
            .filter_map(|line| {
                let (name, value) = line.rsplit_once(' ')?;
                let name = name.replacen("ringfence_", "", 1).replacen("_total", "", 1);
                Some((name, value.parse().ok()?))
            })
            .collect()
    }
}

/// A metric whose text is the registry's from now on, and whose value is its owner's.
pub(super) fn registered<M: Metric + Clone>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    metric: M,
) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// How the names of policy's own metrics begin.
const OF_POLICY: [&str; 4] = [
    "ringfence_verdicts_",
    "ringfence_dry_run_",
    "ringfence_policy_",
    "ringfence_kernel_",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_carry_their_labels_and_lose_prefix_and_suffix() {
        let metrics = Metrics::default();
        metrics.outbound_accepted.inc();
        metrics.refused("no-svid");
        let counters = metrics.counters();
        assert_eq!(counters.get("outbound_accepted"), Some(&1));
        assert_eq!(counters.get("refused{reason=\"no-svid\"}"), Some(&1));
        assert_eq!(counters.get("inbound_accepted"), Some(&0));
    }
}
