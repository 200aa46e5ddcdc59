//! What was valid stays in use, whatever breaks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::manager::{ManagerConfig, SvidEvent, SvidManager, SvidState};
use crate::source::SourceUpdate;

/// The client, told when to fetch again.
struct Announced(CaClient, tokio::sync::broadcast::Sender<SourceUpdate>);

impl SvidSource for Announced {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn fetch<'a>(&'a self, identity: &'a WorkloadIdentity, ttl: Duration) -> FetchFuture<'a> {
        Box::pin(self.0.fetch(identity, ttl))
    }

    fn updates(&self) -> Option<tokio::sync::broadcast::Receiver<SourceUpdate>> {
        Some(self.1.subscribe())
    }
}

#[tokio::test]
async fn whatever_breaks_the_valid_svid_and_its_roots_stay_in_use() {
    let setup = Setup::new().await;
    let identity = workload("td", "shop", "cart");
    let client = CaClient::new(config(setup.address, setup.dir.path())).unwrap();
    let again = tokio::sync::broadcast::Sender::new(16);
    let bundles = Arc::new(crate::TrustBundles::new());
    let source = Arc::new(Announced(client, again.clone()));
    let manager = SvidManager::start(source, Arc::clone(&bundles), ManagerConfig::default());
    let mut events = manager.subscribe();
    manager.want(&identity);
    let wait = Duration::from_secs(10);
    let good = manager.ready(&identity, wait).await.unwrap();
    assert!(matches!(events.recv().await, Ok(SvidEvent::Renewed { .. })));

    let (token, root) = (setup.file("token"), setup.file("root.pem"));
    let (right_token, right_root) = (
        std::fs::read(&token).unwrap(),
        std::fs::read(&root).unwrap(),
    );
    let refused_with = async |what: &str| {
        again.send(SourceUpdate::All).unwrap();
        let failing = async {
            loop {
                let status = manager.snapshot().remove(0);
                let error = status.last_error.unwrap_or_default();
                if error.contains(what) {
                    assert_eq!(status.state, SvidState::RefreshFailing);
                    return error;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let error = tokio::time::timeout(wait, failing).await;
        let error = error.unwrap_or_else(|_| panic!("never: {what}"));
        assert!(error.contains("spiffe://td/ns/shop/sa/cart"), "{error}");
        assert!(error.contains(&setup.address.to_string()), "{error}");
        let current = manager.current(&identity).unwrap();
        assert!(Arc::ptr_eq(&current, &good), "{what}");
        let roots = bundles.roots(identity.trust_domain());
        assert_eq!(roots, [setup.server.ca.root().clone()], "{what}");
    };
    std::fs::remove_file(&token).unwrap();
    refused_with("token file").await;
    std::fs::write(&token, right_token).unwrap();
    std::fs::remove_file(&root).unwrap();
    refused_with("root file").await;
    std::fs::write(&root, right_root).unwrap();
    for (answer, what) in [
        (Answer::EmptyRoots, "element 2 holds no PEM certificate"),
        (Answer::EmptyChain, "holds no certificate"),
        (Answer::IssuerBeforeLeaf, "leaf-is-ca"),
        (Answer::LongChain, "more than"),
        (Answer::OtherIdentity, "is for spiffe://td/ns/shop/sa/admin"),
        (Answer::OtherKey, "not for our key"),
        (Answer::Expired, "expired"),
        (Answer::Garbage, "element 1"),
    ] {
        *setup.server.answer.lock().unwrap() = answer;
        refused_with(what).await;
    }

    *setup.server.answer.lock().unwrap() = Answer::Good;
    again.send(SourceUpdate::All).unwrap();
    let renewed = tokio::time::timeout(wait, events.recv()).await;
    assert!(matches!(renewed, Ok(Ok(SvidEvent::Renewed { .. }))));
    assert_eq!(manager.snapshot().remove(0).state, SvidState::Ready);
}
