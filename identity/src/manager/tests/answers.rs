//! Answers that are bad, late or not for the manager.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

#[tokio::test(start_paused = true)]
async fn bad_answers_leave_svid_and_bundle_as_they_were() {
    for (mode, label) in [
        (Mode::OtherIdentity, "is for spiffe://td/ns/someone/sa/else"),
        (Mode::Expired, "expired"),
        (Mode::NoRoots, "has no root"),
        (Mode::Panic, "panicked"),
        (Mode::Hang, "no answer within 30000 ms"),
    ] {
        let setup = Setup::new();
        setup.manager.want(&cart());
        let good = setup.ready(&cart()).await.unwrap();
        let roots = setup.bundles.roots(cart().trust_domain());
        setup.mode(mode);
        pass(seconds(700)).await;

        assert!(setup.asked() > 1);
        let current = setup.manager.current(&cart()).unwrap();
        assert!(Arc::ptr_eq(&good, &current), "{mode:?}");
        assert_eq!(
            setup.bundles.roots(cart().trust_domain()),
            roots,
            "{mode:?}"
        );
        let error = setup.status(&cart()).last_error.unwrap();
        assert!(error.contains(label), "{mode:?}: {error}");

        setup.mode(Mode::Issue);
        pass(seconds(200)).await;
        assert_eq!(setup.status(&cart()).state, SvidState::Ready, "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_overtaken_answer_does_not_bring_old_roots_back() {
    let setup = Setup::new();
    let (slow, fast) = (
        workload("td", "shop", "slow"),
        workload("td", "shop", "fast"),
    );
    *setup.source.delay.lock().unwrap() = seconds(20);
    setup.manager.want(&slow);
    pass(seconds(1)).await;

    let new_ca = TestCa::new("td");
    let new_roots = [new_ca.root().clone()];
    *setup.source.ca.lock().unwrap() = new_ca;
    *setup.source.delay.lock().unwrap() = seconds(1);
    setup.manager.want(&fast);
    setup.ready(&fast).await.unwrap();
    assert_eq!(setup.bundles.roots(slow.trust_domain()), new_roots);
    setup.ready(&slow).await.unwrap();
    assert_eq!(setup.bundles.roots(slow.trust_domain()), new_roots);
}

#[tokio::test(start_paused = true)]
async fn roots_of_a_source_that_keeps_bundles_are_left_to_it() {
    let setup = Setup::new();
    *setup.source.keeps_bundles.lock().unwrap() = true;
    setup.manager.want(&cart());
    setup.ready(&cart()).await.unwrap();
    assert!(setup.bundles.trust_domains().is_empty());
}
