//! A mesh of manifests and the verdicts in it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use ringfence_manifest::{Converted, L7Handling, Manifests, OtherKinds, convert, parse};
use ringfence_policies::{Connection, Decision, Peer, Policy, PolicyStore, evaluate};

pub const ROOT: &str = "istio-system";

pub fn read(yaml: &str) -> Manifests {
    parse(yaml, Path::new("m.yaml"), OtherKinds::Skip).unwrap_or_else(|errors| {
        let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
        panic!("{}\n{yaml}", lines.join("\n"))
    })
}

/// All errors, a line each.
pub fn errors(yaml: &str) -> Vec<String> {
    let errors = parse(yaml, Path::new("m.yaml"), OtherKinds::Skip).expect_err(yaml);
    errors.iter().map(ToString::to_string).collect()
}

pub fn exact(yaml: &str) -> Converted {
    convert(&read(yaml), ROOT, L7Handling::IstioExact)
}

/// The one policy that it becomes.
pub fn policy(yaml: &str, l7: L7Handling) -> Policy {
    let converted = convert(&read(yaml), ROOT, l7);
    let policies: Vec<_> = converted.policies().collect();
    assert_eq!(policies.len(), 1, "{yaml}");
    policies[0].policy.clone()
}

pub fn warnings(converted: &Converted) -> Vec<String> {
    converted.warnings.iter().map(ToString::to_string).collect()
}

pub fn labels(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap());
    pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

pub fn attached(converted: &Converted, namespace: &str, of: &str) -> Vec<String> {
    let names = converted.attached(namespace, &labels(of));
    names.iter().map(ToString::to_string).collect()
}

/// A connection to a workload.
#[derive(Clone, Copy)]
pub struct To<'a> {
    pub namespace: &'a str,
    pub labels: &'a str,
    /// `NAMESPACE/ACCOUNT` in `cluster.local`, a whole SPIFFE ID, or nothing: plaintext.
    pub from: &'a str,
    pub source: &'a str,
    pub port: u16,
}

pub fn judge(converted: &Converted, to: To<'_>) -> Decision {
    let mut store = PolicyStore::new(ROOT);
    for converted in converted.policies() {
        store.insert(converted.policy.clone());
    }
    let named = attached(converted, to.namespace, to.labels);
    let policies = store.applicable(to.namespace, &named);
    assert!(policies.missing.is_empty(), "{:?}", policies.missing);
    let peer: Option<Peer> = match to.from {
        "" => None,
        id if id.starts_with("spiffe://") => Some(id.parse().unwrap()),
        account => {
            let (namespace, account) = account.split_once('/').unwrap();
            let id = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
            Some(id.parse().unwrap())
        }
    };
    evaluate(
        &policies,
        &Connection {
            peer: peer.as_ref(),
            source: to.source.parse().unwrap(),
            destination: IpAddr::from([10, 0, 0, 80]),
            port: to.port,
        },
    )
}
