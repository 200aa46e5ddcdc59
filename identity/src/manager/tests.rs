//! The manager under tokio's paused time: hours pass in milliseconds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashSet;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use rustls_pki_types::CertificateDer;

use super::*;
use crate::source::{FetchFuture, FetchProblem, Issued, SourceUpdate};
use crate::testing::{LeafParams, TestCa, workload};

/// What the source does with the next fetches.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Issue,
    Fail,
    Hang,
    Panic,
    OtherIdentity,
    NoRoots,
    Expired,
}

struct TestSource {
    ca: Mutex<TestCa>,
    clock: Clock,
    mode: Mutex<Mode>,
    delay: Mutex<Duration>,
    lifetime: Mutex<Duration>,
    asked: Mutex<Vec<WorkloadIdentity>>,
    asked_at: Mutex<Vec<Instant>>,
    forgotten: Mutex<Vec<WorkloadIdentity>>,
    keeps_bundles: Mutex<bool>,
    updates: broadcast::Sender<SourceUpdate>,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
}

struct UnderWay<'a>(&'a TestSource);

impl<'a> UnderWay<'a> {
    fn begin(source: &'a TestSource) -> Self {
        let now = source.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        source.most_under_way.fetch_max(now, Ordering::SeqCst);
        Self(source)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

impl SvidSource for TestSource {
    fn name(&self) -> &str {
        "test CA"
    }

    fn fetch<'a>(&'a self, identity: &'a WorkloadIdentity, _ttl: Duration) -> FetchFuture<'a> {
        Box::pin(async move {
            let _under_way = UnderWay::begin(self);
            self.asked.lock().unwrap().push(identity.clone());
            self.asked_at.lock().unwrap().push(Instant::now());
            let (mode, delay) = (*self.mode.lock().unwrap(), *self.delay.lock().unwrap());
            // Signed when asked, delivered later.
            let issued = self.issue(identity, mode);
            tokio::time::sleep(delay).await;
            match mode {
                Mode::Fail => Err(FetchError {
                    identity: identity.clone(),
                    source_name: self.name().to_owned(),
                    problem: FetchProblem::Unreachable("the test says so".to_owned()),
                }),
                Mode::Hang => std::future::pending().await,
                Mode::Panic => panic!("the test says so"),
                _ => Ok(issued),
            }
        })
    }

    fn updates(&self) -> Option<broadcast::Receiver<SourceUpdate>> {
        Some(self.updates.subscribe())
    }

    fn keeps_bundles(&self) -> bool {
        *self.keeps_bundles.lock().unwrap()
    }

    fn forget(&self, identity: &WorkloadIdentity) {
        self.forgotten.lock().unwrap().push(identity.clone());
    }
}

impl TestSource {
    fn issue(&self, identity: &WorkloadIdentity, mode: Mode) -> Issued {
        let now = self.clock.now();
        let identity = match mode {
            Mode::OtherIdentity => workload("td", "someone", "else"),
            _ => identity.clone(),
        };
        let mut params = LeafParams::good(&identity);
        params.not_before = now - Duration::from_secs(10);
        params.not_after = now + *self.lifetime.lock().unwrap();
        let mut issued_at = now;
        if mode == Mode::Expired {
            params.not_after = now - Duration::from_secs(2);
            issued_at = now - Duration::from_secs(5);
        }
        let ca = self.ca.lock().unwrap();
        let roots: Vec<CertificateDer<'static>> = match mode {
            Mode::NoRoots => Vec::new(),
            _ => vec![ca.root().clone()],
        };
        Issued {
            svid: Arc::new(ca.svid_at(&params, issued_at)),
            roots,
        }
    }
}

struct Setup {
    source: Arc<TestSource>,
    bundles: Arc<TrustBundles>,
    manager: SvidManager,
    /// Seconds by which the wall clock is off.
    wall_offset: Arc<AtomicI64>,
}

impl Setup {
    /// SVIDs live for 1000 s.
    fn new() -> Self {
        let (start, wall) = (Instant::now(), SystemTime::now());
        let wall_offset = Arc::new(AtomicI64::new(0));
        let offset = Arc::clone(&wall_offset);
        let clock = Clock::from_fn(move || {
            let offset = offset.load(Ordering::SeqCst);
            let now = wall + start.elapsed();
            let by = Duration::from_secs(offset.unsigned_abs());
            if offset < 0 { now - by } else { now + by }
        });
        let source = Arc::new(TestSource {
            ca: Mutex::new(TestCa::new("td")),
            clock: clock.clone(),
            mode: Mutex::new(Mode::Issue),
            delay: Mutex::new(Duration::from_millis(100)),
            lifetime: Mutex::new(Duration::from_secs(1000)),
            asked: Mutex::default(),
            asked_at: Mutex::default(),
            forgotten: Mutex::default(),
            keeps_bundles: Mutex::default(),
            updates: broadcast::Sender::new(16),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
        });
        let bundles = Arc::new(TrustBundles::new());
        let config = ManagerConfig {
            clock,
            ..ManagerConfig::default()
        };
        let manager = SvidManager::start(source.clone(), Arc::clone(&bundles), config);
        Self {
            source,
            bundles,
            manager,
            wall_offset,
        }
    }

    fn mode(&self, mode: Mode) {
        *self.source.mode.lock().unwrap() = mode;
    }

    fn asked(&self) -> usize {
        self.source.asked.lock().unwrap().len()
    }

    async fn ready(&self, identity: &WorkloadIdentity) -> Result<Arc<Svid>, NoSvid> {
        self.manager.ready(identity, seconds(60)).await
    }

    fn status(&self, identity: &WorkloadIdentity) -> SvidStatus {
        let all = self.manager.snapshot();
        all.into_iter().find(|s| s.identity == *identity).unwrap()
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Moves time on, in steps, so that whatever is due on the way happens.
async fn pass(duration: Duration) {
    tokio::time::sleep(duration).await;
}

fn cart() -> WorkloadIdentity {
    workload("td", "shop", "cart")
}

fn numbered(count: usize) -> Vec<WorkloadIdentity> {
    (0..count)
        .map(|n| workload("td", "shop", &format!("sa-{n:04}")))
        .collect()
}

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

#[tokio::test(start_paused = true)]
async fn roots_of_a_source_that_keeps_bundles_are_left_to_it() {
    let setup = Setup::new();
    *setup.source.keeps_bundles.lock().unwrap() = true;
    setup.manager.want(&cart());
    setup.ready(&cart()).await.unwrap();
    assert!(setup.bundles.trust_domains().is_empty());
}
