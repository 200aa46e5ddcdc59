//! What the agent answers to questions about policy: JSON on the admin socket, pages for
//! people. Both sides of the socket use these types.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// A decision, by whichever evaluator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// `allow` or `deny`.
    pub verdict: String,
    /// As in logs and metrics.
    pub reason: String,
    /// The policy that decided, if one did: `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Its first rule that matches, counted from 0 as in a manifest's `spec.rules[0]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
}

impl Decision {
    /// Whether the connection is admitted.
    pub fn allows(&self) -> bool {
        self.verdict == ALLOW
    }

    /// In one line.
    pub fn line(&self) -> String {
        let mut line = format!("{} ({})", self.verdict.to_uppercase(), self.reason);
        if let Some(policy) = &self.policy {
            line.push_str(&format!(" by {policy}"));
        }
        if let Some(rule) = self.rule {
            line.push_str(&format!(", rule {rule}"));
        }
        line
    }
}

impl From<&ringfence_policies::Decision> for Decision {
    fn from(decision: &ringfence_policies::Decision) -> Self {
        Decision {
            verdict: verdict(decision.allows()).into(),
            reason: decision.reason.as_str().into(),
            policy: decision.policy.as_ref().map(ToString::to_string),
            rule: decision.rule,
        }
    }
}

/// The word for a verdict.
pub fn verdict(allows: bool) -> &'static str {
    if allows { ALLOW } else { DENY }
}

const ALLOW: &str = "allow";
const DENY: &str = "deny";

/// `GET /policies`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Applied {
    pub workloads: Vec<AppliedTo>,
    /// Entries of the kernel's tables: name, in use, room.
    pub tables: Vec<Usage>,
    /// What no node can know of the policies that were written.
    pub blind_spots: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Usage {
    pub table: String,
    pub used: u64,
    pub limit: u64,
}

/// What decides about connections to one workload of this node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AppliedTo {
    /// `namespace/name`.
    pub workload: String,
    /// The set in the kernel; 0: none, which denies.
    pub set: u32,
    /// `strict` (plaintext is refused) or `permissive`.
    pub mode: String,
    pub terms: usize,
    pub most_terms: usize,
    /// Other workloads with the same set.
    pub shared_with: Vec<String>,
    pub policies: Vec<AppliedPolicy>,
    /// Why everything is denied, or waits.
    pub problems: Vec<String>,
    /// What was received differs from what decides: it is just being put in force.
    pub pending: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AppliedPolicy {
    pub name: String,
    /// `global`, `namespace` or `selector` (the workload names it).
    pub scope: String,
    /// `ALLOW` or `DENY`.
    pub action: String,
    pub dry_run: bool,
    /// Terms of the set that were made from it.
    pub terms: usize,
    /// Each rule in words.
    pub rules: Vec<String>,
    /// What a reader would not expect of it.
    pub notes: Vec<String>,
}

/// `POST /authz/explain`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExplainRequest {
    /// A SPIFFE ID, an IP address (plaintext) or `NAMESPACE/NAME` of a workload.
    pub from: String,
    /// The client's own address.
    #[serde(default)]
    pub source: Option<IpAddr>,
    /// `NAMESPACE/NAME:PORT` or `ADDRESS:PORT` of a workload of this node.
    pub to: String,
}

/// Its answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Explanation {
    /// The verified identity; none is plaintext.
    pub identity: Option<String>,
    pub source: IpAddr,
    /// `namespace/name`.
    pub workload: String,
    pub destination: SocketAddr,
    pub set: u32,
    pub mode: String,
    /// By the reference evaluator.
    pub reference: Decision,
    /// By the kernel's own program over its own tables (`BPF_PROG_RUN`).
    pub kernel: Decision,
    /// Where the two differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference: Option<Difference>,
    /// What would be decided if the dry-run policies were enforced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub with_dry_run: Option<Decision>,
    pub policies: Vec<TracedPolicy>,
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Difference {
    /// Known and safe: the workload is past a limit, and denied.
    pub expected: bool,
    pub what: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TracedPolicy {
    pub name: String,
    pub action: String,
    pub dry_run: bool,
    pub decides: bool,
    pub rules: Vec<TracedRule>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TracedRule {
    pub matches: bool,
    /// What keeps it from matching.
    pub why_not: Vec<String>,
}

/// `POST /authz/dry-run`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DryRunRequest {
    /// For messages.
    pub file: String,
    /// The manifests.
    pub text: String,
    pub l7: L7,
    /// Labels of workloads of this node, which no control plane sends: `NS/NAME` and what
    /// it has.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, std::collections::BTreeMap<String, String>>,
}

/// What becomes of a DENY rule with conditions that L4 cannot check.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum L7 {
    /// As Istiod: it may deny nothing.
    #[default]
    IstioExact,
    /// It holds without the conditions and denies more.
    DenyAsL4,
}

/// Its answer. Nothing was applied.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DryRun {
    pub policies: Vec<DryRunPolicy>,
    pub workloads: Vec<DryRunWorkload>,
    /// What the conversion lost, and what a node cannot know.
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DryRunPolicy {
    pub name: String,
    /// `new`, `replaces` or `unchanged`.
    pub what: String,
    pub summary: String,
    /// Workloads of this node that it would apply to.
    pub applies_to: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DryRunWorkload {
    pub workload: String,
    pub mode_before: String,
    pub mode_after: String,
    /// Why everything would be denied.
    pub problems: Vec<String>,
    /// How many live streams, plaintext connections and recent verdicts were judged.
    pub judged: [usize; 3],
    pub changes: Vec<Change>,
}

/// A connection that would be decided differently.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Change {
    /// `stream` and `plaintext` are live, a `verdict` was given lately.
    pub kind: String,
    /// Of a stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    pub identity: Option<String>,
    /// Without the port where verdicts of several connections are one line.
    pub source: String,
    pub destination: SocketAddr,
    /// Connections that this line stands for.
    pub count: usize,
    pub before: Decision,
    pub after: Decision,
}

/// `POST /authz/log`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogRequest {
    /// Only what is later than this number.
    #[serde(default)]
    pub after: u64,
    #[serde(default)]
    pub denied: bool,
    /// When there is nothing yet, wait for it, for some seconds.
    #[serde(default)]
    pub wait: bool,
}

/// Its answer, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Log {
    /// To be given as `after` next time.
    pub last: u64,
    pub verdicts: Vec<Record>,
}

/// One verdict of the kernel: a line of the audit log. Field names are those of ztunnel's
/// access log where it has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// RFC 3339, UTC: when the agent read it.
    pub time: String,
    /// Counts all verdicts since the agent started, logged or not.
    pub number: u64,
    #[serde(flatten)]
    pub decision: Decision,
    /// `inbound` or `outbound`, seen from the pod.
    pub direction: String,
    /// `last-hop` (out of a tunnel), `plaintext`, `egress`, or `guard` (a packet).
    pub hook: String,
    /// `mutual_tls` or `none`.
    pub connection_security_policy: String,
    #[serde(rename = "src.addr")]
    pub source: String,
    #[serde(
        rename = "src.workload",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub source_workload: Option<String>,
    #[serde(
        rename = "src.namespace",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub source_namespace: Option<String>,
    #[serde(
        rename = "src.identity",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub source_identity: Option<String>,
    #[serde(rename = "dst.addr")]
    pub destination: String,
    #[serde(
        rename = "dst.workload",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub destination_workload: Option<String>,
    #[serde(
        rename = "dst.namespace",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub destination_namespace: Option<String>,
    /// What would have been decided with the workload's dry-run policies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<Decision>,
}
