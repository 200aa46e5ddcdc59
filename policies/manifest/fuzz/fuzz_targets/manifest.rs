//! Whatever the text, reading and converting it ends, and no clause is left without a
//! match: such a clause would match everything.
#![no_main]

use std::collections::BTreeMap;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use ringfence_manifest::{L7Handling, OtherKinds, convert, parse};

fuzz_target!(|text: &str| {
    let Ok(manifests) = parse(text, Path::new("m.yaml"), OtherKinds::Skip) else {
        return;
    };
    for l7 in [L7Handling::IstioExact, L7Handling::DenyAsL4] {
        let converted = convert(&manifests, "istio-system", l7);
        for policy in converted.policies() {
            let mut clauses = policy.policy.rules.iter().flat_map(|rule| &rule.clauses);
            assert!(clauses.all(|clause| !clause.matches.is_empty()));
            let labels = policy.selector.as_ref().map(|s| s.labels().clone());
            let labels = labels.unwrap_or_else(BTreeMap::new);
            converted.attached(&policy.policy.name.namespace, &labels);
        }
        for warning in &converted.warnings {
            assert!(!warning.to_string().is_empty());
        }
    }
});
