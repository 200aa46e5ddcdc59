//! Istio's L4 semantics, row by row, through both evaluators: identities.

use ringfence_policies::{Match, ServiceAccountMatch};

use crate::harness::{from, matches, only, peer, ports, rule, strings};

const CART: &str = "spiffe://td/ns/shop/sa/cart";

#[test]
fn several_lists_of_one_dimension_are_anded_through_clauses() {
    let principals = |p: &str| Match {
        principals: strings(&[p]),
        ..Match::default()
    };
    let r = rule(vec![
        vec![principals("td/*")],
        vec![principals("*/sa/cart")],
    ]);
    for (id, expected) in [
        (CART, true),
        ("spiffe://td/ns/shop/sa/other", false),
        ("spiffe://td2/ns/shop/sa/cart", false),
    ] {
        assert_eq!(
            matches(r.clone(), &from(Some(&peer(id)), "10.1.0.1", 80)),
            expected,
            "{id}"
        );
    }
}

#[test]
fn identity_fields_match_what_they_say() {
    let cart = peer(CART);
    let c = from(Some(&cart), "10.1.0.1", 80);
    for (pattern, principal, namespace) in [
        ("td/ns/shop/sa/cart", true, false),
        ("td/ns/shop/sa/car", false, false),
        ("td/*", true, false),
        ("spiffe://td/*", false, false),
        ("*/cart", true, false),
        ("*shop", false, true),
        ("sho*", false, true),
        ("shop", false, true),
        ("*", true, true),
    ] {
        let (p, n) = (strings(&[pattern]), strings(&[pattern]));
        let yes = Match {
            principals: p.clone(),
            ..Match::default()
        };
        let not = Match {
            not_principals: p,
            ..Match::default()
        };
        assert_eq!(matches(only(yes), &c), principal, "principals {pattern}");
        assert_eq!(
            matches(only(not), &c),
            !principal,
            "not_principals {pattern}"
        );
        let yes = Match {
            namespaces: n.clone(),
            ..Match::default()
        };
        let not = Match {
            not_namespaces: n,
            ..Match::default()
        };
        assert_eq!(matches(only(yes), &c), namespace, "namespaces {pattern}");
        assert_eq!(
            matches(only(not), &c),
            !namespace,
            "not_namespaces {pattern}"
        );
    }
    for (ns, sa, expected) in [
        ("shop", "cart", true),
        ("shop", "other", false),
        ("other", "cart", false),
    ] {
        let account = vec![ServiceAccountMatch::new(ns, sa).unwrap()];
        let yes = Match {
            service_accounts: account.clone(),
            ..Match::default()
        };
        let not = Match {
            not_service_accounts: account,
            ..Match::default()
        };
        assert_eq!(matches(only(yes), &c), expected, "{ns}/{sa}");
        assert_eq!(matches(only(not), &c), !expected, "not {ns}/{sa}");
    }
}

#[test]
fn plaintext_matches_no_positive_identity_field_and_every_negative_one() {
    let c = from(None, "10.1.0.1", 80);
    let account = || vec![ServiceAccountMatch::new("shop", "cart").unwrap()];
    for pattern in ["*", "shop", "s*", "*p", "td/ns/shop/sa/cart"] {
        for (m, expected) in [
            (
                Match {
                    principals: strings(&[pattern]),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    not_principals: strings(&[pattern]),
                    ..Match::default()
                },
                true,
            ),
            (
                Match {
                    namespaces: strings(&[pattern]),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    not_namespaces: strings(&[pattern]),
                    ..Match::default()
                },
                true,
            ),
            (
                Match {
                    service_accounts: account(),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    not_service_accounts: account(),
                    ..Match::default()
                },
                true,
            ),
        ] {
            assert_eq!(matches(only(m.clone()), &c), expected, "{m:?}");
        }
    }
    assert!(
        matches(only(ports(&[80])), &c),
        "fields other than identity are compared"
    );
    let both = Match {
        principals: strings(&["*"]),
        not_principals: strings(&["x"]),
        ..Match::default()
    };
    assert!(!matches(only(both), &c));
}

#[test]
fn identity_of_another_shape_has_only_its_principal() {
    let vm = peer("spiffe://td/vm/web");
    let c = from(Some(&vm), "10.1.0.1", 80);
    for (m, expected) in [
        (
            Match {
                principals: strings(&["td/vm/web"]),
                ..Match::default()
            },
            true,
        ),
        (
            Match {
                principals: strings(&["*"]),
                ..Match::default()
            },
            true,
        ),
        (
            Match {
                namespaces: strings(&["*"]),
                ..Match::default()
            },
            false,
        ),
        (
            Match {
                not_namespaces: strings(&["shop"]),
                ..Match::default()
            },
            true,
        ),
    ] {
        assert_eq!(matches(only(m.clone()), &c), expected, "{m:?}");
    }
}

#[test]
fn peer_of_an_alias_trust_domain_is_meant_by_either_name() {
    // Renamed from `old` to `new`; the certificate has the new name.
    let renamed = peer("spiffe://new/ns/shop/sa/cart")
        .with_aliases(["old"])
        .unwrap();
    let not_renamed = peer("spiffe://new/ns/shop/sa/cart");
    for (pattern, with_alias, without) in [
        ("new/ns/shop/sa/cart", true, true),
        ("old/ns/shop/sa/cart", true, false),
        ("old/ns/shop/*", true, false),
        ("ol*", true, false),
        ("*/ns/shop/sa/cart", true, true),
        ("*old/ns/shop/sa/cart", true, false),
        ("*", true, true),
        ("old/ns/shop/sa/pay", false, false),
        ("older/ns/shop/sa/cart", false, false),
    ] {
        let positive = || Match {
            principals: strings(&[pattern]),
            ..Match::default()
        };
        let negative = || Match {
            not_principals: strings(&[pattern]),
            ..Match::default()
        };
        for (peer, expected) in [(&renamed, with_alias), (&not_renamed, without)] {
            let c = from(Some(peer), "10.1.0.1", 80);
            assert_eq!(matches(only(positive()), &c), expected, "{pattern}");
            assert_eq!(matches(only(negative()), &c), !expected, "not {pattern}");
        }
    }
    // Both names of one peer in the two lists of one match: excluded.
    let both = Match {
        principals: strings(&["new/*"]),
        not_principals: strings(&["old/*"]),
        ..Match::default()
    };
    assert!(!matches(
        only(both.clone()),
        &from(Some(&renamed), "10.1.0.1", 80)
    ));
    assert!(matches(
        only(both),
        &from(Some(&not_renamed), "10.1.0.1", 80)
    ));
}
