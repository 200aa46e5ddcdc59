//! Why a rule matches or not, field by field: the reference evaluator's own answer, with
//! what it compared. For explanations; nothing is decided here.

use std::fmt;

use crate::reference::{clause_matches, field, match_holds, rule_matches};
use crate::{Connection, Match, Peer, Policy};

/// One rule of a policy against one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleTrace {
    /// What the reference evaluator says.
    pub matches: bool,
    /// What keeps it from matching: every failing field of every match of every clause
    /// that does not hold.
    pub misses: Vec<Miss>,
}

/// One failing field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Miss {
    /// Counted from 0, as in the policy.
    pub clause: usize,
    /// The match within the clause, counted from 0.
    pub of_match: usize,
    pub why: Why,
}

/// Why a match does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// It has no field, and holds for nothing.
    NoField,
    /// None of the field's values is what the connection has.
    NoneOf {
        field: &'static str,
        values: Vec<String>,
        found: String,
    },
    /// A value of a `not_` field is what the connection has.
    Excluded {
        field: &'static str,
        value: String,
        found: String,
    },
}

/// Each rule of a policy against a connection, in order.
pub fn trace(policy: &Policy, connection: &Connection<'_>) -> Vec<RuleTrace> {
    let rules = policy.rules.iter().map(|rule| {
        let failing = rule
            .clauses
            .iter()
            .enumerate()
            .filter(|(_, clause)| !clause_matches(clause, connection));
        let misses = failing.flat_map(|(number, clause)| {
            let matches = clause.matches.iter().enumerate();
            matches.flat_map(move |(of_match, m)| {
                let whys = misses(m, connection).into_iter();
                whys.map(move |why| Miss {
                    clause: number,
                    of_match,
                    why,
                })
            })
        });
        RuleTrace {
            matches: rule_matches(rule, connection),
            misses: misses.collect(),
        }
    });
    rules.collect()
}

/// Why a match does not hold; nothing when it does.
fn misses(m: &Match, connection: &Connection<'_>) -> Vec<Why> {
    if match_holds(m, connection) {
        return Vec::new();
    }
    if m.is_empty() {
        return vec![Why::NoField];
    }
    let peer = connection.peer;
    let none = || "no identity (plaintext)".to_owned();
    let principals = peer.map_or_else(none, |peer| {
        peer.principals().collect::<Vec<_>>().join(", ")
    });
    let namespace = peer.and_then(Peer::namespace);
    let unnamed = || match peer {
        Some(_) => "an identity that is not of the form TD/ns/NS/sa/SA".to_owned(),
        None => none(),
    };
    let account = match (namespace, peer.and_then(Peer::service_account)) {
        (Some(namespace), Some(account)) => format!("{namespace}/{account}"),
        _ => unnamed(),
    };
    let mut out = Vec::new();
    check(
        &mut out,
        ["namespaces", "not_namespaces"],
        [&m.namespaces, &m.not_namespaces],
        &namespace.map_or_else(unnamed, str::to_owned),
        |v| namespace.is_some_and(|n| v.matches(n)),
    );
    check(
        &mut out,
        ["principals", "not_principals"],
        [&m.principals, &m.not_principals],
        &principals,
        |v| peer.is_some_and(|peer| peer.principals().any(|p| v.matches(p))),
    );
    check(
        &mut out,
        ["service_accounts", "not_service_accounts"],
        [
            &m.service_accounts.iter().map(Account).collect(),
            &m.not_service_accounts.iter().map(Account).collect(),
        ],
        &account,
        |v| peer.is_some_and(|peer| v.0.matches(peer)),
    );
    check(
        &mut out,
        ["source_ips", "not_source_ips"],
        [&m.source_ips, &m.not_source_ips],
        &connection.source.to_string(),
        |v| v.contains(connection.source),
    );
    check(
        &mut out,
        ["destination_ips", "not_destination_ips"],
        [&m.destination_ips, &m.not_destination_ips],
        &connection.destination.to_string(),
        |v| v.contains(connection.destination),
    );
    check(
        &mut out,
        ["destination_ports", "not_destination_ports"],
        [&m.destination_ports, &m.not_destination_ports],
        &connection.port.to_string(),
        |v| *v == connection.port,
    );
    out
}

/// A field and its `not_` twin.
fn check<T: ToString>(
    out: &mut Vec<Why>,
    names: [&'static str; 2],
    [values, not_values]: [&Vec<T>; 2],
    found: &str,
    holds: impl Fn(&T) -> bool,
) {
    let [name, not_name] = names;
    if !field(values, &[], &holds) {
        out.push(Why::NoneOf {
            field: name,
            values: values.iter().map(ToString::to_string).collect(),
            found: found.to_owned(),
        });
    }
    if let Some(value) = not_values.iter().find(|value| holds(value)) {
        out.push(Why::Excluded {
            field: not_name,
            value: value.to_string(),
            found: found.to_owned(),
        });
    }
}

struct Account<'a>(&'a crate::ServiceAccountMatch);

impl fmt::Display for Account<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0.namespace, self.0.service_account)
    }
}

/// Values that a message lists; the policy itself has them all.
const MOST_VALUES: usize = 5;

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::NoField => f.write_str("has no field that L4 can check: it never holds"),
            Why::NoneOf {
                field,
                values,
                found,
            } => {
                let listed: Vec<&str> = values
                    .iter()
                    .take(MOST_VALUES)
                    .map(String::as_str)
                    .collect();
                write!(f, "{field}: {found} is none of [{}", listed.join(", "))?;
                match values.len().saturating_sub(MOST_VALUES) {
                    0 => f.write_str("]"),
                    more => write!(f, ", and {more} more]"),
                }
            }
            Why::Excluded {
                field,
                value,
                found,
            } => write!(f, "{field}: {found} is excluded by {value}"),
        }
    }
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "clause {}, match {}: {}",
            self.clause, self.of_match, self.why
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::{Action, Clause, PolicyName, Rule, Scope, StringMatch};

    fn policy(matches: Vec<Match>) -> Policy {
        Policy {
            name: PolicyName::new("a", "p"),
            scope: Scope::Namespace,
            action: Action::Deny,
            dry_run: false,
            rules: vec![Rule {
                clauses: vec![Clause { matches }],
            }],
        }
    }

    fn connection(peer: Option<&Peer>) -> Connection<'_> {
        Connection {
            peer,
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.2".parse().unwrap(),
            port: 80,
        }
    }

    #[test]
    fn every_failing_field_is_named_with_what_was_found() {
        let one = Match {
            principals: vec!["td/ns/a/sa/b".parse().unwrap()],
            not_source_ips: vec!["10.0.0.0/8".parse().unwrap()],
            destination_ports: vec![80],
            ..Match::default()
        };
        let traced = trace(&policy(vec![one]), &connection(None));
        assert!(!traced[0].matches);
        let said: Vec<String> = traced[0].misses.iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "clause 0, match 0: principals: no identity (plaintext) is none of [td/ns/a/sa/b]",
                "clause 0, match 0: not_source_ips: 10.0.0.1 is excluded by 10.0.0.0/8",
            ]
        );
    }

    #[test]
    fn rule_that_matches_misses_nothing() {
        let peer: Peer = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let one = Match {
            principals: vec![StringMatch::Presence],
            ..Match::default()
        };
        let traced = trace(
            &policy(vec![Match::default(), one]),
            &connection(Some(&peer)),
        );
        assert_eq!((traced[0].matches, traced[0].misses.len()), (true, 0));
    }

    #[test]
    fn match_without_a_field_says_so_and_long_lists_are_cut() {
        let many = Match {
            destination_ports: (1..=9).collect(),
            ..Match::default()
        };
        let traced = trace(&policy(vec![Match::default(), many]), &connection(None));
        let said: Vec<String> = traced[0].misses.iter().map(ToString::to_string).collect();
        assert!(said[0].contains("never holds"), "{said:?}");
        assert!(said[1].ends_with("[1, 2, 3, 4, 5, and 4 more]"), "{said:?}");
    }
}
