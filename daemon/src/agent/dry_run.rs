//! `ringfence authz dry-run`: what manifests would change for the connections of this node.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use ringfence_bpf_common::IDENTITY_NONE;
use ringfence_manifest::{Converted, L7Handling, Manifests, OtherKinds, convert, parse};
use ringfence_policies::{
    Connection, Peer, PolicyChange, PolicyStore, STATIC_STRICT, Scope, WorkloadPolicies, compile,
    evaluate,
};

use super::Agent;
use super::applied::{mode, name_of};
use super::explain::Unanswered;
use super::pods::Pod;
use super::policy::{Judged, by_family};
use super::streams::hex;
use crate::authz::report::{
    Change, Decision, DryRun, DryRunPolicy, DryRunRequest, DryRunWorkload, L7,
};

/// How the names of policies begin that a PeerAuthentication with modes of ports becomes.
const CONVERTED_PEER_AUTHENTICATION: &str = "converted_peer_authentication_";

type Labels = BTreeMap<String, BTreeMap<String, String>>;

/// Judges what is there as if the manifests were applied. Changes nothing.
pub fn dry_run(agent: &Agent, request: &DryRunRequest) -> Result<DryRun, Unanswered> {
    let manifests = parse(&request.text, Path::new(&request.file), OtherKinds::Skip);
    let manifests = manifests.map_err(|errors| {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Unanswered::Question(lines.join("\n"))
    })?;
    let root = &agent.config.root_namespace;
    let l7 = match request.l7 {
        L7::IstioExact => L7Handling::IstioExact,
        L7::DenyAsL4 => L7Handling::DenyAsL4,
    };
    let converted = convert(&manifests, root, l7);
    let (before, named) = {
        let mesh = agent.mesh();
        let pods = agent.pods.list();
        let named: Vec<_> = pods
            .into_iter()
            .filter_map(|pod| Some((pod.workload()?, pod)))
            .collect();
        (mesh.policies().clone(), named)
    };
    for workload in request.labels.keys() {
        if !named.iter().any(|(_, pod)| name_of(pod) == *workload) {
            let what = format!("--labels {workload}: no such workload on this node");
            return Err(Unanswered::Question(what));
        }
    }
    let mut after = before.clone();
    after.apply(
        converted
            .policies()
            .map(|c| PolicyChange::Put(c.policy.clone())),
    );

    let mut plan = Plan {
        root,
        converted: &converted,
        manifests: &manifests,
        labels: &request.labels,
        warnings: converted.warnings.iter().map(ToString::to_string).collect(),
        unknown: BTreeMap::new(),
    };
    let mut workloads = Vec::new();
    let mut applies: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (workload, pod) in &named {
        let old = before.applicable(&workload.namespace, &workload.policies);
        let names = plan.named(&workload.namespace, &name_of(pod), &workload.policies);
        let new = after.applicable(&workload.namespace, &names);
        for policy in new.policies.iter().chain(&old.policies) {
            let users = applies.entry(policy.name.to_string()).or_default();
            if new.policies.iter().any(|p| p.name == policy.name) && !users.contains(&name_of(pod))
            {
                users.push(name_of(pod));
            }
        }
        if !old.same(&new) {
            workloads.push(judge(agent, pod, &old, &new)?);
        }
    }
    plan.finish();
    let Plan { warnings, .. } = plan;
    Ok(DryRun {
        policies: describe(&converted, &before, &applies),
        workloads,
        warnings,
    })
}

/// Which policies the workloads of this node would name.
struct Plan<'a> {
    root: &'a str,
    converted: &'a Converted,
    manifests: &'a Manifests,
    labels: &'a Labels,
    warnings: Vec<String>,
    /// Policies whose selectors cannot be answered, and the workloads without labels.
    unknown: BTreeMap<String, BTreeSet<String>>,
}

impl Plan<'_> {
    /// The policies that a workload would name in place of `current`; `pod` is
    /// `namespace/name`.
    fn named(&mut self, namespace: &str, pod: &str, current: &[String]) -> Vec<String> {
        let labels = self.labels.get(pod);
        let mut names: BTreeSet<String> = current.iter().cloned().collect();
        for converted in self.converted.policies() {
            let Some(selector) = &converted.selector else {
                continue;
            };
            let name = &converted.policy.name;
            if name.namespace != namespace && name.namespace != self.root {
                continue;
            }
            // Which ones are named is decided by mode, below.
            if self.is_mode(&name.to_string()) {
                continue;
            }
            match labels {
                Some(labels) if selector.selects(labels) => {
                    names.insert(name.to_string());
                }
                Some(_) => {
                    names.remove(&name.to_string());
                }
                // One that is attached already is taken to stay so.
                None if names.contains(&name.to_string()) => {}
                None => self.does_not_know(&name.to_string(), pod),
            }
        }
        // What had a selector and has none any more holds for its namespace.
        for converted in self.converted.policies().filter(|c| c.selector.is_none()) {
            if converted.policy.scope != Scope::WorkloadSelector {
                names.remove(&converted.policy.name.to_string());
            }
        }
        if self.speaks_of_mode(namespace, pod, labels) {
            names.retain(|name| !self.is_mode(name));
            let none = BTreeMap::new();
            let attached = self.converted.attached(namespace, labels.unwrap_or(&none));
            let attached = attached.iter().map(ToString::to_string);
            names.extend(attached.filter(|name| self.is_mode(name)));
        }
        names.into_iter().collect()
    }

    /// Whether a PeerAuthentication is behind a policy of this name.
    fn is_mode(&self, name: &str) -> bool {
        name.split_once('/').is_some_and(|(namespace, name)| {
            name.starts_with(CONVERTED_PEER_AUTHENTICATION)
                || (name == STATIC_STRICT && namespace == self.root)
        })
    }

    /// Whether a PeerAuthentication of the file holds for the workload.
    fn speaks_of_mode(
        &mut self,
        namespace: &str,
        pod: &str,
        labels: Option<&BTreeMap<String, String>>,
    ) -> bool {
        let manifests = self.manifests;
        let mut speaks = false;
        for policy in manifests.peer_authentications() {
            let of = &policy.name().namespace;
            if of != namespace && of != self.root {
                continue;
            }
            match (policy.selector(), labels) {
                (None, _) => speaks = true,
                (Some(_), _) if of == self.root => {}
                (Some(selector), Some(labels)) => speaks |= selector.selects(labels),
                (Some(_), None) => {
                    self.does_not_know(&format!("PeerAuthentication {}", policy.name()), pod);
                }
            }
        }
        speaks
    }

    fn does_not_know(&mut self, policy: &str, pod: &str) {
        let pods = self.unknown.entry(policy.to_owned()).or_default();
        pods.insert(pod.to_owned());
    }

    fn finish(&mut self) {
        for (policy, workloads) in &self.unknown {
            let workloads: Vec<&str> = workloads.iter().map(String::as_str).collect();
            self.warnings.push(format!(
                "{policy} has a selector, and control planes do not send labels: taken as NOT \
                 selecting {}; say --labels NAMESPACE/NAME:KEY=VALUE",
                workloads.join(", ")
            ));
        }
        if self.manifests.peer_authentications().next().is_some() {
            self.warnings.push(
                "modes are those of the file alone: other PeerAuthentications of the mesh, which \
                 may be older or closer to a workload, are not known on a node"
                    .into(),
            );
        }
        for converted in self.converted.policies().filter(|c| c.policy.dry_run) {
            self.warnings.push(format!(
                "{} has the annotation istio.io/dry-run: it would be reported, not enforced",
                converted.policy.name
            ));
        }
    }
}

fn describe(
    converted: &Converted,
    before: &PolicyStore,
    applies: &BTreeMap<String, Vec<String>>,
) -> Vec<DryRunPolicy> {
    let one = |policy: &ringfence_policies::Policy| DryRunPolicy {
        name: policy.name.to_string(),
        what: match before.policy(&policy.name) {
            Some(old) if **old == *policy => "unchanged",
            Some(_) => "replaces",
            None if before.rejected_policy(&policy.name).is_some() => "replaces",
            None => "new",
        }
        .into(),
        summary: policy.summary().to_string(),
        applies_to: applies
            .get(&policy.name.to_string())
            .cloned()
            .unwrap_or_default(),
    };
    converted.policies().map(|c| one(&c.policy)).collect()
}

/// A connection of the pod, live or lately.
struct Seen {
    kind: &'static str,
    stream: Option<String>,
    /// With its port, where there is one.
    source: String,
    judged: Judged,
    count: usize,
}

fn judge(
    agent: &Agent,
    pod: &Arc<Pod>,
    old: &WorkloadPolicies,
    new: &WorkloadPolicies,
) -> Result<DryRunWorkload, Unanswered> {
    let seen = seen(agent, pod)?;
    let number = |kind| {
        seen.iter()
            .filter(|s| s.kind == kind)
            .map(|s| s.count)
            .sum()
    };
    let addresses = pod
        .workload()
        .map(|w| by_family(&w.addresses))
        .unwrap_or_default();
    let changes = seen.iter().filter_map(|seen| change(agent, seen, old, new));
    Ok(DryRunWorkload {
        workload: name_of(pod),
        mode_before: mode(old.mode).into(),
        mode_after: mode(new.mode).into(),
        problems: compile(new, addresses)
            .problems
            .iter()
            .map(ToString::to_string)
            .collect(),
        judged: [number("stream"), number("plaintext"), number("verdict")],
        changes: changes.collect(),
    })
}

fn change(
    agent: &Agent,
    seen: &Seen,
    old: &WorkloadPolicies,
    new: &WorkloadPolicies,
) -> Option<Change> {
    let judged = &seen.judged;
    let peer = match judged.identity {
        IDENTITY_NONE => None,
        // Numbers are never taken back.
        number => Some(agent.identities.peer(number)?),
    };
    let connection = Connection {
        peer: peer.as_deref(),
        source: judged.source,
        destination: judged.destination.ip(),
        port: judged.destination.port(),
    };
    let (before, after) = (evaluate(old, &connection), evaluate(new, &connection));
    (before.allows() != after.allows()).then(|| Change {
        kind: seen.kind.into(),
        stream: seen.stream.clone(),
        identity: peer.as_deref().map(Peer::to_string),
        source: seen.source.clone(),
        destination: judged.destination,
        count: seen.count,
        before: Decision::from(&before),
        after: Decision::from(&after),
    })
}

fn seen(agent: &Agent, pod: &Arc<Pod>) -> Result<Vec<Seen>, Unanswered> {
    let cookie = pod.netns.cookie();
    let streams = agent
        .activity
        .judged(cookie)
        .into_iter()
        .map(|(id, source, judged)| Seen {
            kind: "stream",
            stream: Some(hex(&id)),
            source: source.to_string(),
            judged,
            count: 1,
        });
    let plaintext = agent.datapath.plaintext_connections(cookie)?.into_iter();
    let plaintext = plaintext.map(|(source, destination)| Seen {
        kind: "plaintext",
        stream: None,
        source: source.to_string(),
        judged: Judged {
            set: 0,
            identity: IDENTITY_NONE,
            source: source.ip(),
            destination,
        },
        count: 1,
    });
    let verdicts = agent
        .audit
        .recent(cookie)
        .into_iter()
        .map(|(judged, count)| Seen {
            kind: "verdict",
            stream: None,
            source: judged.source.to_string(),
            judged,
            count,
        });
    Ok(streams.chain(plaintext).chain(verdicts).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ROOT: &str = "istio-system";

    /// What the workload demo/web would name, and the warnings.
    fn named(yaml: &str, current: &[&str], labels: Option<&str>) -> (Vec<String>, Vec<String>) {
        let manifests = parse(yaml, Path::new("test.yaml"), OtherKinds::Refuse).unwrap();
        let converted = convert(&manifests, ROOT, L7Handling::IstioExact);
        let labels = labels.map(|app| {
            let app = BTreeMap::from([("app".to_owned(), app.to_owned())]);
            ("demo/web".to_owned(), app)
        });
        let labels = labels.into_iter().collect();
        let mut plan = Plan {
            root: ROOT,
            converted: &converted,
            manifests: &manifests,
            labels: &labels,
            warnings: Vec::new(),
            unknown: BTreeMap::new(),
        };
        let current: Vec<String> = current.iter().map(ToString::to_string).collect();
        let names = plan.named("demo", "demo/web", &current);
        plan.finish();
        (names, plan.warnings)
    }

    fn policy(namespace: &str, selector: &str) -> String {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: p, namespace: {namespace}}}\n\
             spec: {{{selector}action: DENY, rules: [{{}}]}}\n"
        )
    }

    const SELECTS_WEB: &str = "selector: {matchLabels: {app: web}}, ";

    #[test]
    fn selector_counts_by_labels_and_without_them_by_what_is_named_already() {
        let yaml = policy("demo", SELECTS_WEB);
        let of = |current: &[&str], labels| named(&yaml, current, labels);
        assert_eq!(of(&[], Some("web")).0, ["demo/p"]);
        assert_eq!(of(&[], Some("other")).0, [""; 0]);
        assert_eq!(of(&["demo/p"], Some("other")).0, [""; 0]);
        assert_eq!(of(&["demo/p", "demo/q"], None).0, ["demo/p", "demo/q"]);
        assert!(of(&["demo/p"], None).1.is_empty());
        let (names, warnings) = of(&[], None);
        assert!(names.is_empty());
        assert!(warnings.join("").contains("--labels"), "{warnings:?}");
        // Another namespace's selector does not concern the workload; the root's does.
        assert_eq!(
            named(&policy("other", SELECTS_WEB), &[], Some("web")).0,
            [""; 0]
        );
        let root = named(&policy(ROOT, SELECTS_WEB), &[], Some("web")).0;
        assert_eq!(root, ["istio-system/p"]);
    }

    #[test]
    fn policy_that_lost_its_selector_needs_no_name() {
        assert_eq!(named(&policy("demo", ""), &["demo/p"], None).0, [""; 0]);
    }

    fn mode(namespace: &str, spec: &str) -> String {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{name: m, namespace: {namespace}}}\nspec: {{{spec}}}\n"
        )
    }

    const STRICT: &str = "istio-system/istio_converted_static_strict";

    #[test]
    fn mode_of_the_file_takes_the_place_of_the_one_before() {
        let strict = mode("demo", "mtls: {mode: STRICT}");
        assert_eq!(named(&strict, &["demo/q"], None).0, ["demo/q", STRICT]);
        let permissive = mode("demo", "mtls: {mode: PERMISSIVE}");
        let before = [STRICT, "demo/converted_peer_authentication_old", "demo/q"];
        assert_eq!(named(&permissive, &before, None).0, ["demo/q"]);
        // The mode of another namespace says nothing.
        let other = mode("other", "mtls: {mode: PERMISSIVE}");
        assert_eq!(named(&other, &[STRICT], None).0, [STRICT]);
    }

    #[test]
    fn modes_of_ports_are_named_where_they_are_selected() {
        let yaml = mode(
            "demo",
            "selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, \
             portLevelMtls: {8080: {mode: PERMISSIVE}}",
        );
        let converted = "demo/converted_peer_authentication_m";
        assert_eq!(named(&yaml, &[STRICT], Some("web")).0, [converted]);
        assert_eq!(named(&yaml, &[STRICT], Some("other")).0, [STRICT]);
        let (names, warnings) = named(&yaml, &[STRICT], None);
        assert_eq!(names, [STRICT]);
        assert!(
            warnings.join("").contains("PeerAuthentication demo/m"),
            "{warnings:?}"
        );
    }
}
