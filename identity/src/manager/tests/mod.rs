//! The manager under tokio's paused time: hours pass in milliseconds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod answers;
mod revoked;
mod schedule;
mod serving;

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use rustls_pki_types::CertificateDer;

use super::*;
use crate::aliases::TrustDomainAliases;
use crate::bundles::TrustBundles;
use crate::revocation::RevocationLists;
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
    fixed_serial: Mutex<Option<Vec<u8>>>,
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
        params.serial = self.fixed_serial.lock().unwrap().clone();
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
    lists: Arc<RevocationLists>,
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
            fixed_serial: Mutex::default(),
            updates: broadcast::Sender::new(16),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
        });
        let bundles = Arc::new(TrustBundles::new());
        let config = ManagerConfig {
            clock,
            ..ManagerConfig::default()
        };
        let lists = Arc::new(RevocationLists::new());
        let aliases = TrustDomainAliases::default();
        let trust = TrustStore::new(Arc::clone(&bundles), Arc::clone(&lists), aliases);
        let manager = SvidManager::start(source.clone(), trust, config);
        Self {
            source,
            bundles,
            lists,
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
