//! Differential test: reference and compiled tables on generated policies.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use ringfence_policies::testing::{Case, expected, many_cidrs, many_terms, pure_rule, small};
use ringfence_policies::{
    Action, CompiledSet, Decision, Policy, PolicyName, Reason, Scope, WorkloadPolicies, compile,
    compile_with_dry_run, evaluate_with_dry_run,
};

use crate::harness::{Kernel, addresses};

/// Pairs of (policies, connection) by what was decided: a generator whose policies all
/// deny everything would show.
type Counts = BTreeMap<&'static str, u64>;

/// Decided by one of more than 4 096 terms.
const BY_ONE_OF_MANY: &str = "by-one-of-many";

/// Holds the evaluators together on `cases` cases.
fn hold_together(cases: u32, of: impl Strategy<Value = Case>) -> Counts {
    let config = ProptestConfig {
        cases,
        source_file: Some(file!()),
        // Large cases take long to make smaller.
        max_shrink_time: 30_000,
        ..ProptestConfig::default()
    };
    let counts = RefCell::new(Counts::new());
    let run = TestRunner::new(config).run(&of, |case| {
        let compiled = compile(&case.policies, addresses());
        for decision in agreed(&case, &compiled)? {
            let count = &mut *counts.borrow_mut();
            *count.entry(decision.reason.as_str()).or_default() += 1;
            if compiled.terms.len() > 4096 && decision.rule.is_some() {
                *count.entry(BY_ONE_OF_MANY).or_default() += 1;
            }
        }
        Ok(())
    });
    if let Err(error) = run {
        panic!("{error}");
    }
    let counts = counts.into_inner();
    println!("{counts:?}");
    counts
}

/// The decisions of both evaluators, which must be the same ones.
fn agreed(case: &Case, compiled: &CompiledSet) -> Result<Vec<Decision>, TestCaseError> {
    let mut kernel = Kernel::of(compiled);
    case.attempts
        .iter()
        .map(|attempt| {
            let decision = kernel.decision(&attempt.connection());
            let reference = expected(&case.policies, compiled, attempt);
            prop_assert_eq!(reference, decision.clone(), "{:?}", attempt);
            Ok(decision)
        })
        .collect()
}

/// At least one in `one_in` pairs was decided so, for each reason.
fn assert_common(counts: &Counts, one_in: u64, reasons: &[Reason]) {
    let pairs: u64 = counts.values().sum();
    for reason in reasons {
        let count = counts.get(reason.as_str()).copied().unwrap_or(0);
        assert!(count * one_in > pairs, "{reason:?}: {counts:?}");
    }
}

#[test]
fn compiled_tables_decide_as_the_reference_does() {
    let counts = hold_together(6400, small(16));
    assert!(counts.values().sum::<u64>() > 100_000);
    use Reason::*;
    let reasons = [Allowed, Denied, NotAllowed, NoAllowPolicy, PlaintextRefused];
    assert_common(&counts, 100, &reasons);
}

#[test]
fn sets_of_many_terms_decide_as_the_reference_does() {
    let counts = hold_together(48, many_terms(32));
    assert_common(
        &counts,
        50,
        &[Reason::Allowed, Reason::Denied, Reason::NotAllowed],
    );
    assert!(counts.contains_key(BY_ONE_OF_MANY), "{counts:?}");
}

#[test]
fn sets_of_many_prefixes_decide_as_the_reference_does() {
    let counts = hold_together(120, many_cidrs(64));
    assert_common(
        &counts,
        50,
        &[Reason::Allowed, Reason::Denied, Reason::NotAllowed],
    );
}

fn one_policy(action: Action, rules: Vec<ringfence_policies::Rule>) -> WorkloadPolicies {
    let policy = Policy {
        name: PolicyName::new("a", "p"),
        scope: Scope::Namespace,
        action,
        dry_run: false,
        rules,
    };
    WorkloadPolicies {
        policies: vec![Arc::new(policy)],
        ..WorkloadPolicies::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// One policy with one rule, where nothing hides what the rule decides.
    #[test]
    fn single_rule_decides_as_the_reference_does(
        action in prop::sample::select(&[Action::Allow, Action::Deny][..]),
        rule in ringfence_policies::testing::rule(),
        case in small(16),
    ) {
        let case = Case { policies: one_policy(action, vec![rule]), ..case };
        agreed(&case, &compile(&case.policies, addresses()))?;
    }

    /// However many matches its clauses have.
    #[test]
    fn rule_of_clauses_about_one_dimension_each_is_one_term_at_most(
        rule in pure_rule(),
        case in small(16),
    ) {
        let inert = rule.clauses.iter().any(|clause| {
            !clause.matches.is_empty() && clause.matches.iter().all(|m| m.is_empty())
        });
        let case = Case { policies: one_policy(Action::Deny, vec![rule]), ..case };
        let compiled = compile(&case.policies, addresses());
        prop_assert_eq!(compiled.terms.len(), usize::from(!inert));
        agreed(&case, &compiled)?;
    }

    /// What a dry run would have decided, from the compiled form too.
    #[test]
    fn dry_run_policies_compile_to_what_the_reference_reports(case in small(16)) {
        let would = compile_with_dry_run(&case.policies, addresses());
        for attempt in &case.attempts {
            let reference = evaluate_with_dry_run(&case.policies, &attempt.connection());
            let compiled = would.as_ref().map(|would| {
                Kernel::of(would).decision(&attempt.connection())
            });
            prop_assert_eq!(reference, compiled, "{:?}", attempt);
        }
    }
}
