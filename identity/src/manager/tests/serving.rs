//! What is presented: valid SVIDs, while they are wanted, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

#[tokio::test(start_paused = true)]
async fn a_wanted_identity_gets_an_svid_and_its_roots_are_trusted() {
    let setup = Setup::new();
    assert_eq!(
        setup.manager.current(&cart()).unwrap_err().as_str(),
        "not-wanted"
    );
    setup.manager.want(&cart());
    assert_eq!(
        setup.manager.current(&cart()).unwrap_err().as_str(),
        "pending"
    );
    assert_eq!(setup.status(&cart()).state, SvidState::Pending);

    let svid = setup.ready(&cart()).await.unwrap();
    assert_eq!(svid.id(), cart().spiffe_id());
    let current = setup.manager.current(&cart()).unwrap();
    assert!(Arc::ptr_eq(&current, &svid));
    let root = setup.source.ca.lock().unwrap().root().clone();
    assert_eq!(setup.bundles.roots(cart().trust_domain()), [root]);

    let status = setup.status(&cart());
    assert_eq!(status.state, SvidState::Ready);
    assert_eq!(status.wanted, 1);
    assert_eq!(status.serial.as_deref(), Some(svid.serial()));
    assert_eq!(status.not_after, Some(svid.not_after()));
    assert_eq!(status.last_error, None);
    assert!(status.next_fetch.is_some());
}

#[tokio::test(start_paused = true)]
async fn what_nobody_wants_is_never_fetched() {
    let setup = Setup::new();
    let error = setup.ready(&cart()).await.unwrap_err();
    assert_eq!(error.as_str(), "not-wanted");
    pass(seconds(3600)).await;
    assert_eq!(setup.asked(), 0);
    assert!(!setup.manager.release(&cart()));
}

#[tokio::test(start_paused = true)]
async fn a_valid_svid_serves_while_the_ca_is_down_and_never_after_expiry() {
    let setup = Setup::new();
    setup.manager.want(&cart());
    let first = setup.ready(&cart()).await.unwrap();
    setup.mode(Mode::Fail);

    pass(seconds(700)).await;
    let still = setup.manager.current(&cart()).unwrap();
    assert!(Arc::ptr_eq(&first, &still));
    let status = setup.status(&cart());
    assert_eq!(status.state, SvidState::RefreshFailing);
    let error = status.last_error.unwrap();
    assert!(
        error.contains("spiffe://td/ns/shop/sa/cart") && error.contains("test CA"),
        "{error}"
    );

    pass(seconds(301)).await;
    let error = setup.manager.current(&cart()).unwrap_err();
    assert!(matches!(error, NoSvid::Expired { not_after } if not_after == first.not_after()));
    assert_eq!(setup.status(&cart()).state, SvidState::Expired);

    setup.mode(Mode::Issue);
    let new = setup.manager.ready(&cart(), seconds(151)).await.unwrap();
    assert_ne!(new.serial(), first.serial());
    assert_eq!(setup.status(&cart()).state, SvidState::Ready);
}

#[tokio::test(start_paused = true)]
async fn the_last_release_drops_the_svid() {
    let setup = Setup::new();
    setup.manager.want(&cart());
    setup.manager.want(&cart());
    setup.ready(&cart()).await.unwrap();
    assert!(setup.manager.release(&cart()));
    setup.manager.current(&cart()).unwrap();
    assert!(setup.manager.release(&cart()));
    assert_eq!(
        setup.manager.current(&cart()).unwrap_err().as_str(),
        "not-wanted"
    );
    assert!(!setup.manager.release(&cart()));
    assert!(setup.manager.snapshot().is_empty());
    let asked = setup.asked();
    pass(seconds(5000)).await;
    assert_eq!(setup.asked(), asked, "no refresh of what nobody wants");
}

#[tokio::test(start_paused = true)]
async fn a_release_during_the_fetch_ends_the_wait_and_discards_the_answer() {
    let setup = Setup::new();
    *setup.source.delay.lock().unwrap() = seconds(5);
    setup.manager.want(&cart());
    let start = Instant::now();
    let identity = cart();
    let release = async {
        pass(seconds(1)).await;
        setup.manager.release(&identity);
    };
    let (waited, ()) = tokio::join!(setup.ready(&identity), release);
    assert_eq!(waited.unwrap_err().as_str(), "not-wanted");
    assert!(start.elapsed() < seconds(2));
    pass(seconds(10)).await;
    assert!(setup.bundles.trust_domains().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_status_counts_down_to_expiry_while_the_ca_is_down() {
    let setup = Setup::new();
    setup.manager.want(&cart());
    assert_eq!(setup.status(&cart()).expires_in, None);
    setup.ready(&cart()).await.unwrap();
    let left = setup.status(&cart()).expires_in.unwrap();
    assert!((998..=1000).contains(&left), "{left}");
    setup.mode(Mode::Fail);
    pass(seconds(700)).await;
    let status = setup.status(&cart());
    assert_eq!(status.state, SvidState::RefreshFailing);
    let left = status.expires_in.unwrap();
    assert!((298..=300).contains(&left), "{left}");
    pass(seconds(310)).await;
    assert!(setup.status(&cart()).expires_in.unwrap() < 0);
}

#[tokio::test(start_paused = true)]
async fn subscribers_hear_of_each_new_svid_and_of_the_end() {
    let setup = Setup::new();
    let mut events = setup.manager.subscribe();
    setup.manager.want(&cart());
    let first = setup.ready(&cart()).await.unwrap();
    match events.recv().await.unwrap() {
        SvidEvent::Renewed {
            identity,
            svid,
            replaced: None,
        } if identity == cart() => assert!(Arc::ptr_eq(&svid, &first)),
        other => panic!("{other:?}"),
    }
    pass(seconds(650)).await;
    let second = setup.manager.current(&cart()).unwrap();
    match events.recv().await.unwrap() {
        SvidEvent::Renewed {
            svid,
            replaced: Some(replaced),
            ..
        } => {
            assert!(Arc::ptr_eq(&svid, &second));
            assert_eq!(replaced, first.serial());
        }
        other => panic!("{other:?}"),
    }
    // A failed refresh is no news.
    setup.mode(Mode::Fail);
    pass(seconds(650)).await;
    setup.manager.release(&cart());
    match events.recv().await.unwrap() {
        SvidEvent::Dropped { identity } => assert_eq!(identity, cart()),
        other => panic!("{other:?}"),
    }
    assert_eq!(*setup.source.forgotten.lock().unwrap(), [cart()]);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_manager_ends_its_fetches() {
    let setup = Setup::new();
    setup.mode(Mode::Hang);
    setup.manager.want(&cart());
    pass(seconds(1)).await;
    assert_eq!(setup.source.under_way.load(Ordering::SeqCst), 1);
    drop(setup.manager);
    pass(seconds(1)).await;
    assert_eq!(setup.source.under_way.load(Ordering::SeqCst), 0);
}
