//! Authorization policies from the wire form. A value that cannot be used makes the
//! policy a rejected one, which closes the workloads it applies to: nothing is dropped.

use ringfence_policies::{
    Action, Cidr, Clause, Match, Policy, PolicyError, PolicyName, RejectedPolicy, Rule, Scope,
    ServiceAccountMatch, StringMatch, ValueError, port,
};
use ringfence_xds::proto::security as wire;
use ringfence_xds::proto::security::string_match::MatchType;

/// Converts one policy.
pub fn policy(wire: &wire::Authorization) -> Result<Policy, Box<RejectedPolicy>> {
    let name = PolicyName::new(&wire.namespace, &wire.name);
    let scope = Scope::from_wire(wire.scope);
    let rejected = |error: PolicyError| {
        Box::new(RejectedPolicy {
            name: name.clone(),
            scope: scope.clone().ok(),
            dry_run: wire.dry_run,
            error,
        })
    };
    let build = || -> Result<Policy, PolicyError> {
        let rules = wire.rules.iter().enumerate().map(|(r, rule)| {
            let clauses = rule.clauses.iter().enumerate().map(|(c, clause)| {
                let matches = clause.matches.iter().enumerate().map(|(m, one)| {
                    let path = format!("rules[{r}].clauses[{c}].matches[{m}]");
                    convert_match(one, &name, &path)
                });
                Ok(Clause {
                    matches: matches.collect::<Result<_, PolicyError>>()?,
                })
            });
            Ok(Rule {
                clauses: clauses.collect::<Result<_, PolicyError>>()?,
            })
        });
        Ok(Policy {
            scope: scope.clone().map_err(|e| e.at(&name, "scope"))?,
            action: Action::from_wire(wire.action).map_err(|e| e.at(&name, "action"))?,
            dry_run: wire.dry_run,
            rules: rules.collect::<Result<_, PolicyError>>()?,
            name: name.clone(),
        })
    };
    build().map_err(rejected)
}

fn convert_match(
    wire: &wire::Match,
    policy: &PolicyName,
    path: &str,
) -> Result<Match, PolicyError> {
    let field = Field { policy, path };
    Ok(Match {
        namespaces: field.list("namespaces", &wire.namespaces, string)?,
        not_namespaces: field.list("not_namespaces", &wire.not_namespaces, string)?,
        principals: field.list("principals", &wire.principals, string)?,
        not_principals: field.list("not_principals", &wire.not_principals, string)?,
        service_accounts: field.list("service_accounts", &wire.service_accounts, account)?,
        not_service_accounts: field.list(
            "not_service_accounts",
            &wire.not_service_accounts,
            account,
        )?,
        source_ips: field.list("source_ips", &wire.source_ips, cidr)?,
        not_source_ips: field.list("not_source_ips", &wire.not_source_ips, cidr)?,
        destination_ips: field.list("destination_ips", &wire.destination_ips, cidr)?,
        not_destination_ips: field.list("not_destination_ips", &wire.not_destination_ips, cidr)?,
        destination_ports: field
            .list("destination_ports", &wire.destination_ports, |p| port(*p))?,
        not_destination_ports: field.list(
            "not_destination_ports",
            &wire.not_destination_ports,
            |p| port(*p),
        )?,
    })
}

/// Where a value stands, for its error.
struct Field<'a> {
    policy: &'a PolicyName,
    path: &'a str,
}

impl Field<'_> {
    fn list<W, T>(
        &self,
        name: &str,
        values: &[W],
        convert: impl Fn(&W) -> Result<T, ValueError>,
    ) -> Result<Vec<T>, PolicyError> {
        let at = |i: usize| format!("{}.{name}[{i}]", self.path);
        values
            .iter()
            .enumerate()
            .map(|(i, v)| convert(v).map_err(|e| e.at(self.policy, at(i))))
            .collect()
    }
}

fn string(wire: &wire::StringMatch) -> Result<StringMatch, ValueError> {
    match &wire.match_type {
        Some(MatchType::Exact(text)) => StringMatch::exact(text),
        Some(MatchType::Prefix(text)) => StringMatch::prefix(text),
        Some(MatchType::Suffix(text)) => StringMatch::suffix(text),
        Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
        None => Err(ValueError::NoMatchKind),
    }
}

fn account(wire: &wire::ServiceAccountMatch) -> Result<ServiceAccountMatch, ValueError> {
    ServiceAccountMatch::new(&wire.namespace, &wire.service_account)
}

fn cidr(wire: &wire::Address) -> Result<Cidr, ValueError> {
    Cidr::from_bytes(&wire.address, wire.length)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn with(one: wire::Match) -> wire::Authorization {
        wire::Authorization {
            name: "p".into(),
            namespace: "demo".into(),
            rules: vec![wire::Rule {
                clauses: vec![wire::Clause { matches: vec![one] }],
            }],
            ..Default::default()
        }
    }

    #[test]
    fn good_policy_keeps_every_value() {
        let one = wire::Match {
            source_ips: vec![wire::Address {
                address: vec![10, 0, 0, 0],
                length: 8,
            }],
            destination_ports: vec![80, 65535],
            ..Default::default()
        };
        let policy = policy(&with(one)).unwrap();
        let one = &policy.rules[0].clauses[0].matches[0];
        assert_eq!(one.destination_ports, [80, 65535]);
        assert_eq!(one.source_ips.len(), 1);
    }

    #[test]
    fn cidr_that_does_not_parse_rejects_the_policy_and_says_where() {
        let one = wire::Match {
            source_ips: vec![wire::Address {
                address: vec![10, 0, 0],
                length: 8,
            }],
            ..Default::default()
        };
        let rejected = policy(&with(one)).unwrap_err();
        assert!(
            rejected
                .error
                .to_string()
                .contains("rules[0].clauses[0].matches[0].source_ips[0]")
        );
    }

    #[test]
    fn port_is_not_cut_to_16_bits() {
        let one = wire::Match {
            destination_ports: vec![65616],
            ..Default::default()
        };
        assert!(policy(&with(one)).is_err());
    }
}
