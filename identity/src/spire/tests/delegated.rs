//! The Delegated Identity API.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::agent::{Agent, Mode};
use super::{cart, eventually, managed};
use crate::manager::SvidState;
use crate::source::{FetchError, Issued, SvidSource};
use crate::spire::{DelegatedIdentity, DelegatedIdentityConfig, SpireConfigError};
use crate::template::IdentityTemplate;
use crate::testing::workload;
use crate::{TrustBundles, TrustDomain};

struct Setup {
    agent: Agent,
    bundles: Arc<TrustBundles>,
    source: Arc<DelegatedIdentity>,
}

impl Setup {
    fn new() -> Self {
        Self::after(Mode::Good)
    }

    fn after(mode: Mode) -> Self {
        let agent = Agent::start();
        agent.mode(mode);
        let bundles = Arc::new(TrustBundles::new());
        let source = DelegatedIdentity::start(config(&agent), Arc::clone(&bundles));
        Self {
            source: Arc::new(source.unwrap()),
            agent,
            bundles,
        }
    }

    async fn fetch(&self) -> Result<Issued, FetchError> {
        self.source.fetch(&cart(), Duration::ZERO).await
    }

    fn roots(&self, trust_domain: &str) -> usize {
        let domain = TrustDomain::parse(trust_domain).unwrap();
        self.bundles.roots(&domain).len()
    }
}

fn config(agent: &Agent) -> DelegatedIdentityConfig {
    DelegatedIdentityConfig {
        timeout: Duration::from_secs(5),
        ..DelegatedIdentityConfig::new(agent.socket()).unwrap()
    }
}

#[tokio::test]
async fn the_agent_gives_an_svid_by_selectors_and_all_bundles() {
    let setup = Setup::after(Mode::WithFederation);
    let issued = setup.fetch().await.unwrap();
    assert_eq!(issued.svid.id(), cart().spiffe_id());
    assert_eq!(issued.roots, [setup.agent.state.ca.root().clone()]);
    assert_eq!((setup.roots("td"), setup.roots("partner")), (1, 1));
    let selectors = setup.agent.state.selectors.lock().unwrap().clone();
    assert_eq!(selectors, [["k8s ns:shop", "k8s sa:cart"]]);

    // From the stream that is open, not by another one.
    let again = setup.fetch().await.unwrap();
    assert_eq!(again.svid.serial(), issued.svid.serial());
    assert_eq!(setup.agent.state.selectors.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn keys_of_each_kind_are_accepted() {
    for algorithm in [
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ] {
        let setup = Setup::new();
        *setup.agent.state.algorithm.lock().unwrap() = algorithm;
        setup.fetch().await.unwrap();
    }
}

#[tokio::test]
async fn a_pushed_svid_is_put_to_use_at_once() {
    let setup = Setup::new();
    let (manager, first) = managed(setup.source.clone(), &setup.bundles).await;
    setup.agent.push();
    eventually("the new SVID", || {
        let now = manager.current(&cart()).unwrap();
        (now.serial() != first.serial()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn bundles_follow_the_agent_and_bad_ones_leave_those_in_use() {
    let setup = Setup::new();
    setup.fetch().await.unwrap();
    assert_eq!((setup.roots("td"), setup.roots("partner")), (1, 0));

    setup.agent.mode(Mode::TwoRoots);
    eventually("two roots", || (setup.roots("td") == 2).then_some(())).await;
    for mode in [Mode::NoBundle, Mode::EmptyBundle, Mode::GarbageBundle] {
        let mut changed = setup.source.updates().unwrap();
        setup.agent.mode(mode);
        // The bundles' stream and the SVID's.
        for _ in 0..2 {
            let told = tokio::time::timeout(Duration::from_secs(5), changed.recv());
            told.await.unwrap().unwrap();
        }
        assert_eq!(setup.roots("td"), 2, "{mode:?}");
        let error = setup.fetch().await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("bundle") || text.contains("root"), "{text}");
    }
    setup.agent.mode(Mode::WithFederation);
    eventually("federation", || (setup.roots("partner") == 1).then_some(())).await;
    eventually("one root", || (setup.roots("td") == 1).then_some(())).await;
    setup.agent.mode(Mode::Good);
    eventually("its end", || (setup.roots("partner") == 0).then_some(())).await;
    setup.fetch().await.unwrap();
}

#[tokio::test]
async fn unusable_answers_are_refused_naming_identity_source_and_fault() {
    for (mode, label, fault) in [
        (Mode::NoSvid, "bad-answer", "none of the 0 SVIDs"),
        (Mode::OtherIdentity, "bad-answer", "none of the 1 SVIDs"),
        (Mode::OtherKey, "bad-svid", "not for our key"),
        (Mode::GarbageKey, "bad-svid", "private key"),
        (Mode::GarbageChain, "bad-svid", "malformed"),
        (Mode::EmptyChain, "bad-svid", "chain is empty"),
        (Mode::IssuerBeforeLeaf, "bad-svid", "leaf-is-ca"),
        (Mode::LongChain, "bad-svid", "more than"),
        (Mode::Expired, "bad-svid", "expired"),
        (Mode::UnrelatedRoot, "bad-chain", "untrusted"),
        (Mode::Denied, "refused", "PermissionDenied"),
        (Mode::NoBundle, "bad-answer", "no trust bundle at all"),
        (
            Mode::OtherBundleOnly,
            "bad-answer",
            "no bundle of trust domain td",
        ),
    ] {
        let setup = Setup::after(mode);
        let error = setup.fetch().await.unwrap_err();
        let text = error.to_string();
        assert_eq!(error.problem.as_str(), label, "{mode:?}: {text}");
        assert!(text.contains(fault), "{mode:?}: {text}");
        assert!(text.contains("spiffe://td/ns/shop/sa/cart"), "{text}");
        let socket = setup.agent.socket();
        assert!(text.contains(socket.to_str().unwrap()), "{text}");

        setup.agent.mode(Mode::Good);
        let mut good = setup.fetch().await;
        for _ in 0..50 {
            if good.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            good = setup.fetch().await;
        }
        good.unwrap_or_else(|error| panic!("{mode:?}: {error}"));
    }
}

#[tokio::test]
async fn a_valid_svid_serves_while_the_agent_is_gone_and_a_new_one_comes_after() {
    let mut setup = Setup::new();
    let (manager, first) = managed(setup.source.clone(), &setup.bundles).await;
    setup.agent.stop();
    let gone = eventually_err(&setup).await;
    assert_eq!(gone.problem.as_str(), "unreachable", "{gone}");
    assert_eq!(manager.current(&cart()).unwrap().serial(), first.serial());
    assert_eq!(setup.roots("td"), 1, "nor are the bundles gone");

    setup.agent.run();
    let serial = eventually("the SVID after", || {
        let now = manager.current(&cart()).unwrap();
        (now.serial() != first.serial()).then(|| now.serial().to_owned())
    })
    .await;
    assert_ne!(serial, first.serial());
    let status = manager.snapshot().remove(0);
    assert_eq!(status.state, SvidState::Ready);
}

async fn eventually_err(setup: &Setup) -> FetchError {
    for _ in 0..500 {
        if let Err(error) = setup.fetch().await {
            return error;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the end of the stream goes unnoticed");
}

#[tokio::test]
async fn a_silent_or_absent_agent_fails_in_bounded_time() {
    let mut agent = Agent::start();
    agent.mode(Mode::Silent);
    let bundles = Arc::new(TrustBundles::new());
    let mut config = config(&agent);
    config.timeout = Duration::from_millis(200);
    let source = DelegatedIdentity::start(config.clone(), Arc::clone(&bundles)).unwrap();
    let error = source.fetch(&cart(), Duration::ZERO).await.unwrap_err();
    assert_eq!(error.problem.as_str(), "timed-out", "{error}");

    agent.stop();
    let source = DelegatedIdentity::start(config, bundles).unwrap();
    let error = source.fetch(&cart(), Duration::ZERO).await.unwrap_err();
    assert_eq!(error.problem.as_str(), "unreachable", "{error}");
    assert!(error.to_string().contains("No such file"), "{error}");
}

#[tokio::test]
async fn a_forgotten_identity_has_no_stream_any_more() {
    let setup = Setup::new();
    setup.fetch().await.unwrap();
    let open = || setup.agent.state.open.load(Ordering::SeqCst);
    assert_eq!(open(), 2);
    setup.source.forget(&cart());
    eventually("the stream's end", || (open() == 1).then_some(())).await;
    assert!(format!("{:?}", setup.source).contains("identities: 0"));
    drop(setup.source);
    let state = &setup.agent.state;
    let none = || (state.open.load(Ordering::SeqCst) == 0).then_some(());
    eventually("the end of all", none).await;
}

#[tokio::test]
async fn selectors_can_be_set() {
    let agent = Agent::start();
    let mut config = config(&agent);
    config
        .selectors
        .push(IdentityTemplate::parse("k8s:cluster:{trust_domain}").unwrap());
    let source = DelegatedIdentity::start(config, Arc::new(TrustBundles::new())).unwrap();
    let identity = workload("td", "a", "b");
    source.fetch(&identity, Duration::ZERO).await.unwrap();
    let selectors = agent.state.selectors.lock().unwrap().clone();
    assert_eq!(selectors, [["k8s ns:a", "k8s sa:b", "k8s cluster:td"]]);
}

#[tokio::test]
async fn configurations_that_cannot_work_are_refused() {
    let start = |selectors: &[&str]| {
        let selectors = selectors
            .iter()
            .map(|s| IdentityTemplate::parse(s).unwrap());
        let config = DelegatedIdentityConfig {
            socket: PathBuf::from("/nonexistent"),
            selectors: selectors.collect(),
            timeout: Duration::from_secs(1),
        };
        DelegatedIdentity::start(config, Arc::new(TrustBundles::new())).unwrap_err()
    };
    assert_eq!(start(&[]), SpireConfigError::NoSelector);
    for bad in ["namespace", ":ns", "k8s:"] {
        let error = start(&["k8s:ns:{namespace}", bad]);
        assert_eq!(error, SpireConfigError::Selector(bad.to_owned()));
    }
}
