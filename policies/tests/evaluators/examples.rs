//! The situations of Istio's L4 documentation (AuthorizationPolicy reference, the TCP and
//! explicit-deny tasks, ambient L4 policy, PeerAuthentication), in the form in which
//! Istiod sends them: `to` is one clause, `from` another, each `when` one of its own.

use std::net::IpAddr;

use ringfence_policies::{Action, Connection, Match, Peer, Policy, Rule, ServiceAccountMatch};

use crate::harness::{POD4, applied, judge, peer, policy, ports, rule};

const CURL: &str = "spiffe://cluster.local/ns/foo/sa/curl";
const GATEWAY: &str = "spiffe://cluster.local/ns/default/sa/bookinfo-gateway-istio";
const OTHER: &str = "spiffe://cluster.local/ns/bar/sa/curl";

/// Peer (`None` is plaintext), client address, port, and whether it gets in.
type Row = (Option<&'static str>, &'static str, u16, bool);

fn check(what: &str, policies: Vec<Policy>, rows: &[Row]) {
    let policies = applied(policies);
    for (id, source, port, expected) in rows {
        let peer: Option<Peer> = id.map(peer);
        let source: IpAddr = source.parse().unwrap();
        let connection = Connection {
            peer: peer.as_ref(),
            source,
            destination: POD4.parse().unwrap(),
            port: *port,
        };
        let allowed = judge(&policies, &connection).allows();
        assert_eq!(allowed, *expected, "{what}: {id:?} {source} {port}");
    }
}

fn allow(rules: Vec<Rule>) -> Policy {
    policy("allow", Action::Allow, rules)
}

fn deny(rules: Vec<Rule>) -> Policy {
    policy("deny", Action::Deny, rules)
}

fn principals(names: &[&str]) -> Match {
    Match {
        principals: names.iter().map(|n| n.parse().unwrap()).collect(),
        ..Match::default()
    }
}

fn not_principals(names: &[&str]) -> Match {
    Match {
        not_principals: names.iter().map(|n| n.parse().unwrap()).collect(),
        ..Match::default()
    }
}

fn namespaces(names: &[&str]) -> Match {
    Match {
        namespaces: names.iter().map(|n| n.parse().unwrap()).collect(),
        ..Match::default()
    }
}

fn ip_blocks(prefixes: &[&str]) -> Match {
    Match {
        source_ips: prefixes.iter().map(|p| p.parse().unwrap()).collect(),
        ..Match::default()
    }
}

fn not_ports(ports: &[u16]) -> Match {
    Match {
        not_destination_ports: ports.to_vec(),
        ..Match::default()
    }
}

#[test]
fn nothing_everything_and_nobody() {
    let any = |expected| {
        [
            (Some(CURL), "10.1.0.1", 80, expected),
            (None, "10.1.0.1", 80, expected),
        ]
    };
    check("no policy", vec![], &any(true));
    check(
        "allow nothing: an empty spec",
        vec![allow(vec![])],
        &any(false),
    );
    check(
        "allow all: an empty rule",
        vec![allow(vec![rule(vec![])])],
        &any(true),
    );
    check(
        "deny all: an empty rule",
        vec![deny(vec![rule(vec![])])],
        &any(false),
    );
    check(
        "deny all beside allow all",
        vec![allow(vec![rule(vec![])]), deny(vec![rule(vec![])])],
        &any(false),
    );
}

#[test]
fn tcp_ports() {
    check(
        "ALLOW to two ports",
        vec![allow(vec![rule(vec![vec![ports(&[9000, 9001])]])])],
        &[
            (Some(CURL), "10.1.0.1", 9000, true),
            (None, "10.1.0.1", 9001, true),
            (Some(CURL), "10.1.0.1", 9002, false),
        ],
    );
    check(
        "ALLOW with a method is left out: nothing is allowed",
        vec![allow(vec![])],
        &[(Some(CURL), "10.1.0.1", 9000, false)],
    );
    check(
        "DENY with a method and a port is a DENY of the port",
        vec![deny(vec![rule(vec![vec![ports(&[9000])]])])],
        &[
            (Some(CURL), "10.1.0.1", 9000, false),
            (Some(CURL), "10.1.0.1", 9001, true),
        ],
    );
    check(
        "DENY with a method alone is inert",
        vec![deny(vec![rule(vec![vec![Match::default()]])])],
        &[(Some(CURL), "10.1.0.1", 9000, true)],
    );
    check(
        "DENY from somebody with a method alone is inert",
        vec![deny(vec![rule(vec![
            vec![Match::default()],
            vec![namespaces(&["bar"])],
        ])])],
        &[(Some(OTHER), "10.1.0.1", 9000, true)],
    );
}

#[test]
fn sources_by_identity() {
    let gateway = "cluster.local/ns/default/sa/bookinfo-gateway-istio";
    check(
        "ALLOW from a gateway",
        vec![allow(vec![rule(vec![vec![principals(&[gateway])]])])],
        &[
            (Some(GATEWAY), "10.1.0.1", 9080, true),
            (Some(CURL), "10.1.0.1", 9080, false),
            (None, "10.1.0.1", 9080, false),
        ],
    );
    check(
        "ALLOW from an account or from a namespace, to a port",
        vec![allow(vec![rule(vec![
            vec![ports(&[80])],
            vec![
                principals(&["cluster.local/ns/foo/sa/curl"]),
                namespaces(&["bar"]),
            ],
        ])])],
        &[
            (Some(CURL), "10.1.0.1", 80, true),
            (Some(OTHER), "10.1.0.1", 80, true),
            (Some(GATEWAY), "10.1.0.1", 80, false),
            (Some(CURL), "10.1.0.1", 81, false),
        ],
    );
    check(
        "ALLOW from a service account of the policy's namespace",
        vec![allow(vec![rule(vec![vec![Match {
            service_accounts: vec![ServiceAccountMatch::new("foo", "curl").unwrap()],
            ..Match::default()
        }]])])],
        &[
            (Some(CURL), "10.1.0.1", 80, true),
            (
                Some("spiffe://other.mesh/ns/foo/sa/curl"),
                "10.1.0.1",
                80,
                true,
            ),
            (Some(OTHER), "10.1.0.1", 80, false),
        ],
    );
    check(
        "DENY from everywhere but a namespace, plaintext included",
        vec![deny(vec![rule(vec![vec![Match {
            not_namespaces: vec!["foo".parse().unwrap()],
            ..Match::default()
        }]])])],
        &[
            (Some(CURL), "10.1.0.1", 80, true),
            (Some(OTHER), "10.1.0.1", 80, false),
            (None, "10.1.0.1", 80, false),
        ],
    );
    check(
        "ALLOW only what has any identity",
        vec![allow(vec![rule(vec![vec![principals(&["*"])]])])],
        &[
            (Some(OTHER), "10.1.0.1", 80, true),
            (None, "10.1.0.1", 80, false),
        ],
    );
    check(
        "DENY what has no identity",
        vec![deny(vec![rule(vec![vec![not_principals(&["*"])]])])],
        &[
            (Some(OTHER), "10.1.0.1", 80, true),
            (None, "10.1.0.1", 80, false),
        ],
    );
    check(
        "DENY all but a trust domain",
        vec![deny(vec![rule(vec![vec![not_principals(&[
            "cluster.local/*",
        ])]])])],
        &[
            (Some(OTHER), "10.1.0.1", 80, true),
            (
                Some("spiffe://other.mesh/ns/bar/sa/curl"),
                "10.1.0.1",
                80,
                false,
            ),
        ],
    );
}

#[test]
fn sources_by_address() {
    let blocks = ["1.2.3.4", "5.6.7.0/24"];
    let rows = |inside: bool| {
        [
            (None, "1.2.3.4", 80, inside),
            (Some(CURL), "5.6.7.255", 80, inside),
            (Some(CURL), "1.2.3.5", 80, !inside),
            (Some(CURL), "5.6.8.0", 80, !inside),
        ]
    };
    let from = || vec![rule(vec![vec![ip_blocks(&blocks)]])];
    check("ALLOW from blocks", vec![allow(from())], &rows(true));
    check("DENY from blocks", vec![deny(from())], &rows(false));
    check(
        "ALLOW a namespace, but not from one address",
        vec![allow(vec![rule(vec![vec![Match {
            not_source_ips: vec!["10.1.0.9".parse().unwrap()],
            ..namespaces(&["foo"])
        }]])])],
        &[
            (Some(CURL), "10.1.0.1", 80, true),
            (Some(CURL), "10.1.0.9", 80, false),
            (Some(OTHER), "10.1.0.1", 80, false),
        ],
    );
}

#[test]
fn conditions_are_clauses_of_their_own() {
    let when = |action| {
        policy(
            "when",
            action,
            vec![rule(vec![
                vec![namespaces(&["foo"])],
                // destination.port, source.ip, destination.ip
                vec![ports(&[80, 443])],
                vec![Match {
                    not_source_ips: vec!["10.1.9.0/24".parse().unwrap()],
                    ..ip_blocks(&["10.0.0.0/8"])
                }],
                vec![Match {
                    destination_ips: vec![POD4.parse().unwrap()],
                    ..Match::default()
                }],
            ])],
        )
    };
    let rows = |hit: bool| {
        [
            (Some(CURL), "10.1.0.1", 443, hit),
            (Some(CURL), "10.1.9.1", 443, !hit),
            (Some(CURL), "11.1.0.1", 443, !hit),
            (Some(CURL), "10.1.0.1", 8080, !hit),
            (Some(OTHER), "10.1.0.1", 443, !hit),
        ]
    };
    check("ALLOW when", vec![when(Action::Allow)], &rows(true));
    check("DENY when", vec![when(Action::Deny)], &rows(false));
    check(
        "an L7 condition leaves a DENY rule inert",
        vec![deny(vec![rule(vec![
            vec![namespaces(&["foo"])],
            vec![Match::default()],
        ])])],
        &[(Some(CURL), "10.1.0.1", 80, true)],
    );
}

#[test]
fn peer_authentication_by_port() {
    // STRICT, with port 8080 PERMISSIVE or DISABLE.
    let strict_but = deny(vec![rule(vec![
        vec![not_principals(&["*"])],
        vec![not_ports(&[8080])],
    ])]);
    check(
        "STRICT but for a port",
        vec![strict_but],
        &[
            (None, "10.1.0.1", 8080, true),
            (None, "10.1.0.1", 80, false),
            (Some(CURL), "10.1.0.1", 80, true),
        ],
    );
    // STRICT, with two such ports: a clause each.
    let strict_but_two = deny(vec![rule(vec![
        vec![not_principals(&["*"])],
        vec![not_ports(&[8080])],
        vec![not_ports(&[9090])],
    ])]);
    check(
        "STRICT but for two ports",
        vec![strict_but_two],
        &[
            (None, "10.1.0.1", 8080, true),
            (None, "10.1.0.1", 9090, true),
            (None, "10.1.0.1", 80, false),
        ],
    );
    // PERMISSIVE, with two ports STRICT: a rule each, of one match.
    let port = |port| {
        rule(vec![vec![Match {
            destination_ports: vec![port],
            ..not_principals(&["*"])
        }]])
    };
    check(
        "PERMISSIVE but for two ports",
        vec![deny(vec![port(443), port(8443)])],
        &[
            (None, "10.1.0.1", 443, false),
            (None, "10.1.0.1", 8443, false),
            (None, "10.1.0.1", 80, true),
            (Some(CURL), "10.1.0.1", 443, true),
        ],
    );
}
