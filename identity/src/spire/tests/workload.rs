//! The Workload API.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::Duration;

use super::agent::{Agent, Mode};
use super::{cart, eventually, managed};
use crate::source::{FetchError, Issued, SvidSource};
use crate::spire::{WorkloadApi, WorkloadApiConfig};
use crate::testing::{CaParams, CrlParams, TestCa, workload};
use crate::{RevocationLists, TrustBundles, TrustDomain, TrustDomainAliases, TrustStore};

struct Setup {
    agent: Agent,
    bundles: Arc<TrustBundles>,
    lists: Arc<RevocationLists>,
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
        let lists = Arc::new(RevocationLists::new());
        let aliases = TrustDomainAliases::default();
        let trust = TrustStore::new(Arc::clone(&bundles), Arc::clone(&lists), aliases);
        Self {
            source: Arc::new(WorkloadApi::start(config, trust).unwrap()),
            agent,
            bundles,
            lists,
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
        (Mode::GarbageKey, "bad-svid"),
        (Mode::GarbageChain, "bad-svid"),
        (Mode::EmptyChain, "bad-svid"),
        (Mode::IssuerBeforeLeaf, "bad-svid"),
        (Mode::LongChain, "bad-svid"),
        (Mode::Expired, "bad-svid"),
        (Mode::UnrelatedRoot, "bad-chain"),
        (Mode::EmptyBundle, "bad-bundle"),
        (Mode::GarbageBundle, "bad-bundle"),
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

#[tokio::test]
async fn the_reference_client_understands_the_same_agent() {
    let agent = Agent::start();
    agent.mode(Mode::WithFederation);
    let address = format!("unix:{}", agent.socket().display());
    let client = spiffe::WorkloadApiClient::connect_to(address)
        .await
        .unwrap();
    let context = client.fetch_x509_context().await.unwrap();
    let id = context.default_svid().unwrap().spiffe_id().to_string();
    assert_eq!(id, cart().to_string());
    assert_eq!(context.bundle_set().iter().count(), 2);
}

#[tokio::test]
async fn revocation_lists_of_an_answer_are_in_force_for_their_issuers_domain() {
    let setup = Setup::after(Mode::WithFederation);
    let domain = |name: &str| TrustDomain::parse(name).unwrap();
    let (manager, _) = managed(setup.source.clone(), &setup.bundles).await;
    assert!(!setup.lists.required(&domain("td")));
    let partner = setup.agent.state.partner.crl(0, &CrlParams::default());
    let stranger = TestCa::new("td").crl(0, &CrlParams::default());
    let give = |lists: &[&Vec<u8>]| {
        let lists = lists.iter().map(|list| (*list).clone()).collect();
        *setup.agent.state.lists.lock().unwrap() = lists;
        setup.agent.push();
    };
    let of = |name: &str| {
        let all = setup.lists.snapshot();
        all.into_iter()
            .filter(|s| s.trust_domain == domain(name))
            .count()
    };

    give(&[&partner]);
    eventually("the partner's", || (of("partner") == 1).then_some(())).await;
    assert!(
        !setup.lists.required(&domain("td")),
        "nobody gave one for it"
    );

    // Whom nobody knows is an issuer of our own trust domain.
    let own = setup.agent.state.ca.crl(0, &CrlParams::default());
    give(&[&partner, &own, &stranger]);
    eventually("all", || (of("td") == 2).then_some(())).await;
    assert_eq!(of("partner"), 1);

    // An answer without lists takes none away, until its bundle is gone.
    give(&[]);
    let serial = manager.current(&cart()).unwrap().serial().to_owned();
    eventually("another answer", || {
        let now = manager.current(&cart()).unwrap();
        (now.serial() != serial).then_some(())
    })
    .await;
    assert_eq!((of("td"), of("partner")), (2, 1));
    setup.agent.mode(Mode::Good);
    eventually("the partner's end", || (of("partner") == 0).then_some(())).await;
    assert!(!setup.lists.required(&domain("partner")));
    assert_eq!(of("td"), 2);
}

#[tokio::test]
async fn an_own_svid_that_an_answer_revokes_is_replaced() {
    let setup = Setup::after(Mode::Good);
    let trust = TrustStore::new(
        Arc::clone(&setup.bundles),
        Arc::clone(&setup.lists),
        TrustDomainAliases::default(),
    );
    let config = crate::ManagerConfig::default();
    let manager = crate::SvidManager::start(setup.source.clone(), trust, config);
    manager.want(&cart());
    let wait = Duration::from_secs(10);
    let first = manager.ready(&cart(), wait).await.unwrap();
    let mut events = manager.subscribe();
    let params = CrlParams::revoking([&first.chain()[0]]);
    let list = setup.agent.state.ca.crl(0, &params);
    *setup.agent.state.lists.lock().unwrap() = vec![list];
    setup.agent.push();
    let replaced = async {
        loop {
            let event = events.recv().await.unwrap();
            if let crate::SvidEvent::Renewed { svid, replaced, .. } = event {
                return (svid, replaced);
            }
        }
    };
    let (next, replaced) = tokio::time::timeout(wait, replaced).await.unwrap();
    assert_eq!(replaced.as_deref(), Some(first.serial()));
    assert_ne!(next.serial(), first.serial());
}

#[tokio::test]
async fn a_garbage_list_closes_the_own_trust_domain_and_an_older_one_does_not_count() {
    let setup = Setup::after(Mode::Good);
    let td = TrustDomain::parse("td").unwrap();
    let ca = &setup.agent.state.ca;
    let (old, new) = (
        ca.crl(0, &CrlParams::default()),
        ca.crl(0, &CrlParams::default()),
    );
    let give = |list: &[u8]| {
        *setup.agent.state.lists.lock().unwrap() = vec![list.to_vec()];
        setup.agent.push();
    };
    give(&[1, 2, 3]);
    eventually("closed", || setup.lists.required(&td).then_some(())).await;
    assert_eq!(setup.lists.snapshot(), []);
    give(&new);
    let newest = eventually("the list", || setup.lists.snapshot().pop()).await;
    let mut told = setup.source.updates().unwrap();
    give(&old);
    let next = tokio::time::timeout(Duration::from_secs(5), told.recv());
    next.await.unwrap().unwrap();
    assert_eq!(setup.lists.snapshot(), [newest]);
}

#[test]
fn a_list_of_an_intermediate_in_our_chain_belongs_to_our_trust_domain() {
    use crate::workload_proto::{X509Svid, X509SvidResponse};
    let ca = TestCa::new("td").with_intermediate(&CaParams::default());
    let identity = workload("td", "a", "b");
    let pair = rcgen::KeyPair::generate().unwrap();
    let params = crate::testing::LeafParams::good(&identity);
    let chain = ca.chain_for(&params, &pair);
    let answer = |bundle: &[u8]| X509SvidResponse {
        svids: vec![X509Svid {
            spiffe_id: identity.to_string(),
            x509_svid: chain.iter().flat_map(|der| der.to_vec()).collect(),
            x509_svid_key: pair.serialize_der(),
            bundle: bundle.to_vec(),
            hint: String::new(),
        }],
        crl: vec![ca.crl(1, &CrlParams::default())],
        federated_bundles: Default::default(),
    };
    let trust = TrustStore::from(Arc::new(TrustBundles::new()));
    let read = |bundle: &[u8]| crate::spire::read_answer(answer(bundle), &identity, &trust);
    read(ca.root()).unwrap();
    let [status] = trust.revocation().snapshot().try_into().unwrap();
    assert_eq!(status.trust_domain, *ca.trust_domain());
    assert_eq!(status.issuer, "CN=intermediate 0 of td");

    // The bundle turns empty: an error, and the roots in use stay.
    let error = read(&[]).unwrap_err();
    assert!(error.to_string().contains("has no root"), "{error}");
    assert_eq!(
        trust.bundles().roots(ca.trust_domain()),
        [ca.root().clone()]
    );
    let huge = ca.root().repeat(65);
    let error = read(&huge).unwrap_err();
    assert!(
        error.to_string().contains("more than 64 certificates"),
        "{error}"
    );
}
