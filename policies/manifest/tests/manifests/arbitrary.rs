//! Whatever the text, reading and converting it ends, and only whole policies come out.

use std::path::Path;

use proptest::prelude::*;
use ringfence_manifest::{L7Handling, OtherKinds, convert, parse};
use ringfence_policies::Action;

use crate::harness::{ROOT, labels};

/// Anything that such a file can hold, right or wrong.
fn words() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => prop::sample::select(vec![
            "apiVersion", "kind", "metadata", "spec", "name", "namespace", "annotations",
            "selector", "matchLabels", "rules", "from", "to", "when", "source", "operation",
            "principals", "ipBlocks", "ports", "methods", "key", "values", "action", "mtls",
            "mode", "portLevelMtls", "items", "targetRef", "istio.io/dry-run", "status",
            "security.istio.io/v1", "v1", "AuthorizationPolicy", "PeerAuthentication", "List",
            "ALLOW", "DENY", "STRICT", "8080", "'80'", "10.0.0.0/8", "*", "source.ip", "true",
            "null", "~", "", "!!binary x", "&a", "*a", "<<", "? x", "- -", "%YAML 1.2",
        ]).prop_map(str::to_owned),
        1 => "\\PC{0,12}",
    ]
}

/// Text of such words, indented and punctuated at random.
fn soup() -> impl Strategy<Value = String> {
    let token = (
        0..5usize,
        words(),
        prop::sample::select(vec![
            ": ", "\n", ", ", "[", "]", "{", "}", "- ", "\n---\n", " ",
        ]),
    );
    prop::collection::vec(token, 0..60).prop_map(|tokens| {
        tokens
            .into_iter()
            .map(|(indent, word, mark)| format!("{}{word}{mark}", " ".repeat(indent)))
            .collect()
    })
}

/// A policy that is right but for one character.
fn nearly_right() -> impl Strategy<Value = String> {
    const GOOD: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a, namespace: b}\nspec:\n  action: DENY\n  selector: {matchLabels: {app: web}}\n  rules:\n  - from:\n    - source: {principals: ['*'], ipBlocks: [10.0.0.0/8], requestPrincipals: [x]}\n    to:\n    - operation: {ports: ['80'], methods: [GET]}\n    when:\n    - {key: source.ip, values: [10.0.0.1]}\n---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: a, namespace: b}\nspec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}}}\n";
    (0..GOOD.len(), any::<char>(), any::<bool>()).prop_map(|(at, with, insert)| {
        let (before, after) = GOOD.split_at(at);
        let after = if insert { after } else { &after[1..] };
        format!("{before}{with}{after}")
    })
}

fn check(text: &str) {
    for other in [OtherKinds::Skip, OtherKinds::Refuse] {
        match parse(text, Path::new("m.yaml"), other) {
            Err(errors) => {
                assert!(!errors.is_empty());
                let lines = text.lines().count() as u64 + 1;
                assert!(
                    errors.iter().all(|error| error.at.line <= lines),
                    "{errors:?}"
                );
            }
            Ok(manifests) => {
                for l7 in [L7Handling::IstioExact, L7Handling::DenyAsL4] {
                    let converted = convert(&manifests, ROOT, l7);
                    converted.attached("b", &labels("app=web"));
                    for policy in converted.policies() {
                        // A DENY rule never loses a list of alternatives to an empty clause,
                        // which would match everything.
                        let rules = &policy.policy.rules;
                        let mut clauses = rules.iter().flat_map(|rule| &rule.clauses);
                        assert!(clauses.all(|clause| !clause.matches.is_empty()));
                        if policy.policy.action == Action::Allow {
                            let mut matches = rules
                                .iter()
                                .flat_map(|r| &r.clauses)
                                .flat_map(|c| &c.matches);
                            assert!(matches.all(|one| !one.is_empty()));
                        }
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn any_text_ends_in_policies_or_errors(text in "\\PC{0,200}") {
        check(&text);
    }

    #[test]
    fn any_soup_of_words_ends_in_policies_or_errors(text in soup()) {
        check(&text);
    }

    #[test]
    fn any_typing_mistake_ends_in_policies_or_errors(text in nearly_right()) {
        check(&text);
    }
}
