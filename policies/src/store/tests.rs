#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::{Action, ValueError};

fn policy(name: &str, scope: Scope) -> Policy {
    Policy {
        name: name.parse().unwrap(),
        scope,
        action: Action::Allow,
        dry_run: false,
        rules: Vec::new(),
    }
}

fn rejected(name: &str, scope: Option<Scope>) -> RejectedPolicy {
    let name: PolicyName = name.parse().unwrap();
    let error = ValueError::Port(70000).at(&name, "destination_ports");
    RejectedPolicy {
        name,
        scope,
        dry_run: false,
        error,
    }
}

fn names(applicable: &WorkloadPolicies) -> Vec<String> {
    applicable
        .policies
        .iter()
        .map(|p| p.name.to_string())
        .collect()
}

const NAMES_NONE: [&str; 0] = [];

#[test]
fn workload_gets_global_namespace_and_named_policies_only() {
    let mut store = PolicyStore::new("root");
    store.insert(policy("root/everywhere", Scope::Global));
    store.insert(policy("a/all", Scope::Namespace));
    store.insert(policy("a/chosen", Scope::WorkloadSelector));
    store.insert(policy("a/other", Scope::WorkloadSelector));
    store.insert(policy("b/all", Scope::Namespace));

    let of_a = store.applicable("a", ["a/chosen", "a/all", "a/chosen"]);
    assert_eq!(names(&of_a), ["a/all", "a/chosen", "root/everywhere"]);
    assert_eq!(
        names(&store.applicable("b", NAMES_NONE)),
        ["b/all", "root/everywhere"]
    );
    assert_eq!(
        names(&store.applicable("c", NAMES_NONE)),
        ["root/everywhere"]
    );
    assert!(of_a.missing.is_empty() && of_a.mode == Mode::Permissive);
}

#[test]
fn changed_scope_and_removal_leave_nothing_behind() {
    let mut store = PolicyStore::new("root");
    store.insert(policy("a/p", Scope::Namespace));
    store.insert(policy("a/p", Scope::WorkloadSelector));
    assert!(names(&store.applicable("a", NAMES_NONE)).is_empty());
    assert_eq!(names(&store.applicable("a", ["a/p"])), ["a/p"]);
    assert!(store.remove(&"a/p".parse().unwrap()));
    assert!(!store.remove(&"a/p".parse().unwrap()));
    assert_eq!(store.applicable("a", ["a/p"]).missing, ["a/p"]);
}

#[test]
fn static_strict_is_known_by_name_in_the_root_namespace_only() {
    let store = PolicyStore::new("root");
    let strict = store.applicable("a", ["root/istio_converted_static_strict"]);
    assert_eq!((strict.mode, strict.missing.len()), (Mode::Strict, 0));

    let impostor = store.applicable("a", ["a/istio_converted_static_strict"]);
    assert_eq!(impostor.mode, Mode::Permissive);
    assert_eq!(impostor.missing, ["a/istio_converted_static_strict"]);
}

#[test]
fn static_strict_that_arrives_stays_strict() {
    let mut store = PolicyStore::new("root");
    store.insert(policy(
        "root/istio_converted_static_strict",
        Scope::WorkloadSelector,
    ));
    let named = store.applicable("a", ["root/istio_converted_static_strict"]);
    assert_eq!(named.mode, Mode::Strict);
    assert_eq!(store.applicable("a", NAMES_NONE).mode, Mode::Permissive);
}

#[test]
fn named_policy_that_never_came_is_missing_whatever_its_name() {
    let store = PolicyStore::new("root");
    let applicable = store.applicable("a", ["a/late", "no-slash", ""]);
    assert_eq!(applicable.missing, ["", "a/late", "no-slash"]);
}

#[test]
fn rejected_policy_closes_the_workloads_it_applies_to_and_no_others() {
    let mut store = PolicyStore::new("root");
    store.insert_rejected(rejected("a/p", Some(Scope::Namespace)));
    assert_eq!(store.applicable("a", NAMES_NONE).rejected.len(), 1);
    assert!(store.applicable("b", NAMES_NONE).rejected.is_empty());
    // It did arrive, so it is not missing.
    assert!(store.applicable("b", ["a/p"]).missing.is_empty());

    store.insert(policy("a/p", Scope::Namespace));
    assert!(store.applicable("a", NAMES_NONE).rejected.is_empty());
}

#[test]
fn rejected_policy_of_unknown_scope_takes_the_widest_of_its_namespace() {
    let mut store = PolicyStore::new("root");
    store.insert_rejected(rejected("a/p", None));
    assert_eq!(store.applicable("a", NAMES_NONE).rejected.len(), 1);
    assert!(store.applicable("b", NAMES_NONE).rejected.is_empty());
    store.insert_rejected(rejected("root/p", None));
    assert_eq!(store.applicable("b", NAMES_NONE).rejected.len(), 1);
}

#[test]
fn rejected_dry_run_policy_closes_nothing() {
    let mut store = PolicyStore::new("root");
    store.insert_rejected(RejectedPolicy {
        dry_run: true,
        ..rejected("a/p", Some(Scope::Namespace))
    });
    assert_eq!(store.applicable("a", ["a/p"]), WorkloadPolicies::default());
}

fn put(store: &mut PolicyStore, policy: Policy) -> Affected {
    store.apply([PolicyChange::Put(policy)])
}

fn affected(all: bool, namespaces: &[&str], names: &[&str]) -> Affected {
    let set = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    Affected {
        all,
        namespaces: set(namespaces),
        names: set(names),
    }
}

#[test]
fn change_concerns_the_scope_before_and_after_it() {
    let mut store = PolicyStore::new("root");
    let wide = policy("root/p", Scope::Global);
    assert_eq!(
        put(&mut store, wide.clone()),
        affected(true, &[], &["root/p"])
    );
    assert!(put(&mut store, wide).is_empty(), "nothing changed");
    assert_eq!(
        put(&mut store, policy("root/p", Scope::Namespace)),
        affected(true, &["root"], &["root/p"])
    );
    assert_eq!(
        put(&mut store, policy("root/p", Scope::WorkloadSelector)),
        affected(false, &["root"], &["root/p"])
    );
    let removed = PolicyChange::Remove("root/p".parse().unwrap());
    assert_eq!(
        store.apply([removed.clone()]),
        affected(false, &[], &["root/p"])
    );
    assert!(store.apply([removed]).is_empty());
    assert!(store.is_empty());
}

#[test]
fn change_concerns_those_whose_policies_it_changes_and_no_others() {
    let mut store = PolicyStore::new("root");
    let of_a = put(&mut store, policy("a/p", Scope::Namespace));
    assert!(of_a.concerns("a", NAMES_NONE) && of_a.concerns("b", ["x/y", "a/p"]));
    assert!(!of_a.concerns("b", ["b/p"]) && !of_a.concerns("ab", NAMES_NONE));
    let everywhere = put(&mut store, policy("root/p", Scope::Global));
    assert!(everywhere.concerns("b", NAMES_NONE));

    let mut both = of_a;
    both.merge(put(&mut store, policy("b/q", Scope::WorkloadSelector)));
    assert_eq!(both, affected(false, &["a"], &["a/p", "b/q"]));
}

#[test]
fn rejected_policy_of_unknown_scope_concerns_the_widest() {
    let mut store = PolicyStore::new("root");
    let mut reject = |name| store.apply([PolicyChange::Reject(rejected(name, None))]);
    assert_eq!(reject("a/p"), affected(false, &["a"], &["a/p"]));
    assert_eq!(reject("root/p"), affected(true, &[], &["root/p"]));
    // It takes the place of a usable one and gives it back.
    put(&mut store, policy("root/p", Scope::WorkloadSelector));
    assert!(store.applicable("a", NAMES_NONE).rejected[0].name.namespace == "a");
    assert_eq!(store.applicable("b", NAMES_NONE), Default::default());
}

/// An answer may change only for whom the change concerns.
#[test]
fn whoever_a_change_does_not_concern_keeps_the_same_policies() {
    let mut store = PolicyStore::new("root");
    let workloads = [
        ("a", vec![]),
        ("a", vec!["a/s", "b/s"]),
        ("b", vec!["a/n"]),
        ("c", vec!["b/s", "root/istio_converted_static_strict"]),
        ("root", vec!["root/g"]),
    ];
    let answers = |store: &PolicyStore| -> Vec<WorkloadPolicies> {
        workloads
            .iter()
            .map(|(namespace, named)| store.applicable(namespace, named))
            .collect()
    };
    let mut changes = Vec::new();
    for name in [
        "a/s",
        "b/s",
        "a/n",
        "root/g",
        "root/istio_converted_static_strict",
    ] {
        for scope in [Scope::WorkloadSelector, Scope::Namespace, Scope::Global] {
            changes.push(PolicyChange::Put(policy(name, scope)));
            changes.push(PolicyChange::Reject(rejected(name, Some(scope))));
        }
        changes.push(PolicyChange::Reject(rejected(name, None)));
        changes.push(PolicyChange::Remove(name.parse().unwrap()));
    }
    let mut kept = 0;
    // Every change after every other one.
    for first in &changes {
        for second in &changes {
            for change in [first, second] {
                let before = answers(&store);
                let affected = store.apply([change.clone()]);
                for ((namespace, named), (before, after)) in
                    workloads.iter().zip(before.iter().zip(answers(&store)))
                {
                    if !affected.concerns(namespace, named) {
                        assert!(before.same(&after), "{change:?} {namespace} {named:?}");
                        kept += 1;
                    }
                }
            }
        }
    }
    assert!(kept > 1000, "{kept}");
}

#[test]
fn policies_are_the_same_until_one_is_exchanged() {
    let mut store = PolicyStore::new("root");
    put(&mut store, policy("a/p", Scope::Namespace));
    let before = store.applicable("a", NAMES_NONE);
    assert!(before.same(&store.applicable("a", ["a/p"])));
    // Said again as it was, as after every reconnect.
    put(&mut store, policy("a/p", Scope::Namespace));
    assert!(before.same(&store.applicable("a", NAMES_NONE)));
    for other in [
        store.applicable("b", NAMES_NONE),
        store.applicable("a", ["a/late"]),
        store.applicable("a", ["root/istio_converted_static_strict"]),
    ] {
        assert!(!before.same(&other), "{other:?}");
    }
    // Equal content that is somewhere else is not the same: it has to be compiled.
    store.remove(&"a/p".parse().unwrap());
    put(&mut store, policy("a/p", Scope::Namespace));
    let again = store.applicable("a", NAMES_NONE);
    assert!(before == again && !before.same(&again));
}
