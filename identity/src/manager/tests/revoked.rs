//! SVIDs of our own that a revocation list takes back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::testing::CrlParams;

impl Setup {
    fn publish(&self, params: &CrlParams) {
        let list = self.source.ca.lock().unwrap().crl(0, params);
        let domain = cart().trust_domain().clone();
        self.lists.replace("file", &domain, &list).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_revoked_svid_is_not_presented_and_another_is_fetched_at_once() {
    let setup = Setup::new();
    let other = workload("td", "shop", "other");
    setup.manager.want(&cart());
    setup.manager.want(&other);
    let revoked = setup.ready(&cart()).await.unwrap();
    let kept = setup.ready(&other).await.unwrap();
    setup.publish(&CrlParams::default());
    pass(seconds(1)).await;
    assert_eq!(
        setup.asked(),
        2,
        "a list that revokes nobody changes nothing"
    );
    assert_eq!(setup.status(&cart()).state, SvidState::Ready);

    let mut events = setup.manager.subscribe();
    *setup.source.delay.lock().unwrap() = seconds(5);
    setup.publish(&CrlParams::revoking([&revoked.chain()[0]]));
    pass(seconds(1)).await;
    let error = setup.manager.current(&cart()).unwrap_err();
    assert_eq!(error.as_str(), "revoked");
    assert!(error.to_string().contains(revoked.serial()), "{error}");
    let status = setup.status(&cart());
    assert_eq!(status.state, SvidState::Revoked);
    assert_eq!(status.serial.as_deref(), Some(revoked.serial()));
    match events.try_recv().unwrap() {
        SvidEvent::Revoked { identity, svid } if identity == cart() => {
            assert!(Arc::ptr_eq(&svid, &revoked));
        }
        event => panic!("{event:?}"),
    }
    let current = setup.manager.current(&other).unwrap();
    assert!(Arc::ptr_eq(&current, &kept), "nobody else is affected");

    let next = setup.ready(&cart()).await.unwrap();
    assert_ne!(next.serial(), revoked.serial());
    assert_eq!(setup.status(&cart()).state, SvidState::Ready);
    assert_eq!(setup.asked(), 3, "and only for the one that was revoked");
    assert!(matches!(events.try_recv(), Ok(SvidEvent::Renewed { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_revoked_answer_is_refused_and_what_was_valid_stays() {
    let setup = Setup::new();
    setup.manager.want(&cart());
    let good = setup.ready(&cart()).await.unwrap();
    // The source has one SVID only, and it is taken back before it is delivered.
    *setup.source.fixed_serial.lock().unwrap() = Some(vec![0x5e, 0xed]);
    let doomed = CrlParams {
        revoked: vec![vec![0x5e, 0xed]],
        ..CrlParams::default()
    };
    setup.publish(&doomed);
    pass(seconds(700)).await;
    let current = setup.manager.current(&cart()).unwrap();
    assert!(Arc::ptr_eq(&current, &good));
    let status = setup.status(&cart());
    assert_eq!(status.state, SvidState::RefreshFailing);
    let error = status.last_error.unwrap();
    for part in [
        "spiffe://td/ns/shop/sa/cart",
        "test CA",
        "certificate 5eed of issuer",
        "is revoked",
    ] {
        assert!(error.contains(part), "{error}");
    }
    // It is good again once the list says so.
    setup.publish(&CrlParams::default());
    pass(seconds(200)).await;
    assert_eq!(setup.manager.current(&cart()).unwrap().serial(), "5eed");
    assert_eq!(setup.status(&cart()).state, SvidState::Ready);
}

#[tokio::test(start_paused = true)]
async fn with_its_issuer_every_svid_is_revoked_until_another_issuer_signs() {
    let setup = Setup::new();
    let with_intermediate = TestCa::new("td").with_intermediate(&Default::default());
    let intermediate = with_intermediate.intermediates()[0].clone();
    *setup.source.ca.lock().unwrap() = with_intermediate;
    setup.manager.want(&cart());
    setup.ready(&cart()).await.unwrap();
    setup.publish(&CrlParams::revoking([&intermediate]));
    pass(seconds(10)).await;
    assert_eq!(setup.status(&cart()).state, SvidState::Revoked);
    let error = setup.status(&cart()).last_error.unwrap();
    assert!(error.contains("is revoked"), "{error}");
    assert!(setup.asked() > 2, "asked again and again");

    *setup.source.ca.lock().unwrap() = TestCa::new("td");
    setup.manager.ready(&cart(), seconds(151)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_list_that_covers_nobody_does_not_stop_us() {
    let setup = Setup::new();
    setup.manager.want(&cart());
    let svid = setup.ready(&cart()).await.unwrap();
    // Forged: another key lists our serial number.
    let forged = TestCa::new("td").crl(0, &CrlParams::revoking([&svid.chain()[0]]));
    let domain = cart().trust_domain().clone();
    setup.lists.replace("file", &domain, &forged).unwrap();
    setup.lists.require("second", &domain);
    pass(seconds(1)).await;
    let current = setup.manager.current(&cart()).unwrap();
    assert!(Arc::ptr_eq(&current, &svid));
}
