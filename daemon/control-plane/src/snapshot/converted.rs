//! Policies that come from manifests, in their wire form.

use ringfence_policies::{
    Action, Cidr, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch,
};
use ringfence_xds::proto::security as wire;
use ringfence_xds::proto::security::string_match::MatchType;

pub(super) fn render(policy: &Policy) -> wire::Authorization {
    let scope = match policy.scope {
        Scope::Global => wire::Scope::Global,
        Scope::Namespace => wire::Scope::Namespace,
        Scope::WorkloadSelector => wire::Scope::WorkloadSelector,
    };
    let action = match policy.action {
        Action::Allow => wire::Action::Allow,
        Action::Deny => wire::Action::Deny,
    };
    wire::Authorization {
        name: policy.name.name.clone(),
        namespace: policy.name.namespace.clone(),
        scope: scope as i32,
        action: action as i32,
        rules: policy.rules.iter().map(rule).collect(),
        dry_run: policy.dry_run,
    }
}

fn rule(rule: &Rule) -> wire::Rule {
    let clause = |clause: &Clause| wire::Clause {
        matches: clause.matches.iter().map(one).collect(),
    };
    wire::Rule {
        clauses: rule.clauses.iter().map(clause).collect(),
    }
}

fn one(one: &Match) -> wire::Match {
    // Every field by name: a field added later does not compile until it is here.
    let Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        service_accounts,
        not_service_accounts,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
    } = one;
    wire::Match {
        namespaces: all(namespaces, string),
        not_namespaces: all(not_namespaces, string),
        principals: all(principals, string),
        not_principals: all(not_principals, string),
        service_accounts: all(service_accounts, account),
        not_service_accounts: all(not_service_accounts, account),
        source_ips: all(source_ips, cidr),
        not_source_ips: all(not_source_ips, cidr),
        destination_ips: all(destination_ips, cidr),
        not_destination_ips: all(not_destination_ips, cidr),
        destination_ports: all(destination_ports, |port| u32::from(*port)),
        not_destination_ports: all(not_destination_ports, |port| u32::from(*port)),
    }
}

fn all<T, W>(values: &[T], render: impl Fn(&T) -> W) -> Vec<W> {
    values.iter().map(render).collect()
}

fn string(pattern: &StringMatch) -> wire::StringMatch {
    let match_type = match pattern {
        StringMatch::Exact(text) => MatchType::Exact(text.clone()),
        StringMatch::Prefix(text) => MatchType::Prefix(text.clone()),
        StringMatch::Suffix(text) => MatchType::Suffix(text.clone()),
        StringMatch::Presence => MatchType::Presence(()),
    };
    wire::StringMatch {
        match_type: Some(match_type),
    }
}

fn account(account: &ServiceAccountMatch) -> wire::ServiceAccountMatch {
    wire::ServiceAccountMatch {
        namespace: account.namespace.clone(),
        service_account: account.service_account.clone(),
    }
}

fn cidr(cidr: &Cidr) -> wire::Address {
    wire::Address {
        address: super::address_bytes(&cidr.address()),
        length: cidr.prefix_length().into(),
    }
}
