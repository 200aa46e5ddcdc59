//! One `AuthorizationPolicy`. Follows `convertAuthorizationPolicy` and `handleRule` of
//! Istiod's `ambient/authorization.go`.

use ringfence_policies::{Action, Clause, Policy, Rule, Scope};

use super::{ConvertedPolicy, L7Handling};
use crate::model::{self, AuthorizationPolicy, Condition};
use crate::node::Spot;
use crate::{LostCondition, NotSent, Place, Warning, WarningKind};

/// `None`: it has no part at L4, which is warned about.
pub(super) fn convert(
    source: &AuthorizationPolicy,
    root_namespace: &str,
    l7: L7Handling,
    warnings: &mut Vec<Warning>,
) -> Option<ConvertedPolicy> {
    let mut warn = |at: Spot, field: &str, kind: WarningKind| {
        warnings.push(Warning {
            at: Place {
                line: at.line,
                column: at.column,
                ..source.at.clone()
            },
            resource: format!("AuthorizationPolicy {}", source.name),
            field: field.to_owned(),
            kind,
        });
    };
    if let Some((field, at)) = source.target {
        let kind = WarningKind::NotSent(NotSent::TargetRef);
        warn(at, &format!("spec.{field}"), kind);
        return None;
    }
    let action = match source.action {
        model::Action::Allow => Action::Allow,
        model::Action::Deny => Action::Deny,
        model::Action::Audit => {
            warn(
                source.action_at,
                "spec.action",
                WarningKind::NotSent(NotSent::Audit),
            );
            return None;
        }
        model::Action::Custom => {
            warn(
                source.action_at,
                "spec.action",
                WarningKind::NotSent(NotSent::Custom),
            );
            return None;
        }
    };
    let scope = if source.selector.is_some() {
        Scope::WorkloadSelector
    } else if source.name.namespace == root_namespace {
        Scope::Global
    } else {
        Scope::Namespace
    };

    let mut rules = Vec::new();
    for rule in &source.rules {
        let (converted, lost) = match action {
            Action::Allow => allow(rule),
            Action::Deny => deny(rule, l7),
        };
        rules.extend(converted);
        for (field, at, lost) in lost {
            warn(at, field, WarningKind::Lost(lost));
        }
    }
    if action == Action::Allow && rules.is_empty() && !source.rules.is_empty() {
        let at = Spot {
            line: source.at.line,
            column: source.at.column,
        };
        warn(at, "spec.rules", WarningKind::NoRuleLeft);
    }
    Some(ConvertedPolicy {
        policy: Policy {
            name: source.name.clone(),
            scope,
            action,
            dry_run: source.dry_run,
            rules,
        },
        selector: source.selector.clone(),
        from: source.at.clone(),
    })
}

/// What a condition that is lost does to its rule.
type Losses<'a> = Vec<(&'a str, Spot, LostCondition)>;

/// The rule is kept whole or not at all: without a condition it would admit more.
fn allow(rule: &model::Rule) -> (Option<Rule>, Losses<'_>) {
    let conditions = [&rule.to, &rule.from, &rule.when];
    let lost = conditions.into_iter().flatten().flat_map(|c| &c.lost);
    let losses: Losses<'_> = lost
        .map(|lost| (lost.field.as_str(), lost.at, LostCondition::AllowRule))
        .collect();
    let kept = losses.is_empty().then(|| Rule {
        clauses: clauses(rule).map(|clause| exact(&clause)).collect(),
    });
    (kept, losses)
}

fn deny(rule: &model::Rule, l7: L7Handling) -> (Option<Rule>, Losses<'_>) {
    let mut losses = Vec::new();
    let mut kept = Vec::new();
    let inert = clauses(rule).any(|clause| clause.iter().all(|c| c.l4.is_empty()));
    for clause in clauses(rule) {
        for condition in &clause {
            let effect = match l7 {
                L7Handling::DenyAsL4 => LostCondition::DenyWidened,
                L7Handling::IstioExact if inert => LostCondition::DenyRuleInert,
                L7Handling::IstioExact if condition.l4.is_empty() => {
                    LostCondition::DenyAlternativeInert
                }
                L7Handling::IstioExact => LostCondition::DenyWidened,
            };
            let lost = condition.lost.iter();
            losses.extend(lost.map(|lost| (lost.field.as_str(), lost.at, effect)));
        }
        match l7 {
            L7Handling::IstioExact => kept.push(exact(&clause)),
            // An alternative of which nothing is left holds always, and so does the clause.
            L7Handling::DenyAsL4 if clause.iter().any(|c| c.l4.is_empty()) => {}
            L7Handling::DenyAsL4 => kept.push(exact(&clause)),
        }
    }
    (Some(Rule { clauses: kept }), losses)
}

/// The lists of alternatives of which one must hold each: `to`, `from`, and one for each
/// `when`.
fn clauses(rule: &model::Rule) -> impl Iterator<Item = Vec<&Condition>> {
    let lists = [&rule.to, &rule.from].into_iter();
    let lists = lists
        .filter(|list| !list.is_empty())
        .map(|list| list.iter().collect());
    lists.chain(rule.when.iter().map(|condition| vec![condition]))
}

/// A condition with no part at L4 becomes a match without a field, which never holds.
fn exact(clause: &[&Condition]) -> Clause {
    Clause {
        matches: clause.iter().map(|c| c.l4.clone()).collect(),
    }
}
