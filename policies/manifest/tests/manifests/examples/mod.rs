//! The L4 examples of Istio's documentation (authorization for TCP traffic, the policy
//! reference, ambient L4 policies, ingress, trust domains, dry run), each with connections
//! that it admits and connections that it refuses. Where an example has HTTP conditions,
//! this is what is left of it at L4.

mod http;
mod not_enforced;
mod peer_authentication;
mod scope;
mod who;

use crate::harness::{To, exact, judge};

/// Namespace, labels, who, from which address, to which port; admitted?
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    u16,
    bool,
);

pub struct Example {
    what: &'static str,
    yaml: &'static str,
    rows: &'static [Row],
}

const IP: &str = "10.1.2.3";

const EXAMPLES: &[&[Example]] = &[
    scope::EXAMPLES,
    http::EXAMPLES,
    who::EXAMPLES,
    not_enforced::EXAMPLES,
    peer_authentication::EXAMPLES,
];

#[test]
fn documented_examples_admit_and_refuse_what_they_say() {
    let mut wrong = Vec::new();
    for example in EXAMPLES.iter().copied().flatten() {
        let converted = exact(example.yaml);
        for &(namespace, labels, from, source, port, admitted) in example.rows {
            let to = To {
                namespace,
                labels,
                from,
                source,
                port,
            };
            let decision = judge(&converted, to);
            if decision.allows() != admitted {
                wrong.push(format!(
                    "{}: `{from}` {source} -> {namespace} {{{labels}}}:{port}: {decision:?}",
                    example.what
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
