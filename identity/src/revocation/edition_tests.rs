//! An older edition of a list never replaces a newer one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, SystemTime};

use super::*;
use crate::testing::{CaParams, CrlParams, TestCa, pem};

/// Lists of `td` from one file, as serial numbers they revoke.
struct Used(RevocationLists, TrustDomain);

impl Used {
    fn new() -> Self {
        Self(RevocationLists::new(), TrustDomain::parse("td").unwrap())
    }

    fn replace(&self, content: &[u8]) -> Result<bool, CrlError> {
        self.0.replace("file", &self.1, content)
    }

    /// Issuer and number of revoked certificates of each list.
    fn now(&self) -> Vec<(String, usize)> {
        let mut all: Vec<_> = self
            .0
            .snapshot()
            .into_iter()
            .map(|s| (s.issuer, s.revoked))
            .collect();
        all.sort();
        all
    }
}

fn edition(number: u64, age: u64, revoked: &[u8]) -> CrlParams {
    CrlParams {
        number,
        this_update: SystemTime::now() - Duration::from_secs(age),
        revoked: revoked.iter().map(|serial| vec![*serial]).collect(),
        ..CrlParams::default()
    }
}

#[test]
fn a_lower_number_is_refused_by_name_and_the_newer_list_stays() {
    let (ca, used) = (TestCa::new("td"), Used::new());
    let list = |number, age, revoked: &[u8]| ca.crl(0, &edition(number, age, revoked));
    assert!(used.replace(&list(256, 100, &[1, 2])).unwrap());
    // The number decides, whatever the date.
    let error = used.replace(&list(255, 0, &[])).unwrap_err();
    assert!(matches!(error.problem, CrlProblem::Older { .. }), "{error}");
    let text = error.to_string();
    for part in [
        "trust domain td from file",
        "CN=root of td",
        "0xff,",
        "0x0100,",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(used.now(), [("CN=root of td".to_owned(), 2)]);
    // The same again is no change, a higher number is.
    assert!(used.replace(&list(257, 200, &[1, 2, 3])).unwrap());
    assert_eq!(used.now()[0].1, 3);
}

#[test]
fn with_equal_numbers_the_date_decides() {
    let (ca, used) = (TestCa::new("td"), Used::new());
    let list = |age, revoked: &[u8]| ca.crl(0, &edition(7, age, revoked));
    used.replace(&list(50, &[1])).unwrap();
    used.replace(&list(60, &[])).unwrap_err();
    assert_eq!(used.now()[0].1, 1);
    assert!(used.replace(&list(40, &[1, 2])).unwrap());
    assert_eq!(used.now()[0].1, 2);
}

#[test]
fn beside_a_stale_list_the_others_of_the_content_are_taken() {
    let ca = TestCa::new("td").with_intermediate(&CaParams::default());
    let used = Used::new();
    let both = |root: u64, intermediate: u64, revoked: &[u8]| {
        let of = |level, number| pem("X509 CRL", &ca.crl(level, &edition(number, 10, revoked)));
        of(0, root) + &of(1, intermediate)
    };
    used.replace(both(5, 5, &[]).as_bytes()).unwrap();
    let error = used.replace(both(4, 6, &[9]).as_bytes()).unwrap_err();
    assert!(error.to_string().contains("CN=root of td"), "{error}");
    let intermediate = ("CN=intermediate 0 of td".to_owned(), 1);
    assert_eq!(used.now(), [intermediate, ("CN=root of td".to_owned(), 0)]);
    // An old edition beside its successor replaces nothing.
    let list = |number| pem("X509 CRL", &ca.crl(0, &edition(number, 10, &[])));
    used.replace((list(4) + &list(6)).as_bytes()).unwrap();
    used.replace((list(4) + &list(3)).as_bytes()).unwrap_err();
    assert_eq!(used.now(), [("CN=root of td".to_owned(), 0)]);
}

#[test]
fn keys_of_one_issuer_name_number_their_lists_apart() {
    let (old, new, used) = (TestCa::new("td"), TestCa::new("td"), Used::new());
    used.replace(&old.crl(0, &edition(900, 10, &[1]))).unwrap();
    assert!(used.replace(&new.crl(0, &edition(1, 500, &[]))).unwrap());
    assert_eq!(used.now()[0].1, 0);
}

#[test]
fn each_source_has_its_own_editions_and_forgets_them_when_it_is_removed() {
    let (ca, used) = (TestCa::new("td"), Used::new());
    let (old, new) = (
        ca.crl(0, &edition(1, 10, &[])),
        ca.crl(0, &edition(2, 10, &[1])),
    );
    used.replace(&new).unwrap();
    // Both are asked: what the newer one revokes stays revoked.
    assert!(used.0.replace("second", &used.1, &old).unwrap());
    assert_eq!(used.now().len(), 2);
    used.0.remove("file", &used.1);
    assert!(used.replace(&old).unwrap());
}
