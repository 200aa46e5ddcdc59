//! When the source is asked, and how often.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashSet;

use super::*;

#[tokio::test(start_paused = true)]
async fn an_svid_is_refreshed_around_its_half_life_without_a_gap() {
    let setup = Setup::new();
    setup.manager.want(&cart());
    let first = setup.ready(&cart()).await.unwrap();
    for refreshes in 1..=5 {
        pass(seconds(395)).await;
        assert_eq!(setup.asked(), refreshes, "too early");
        for _ in 0..210 {
            setup.manager.current(&cart()).unwrap();
            pass(seconds(1)).await;
            if setup.asked() > refreshes {
                break;
            }
        }
        assert_eq!(setup.asked(), refreshes + 1, "too late");
        pass(seconds(1)).await;
    }
    let last = setup.manager.current(&cart()).unwrap();
    assert_ne!(last.serial(), first.serial());
    assert!(last.not_after() > first.not_after() + 5 * 390);
}

#[tokio::test(start_paused = true)]
async fn first_failures_are_retried_fast_and_later_ones_ever_more_slowly() {
    let setup = Setup::new();
    setup.mode(Mode::Fail);
    setup.manager.want(&cart());
    let error = setup.manager.ready(&cart(), seconds(1)).await.unwrap_err();
    assert_eq!(error.as_str(), "fetch-failed");
    assert!(error.to_string().contains("the test says so"), "{error}");
    assert_eq!(setup.status(&cart()).state, SvidState::Failing);
    assert_eq!(setup.asked(), 3, "at 0, and after about 250 and 500 ms");

    pass(seconds(3600)).await;
    let in_an_hour = setup.asked();
    assert!(
        (25..50).contains(&in_an_hour),
        "{in_an_hour} tries in an hour"
    );

    setup.mode(Mode::Issue);
    setup.manager.ready(&cart(), seconds(151)).await.unwrap();
    // The count of failures starts anew.
    setup.mode(Mode::Fail);
    let before = setup.asked();
    pass(seconds(605)).await;
    assert!(setup.asked() >= before + 3);
}

#[tokio::test(start_paused = true)]
async fn at_most_eight_fetches_run_at_once() {
    let setup = Setup::new();
    let all = numbered(40);
    all.iter().for_each(|identity| setup.manager.want(identity));
    for identity in &all {
        setup.ready(identity).await.unwrap();
    }
    let most = setup.source.most_under_way.load(Ordering::SeqCst);
    assert_eq!(most, MAX_CONCURRENT_FETCHES);
    assert_eq!(setup.asked(), 40);
}

#[tokio::test(start_paused = true)]
async fn whoever_is_waited_for_goes_first() {
    let setup = Setup::new();
    let all = numbered(60);
    all.iter().for_each(|identity| setup.manager.want(identity));
    // The first eight are under way before anybody waits.
    pass(Duration::from_millis(10)).await;
    let waiting_for = {
        let asked: HashSet<_> = setup.source.asked.lock().unwrap().iter().cloned().collect();
        assert_eq!(asked.len(), MAX_CONCURRENT_FETCHES);
        all.iter()
            .find(|identity| !asked.contains(identity))
            .unwrap()
    };
    setup.ready(waiting_for).await.unwrap();
    let asked = setup.source.asked.lock().unwrap().clone();
    let place = asked.iter().position(|identity| identity == waiting_for);
    assert!(place.unwrap() < 2 * MAX_CONCURRENT_FETCHES, "{place:?}");
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_forward_expires_at_once_and_refreshes_soon() {
    let setup = Setup::new();
    setup.manager.want(&cart());
    let first = setup.ready(&cart()).await.unwrap();
    setup.wall_offset.store(2000, Ordering::SeqCst);
    assert_eq!(
        setup.manager.current(&cart()).unwrap_err().as_str(),
        "expired"
    );
    pass(seconds(31)).await;
    let second = setup.manager.current(&cart()).unwrap();
    assert!(second.not_after() > first.not_after() + 1500);
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_back_does_not_delay_the_refresh() {
    let setup = Setup::new();
    setup.manager.want(&cart());
    setup.ready(&cart()).await.unwrap();
    setup.wall_offset.store(-7200, Ordering::SeqCst);
    pass(seconds(601)).await;
    assert_eq!(setup.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_identities_refresh_without_a_burst() {
    let setup = Setup::new();
    *setup.source.lifetime.lock().unwrap() = seconds(24 * 3600);
    let all = numbered(1000);
    all.iter().for_each(|identity| setup.manager.want(identity));
    for identity in &all {
        setup.ready(identity).await.unwrap();
    }
    let issued = Instant::now();
    let first_asked = setup.asked();
    pass(seconds(15 * 3600)).await;

    // When the second round really was asked for, in seconds.
    let asked_at: Vec<u64> = setup.source.asked_at.lock().unwrap()[first_asked..]
        .iter()
        .map(|at| (*at - issued).as_secs())
        .collect();
    let (from, to) = (
        asked_at.iter().min().unwrap(),
        asked_at.iter().max().unwrap(),
    );
    assert!((34_000..36_000).contains(from), "first after {from} s");
    assert!(to - from > 4 * 3600, "spread over {} s", to - from);
    let busiest = asked_at.iter().map(|from| {
        let minute = *from..from + 60;
        asked_at.iter().filter(|at| minute.contains(*at)).count()
    });
    assert!(busiest.max().unwrap() < 30, "fetches in one minute");
    assert!(setup.asked() >= 2000);
    assert!(
        setup
            .manager
            .snapshot()
            .iter()
            .all(|s| s.state == SvidState::Ready)
    );
    assert!(setup.source.most_under_way.load(Ordering::SeqCst) <= MAX_CONCURRENT_FETCHES);
}

#[tokio::test(start_paused = true)]
async fn an_announced_update_is_fetched_at_once() {
    let setup = Setup::new();
    let other = workload("td", "shop", "other");
    setup.manager.want(&cart());
    setup.manager.want(&other);
    let first = setup.ready(&cart()).await.unwrap();
    setup.ready(&other).await.unwrap();
    let tell = |update| setup.source.updates.send(update).unwrap();

    tell(SourceUpdate::Svid(cart()));
    pass(seconds(1)).await;
    assert_eq!(setup.asked(), 3);
    let second = setup.manager.current(&cart()).unwrap();
    assert_ne!(second.serial(), first.serial());

    tell(SourceUpdate::All);
    pass(seconds(1)).await;
    assert_eq!(setup.asked(), 5);

    // Told during a fetch: that one may have come too early.
    *setup.source.delay.lock().unwrap() = seconds(2);
    tell(SourceUpdate::Svid(cart()));
    pass(seconds(1)).await;
    assert_eq!(setup.asked(), 6);
    tell(SourceUpdate::Svid(cart()));
    tell(SourceUpdate::Svid(cart()));
    pass(seconds(10)).await;
    assert_eq!(setup.asked(), 7);

    // It does not wait for the end of a back-off either.
    setup.mode(Mode::Fail);
    tell(SourceUpdate::Svid(cart()));
    pass(seconds(60)).await;
    setup.mode(Mode::Issue);
    let asked = setup.asked();
    tell(SourceUpdate::Svid(cart()));
    pass(seconds(3)).await;
    assert_eq!(setup.asked(), asked + 1);
    assert_eq!(setup.status(&cart()).state, SvidState::Ready);
    // Nobody wants this one.
    tell(SourceUpdate::Svid(workload("td", "shop", "stranger")));
    pass(seconds(3)).await;
    assert_eq!(setup.asked(), asked + 1);
}
