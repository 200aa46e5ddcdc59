//! Explanations against the decisions that they explain, on generated policies.

use proptest::prelude::*;
use ringfence_policies::testing::small;
use ringfence_policies::{evaluate, trace};

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn rule_misses_something_exactly_when_it_does_not_match_and_the_first_match_decides(
        case in small(8)
    ) {
        for attempt in &case.attempts {
            let connection = attempt.connection();
            let decision = evaluate(&case.policies, &connection);
            for policy in &case.policies.policies {
                let rules = trace(policy, &connection);
                for rule in &rules {
                    prop_assert_eq!(rule.matches, rule.misses.is_empty(), "{:?}", rule);
                }
                if decision.policy.as_ref() == Some(&policy.name) && decision.rule.is_some() {
                    prop_assert_eq!(rules.iter().position(|r| r.matches), decision.rule);
                }
            }
        }
    }
}
