//! The Workload API, through the `spiffe` crate's client.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::Duration;

use super::agent::{Agent, Mode};
use super::{cart, eventually, managed};
use crate::source::{FetchError, Issued, SvidSource};
use crate::spire::{WorkloadApi, WorkloadApiConfig};
use crate::testing::workload;
use crate::{TrustBundles, TrustDomain};

struct Setup {
    agent: Agent,
    bundles: Arc<TrustBundles>,
    source: Arc<WorkloadApi>,
}

impl Setup {
    fn after(mode: Mode) -> Self {
        let agent = Agent::start();
        agent.mode(mode);
        let bundles = Arc::new(TrustBundles::new());
        let config = WorkloadApiConfig {
            socket: agent.socket(),
            timeout: Duration::from_secs(5),
        };
        Self {
            source: Arc::new(WorkloadApi::start(config, Arc::clone(&bundles))),
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

#[tokio::test]
async fn the_one_workload_gets_its_svid_and_all_bundles() {
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ] {
        let setup = Setup::after(Mode::WithFederation);
        *setup.agent.state.algorithm.lock().unwrap() = algorithm;
        let issued = setup.fetch().await.unwrap();
        assert_eq!(issued.svid.id(), cart().spiffe_id());
        assert_eq!((setup.roots("td"), setup.roots("partner")), (1, 1));
    }
}

#[tokio::test]
async fn another_identity_than_the_callers_is_refused_naming_whose_it_is() {
    let setup = Setup::after(Mode::Good);
    let other = workload("td", "shop", "admin");
    let error = setup.source.fetch(&other, Duration::ZERO).await;
    let text = error.unwrap_err().to_string();
    assert!(
        text.contains("takes us for spiffe://td/ns/shop/sa/cart"),
        "{text}"
    );
    setup.fetch().await.unwrap();
}

#[tokio::test]
async fn a_pushed_svid_and_bundle_are_put_to_use_at_once() {
    let setup = Setup::after(Mode::Good);
    let (manager, first) = managed(setup.source.clone(), &setup.bundles).await;
    setup.agent.mode(Mode::TwoRoots);
    eventually("the new SVID", || {
        let now = manager.current(&cart()).unwrap();
        (now.serial() != first.serial()).then_some(())
    })
    .await;
    assert_eq!(setup.roots("td"), 2);
}

#[tokio::test]
async fn unusable_answers_are_refused_and_change_nothing() {
    for (mode, label) in [
        (Mode::NoSvid, "bad-answer"),
        (Mode::OtherIdentity, "bad-answer"),
        (Mode::OtherKey, "bad-svid"),
        (Mode::GarbageKey, "bad-answer"),
        (Mode::GarbageChain, "bad-answer"),
        (Mode::Expired, "bad-svid"),
        (Mode::UnrelatedRoot, "bad-chain"),
        (Mode::EmptyBundle, "bad-answer"),
        (Mode::GarbageBundle, "bad-answer"),
        (Mode::Denied, "refused"),
    ] {
        let setup = Setup::after(mode);
        let error = setup.fetch().await.unwrap_err();
        assert_eq!(error.problem.as_str(), label, "{mode:?}: {error}");
        let text = error.to_string();
        assert!(text.contains("spiffe://td/ns/shop/sa/cart"), "{text}");
        assert!(text.contains("Workload API"), "{text}");
        let kept = setup.roots("td");

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
        assert!(kept <= setup.roots("td"));
    }
}

#[tokio::test]
async fn a_valid_svid_serves_while_the_agent_is_gone_and_a_new_one_comes_after() {
    let mut setup = Setup::after(Mode::Good);
    let (manager, first) = managed(setup.source.clone(), &setup.bundles).await;
    setup.agent.stop();
    let mut gone = setup.fetch().await;
    for _ in 0..500 {
        if gone.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        gone = setup.fetch().await;
    }
    let gone = gone.unwrap_err();
    assert_eq!(gone.problem.as_str(), "unreachable", "{gone}");
    assert_eq!(manager.current(&cart()).unwrap().serial(), first.serial());
    assert_eq!(setup.roots("td"), 1);

    setup.agent.run();
    eventually("the SVID after", || {
        let now = manager.current(&cart()).unwrap();
        (now.serial() != first.serial()).then_some(())
    })
    .await;
}
