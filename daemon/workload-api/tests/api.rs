//! The API as an application uses it: the `spiffe` crate as the client, over a real socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::fs::MetadataExt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ringfence_identity::testing::{LeafParams, TestCa, workload};
use ringfence_identity::{Svid, TrustDomain, WorkloadIdentity};
use ringfence_workload_api::{Caller, Exported, ExportedKey, IssueFuture, Workloads};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use spiffe::WorkloadApiClient;
use tokio::sync::watch;

/// A node with one pod: this process's own network namespace, or none.
struct Node {
    ca: TestCa,
    pod: Option<(Caller, WorkloadIdentity)>,
    bundles: watch::Sender<()>,
}

impl Workloads for Node {
    fn identify(&self, caller: Caller) -> Option<WorkloadIdentity> {
        let (namespace, identity) = self.pod.as_ref()?;
        (*namespace == caller).then(|| identity.clone())
    }

    fn issue<'a>(&'a self, identity: &'a WorkloadIdentity) -> IssueFuture<'a> {
        Box::pin(async move {
            let pair = rcgen::KeyPair::generate().unwrap();
            let key = pair.serialize_der();
            let chain = self.ca.chain_for(&LeafParams::good(identity), &pair);
            let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.as_slice()));
            let svid = Svid::from_der(identity.spiffe_id(), chain, &der, SystemTime::now());
            Ok(Exported {
                svid: Arc::new(svid.unwrap()),
                key: ExportedKey(key.into()),
            })
        })
    }

    fn bundles(&self) -> Vec<(TrustDomain, Vec<Vec<u8>>)> {
        vec![(
            self.ca.trust_domain().clone(),
            vec![self.ca.root().to_vec()],
        )]
    }

    fn bundles_changed(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let mut changes = self.bundles.subscribe();
        Box::pin(async move {
            let _ = changes.changed().await;
        })
    }
}

fn own_namespace() -> Caller {
    let namespace = std::fs::metadata("/proc/self/ns/net").unwrap();
    Caller {
        device: namespace.dev(),
        inode: namespace.ino(),
    }
}

/// Serves and connects; the folder holds the socket.
async fn client_of(
    pod: Option<(Caller, WorkloadIdentity)>,
) -> (WorkloadApiClient, Arc<Node>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let node = Arc::new(Node {
        ca: TestCa::new("td.test"),
        pod,
        bundles: watch::Sender::new(()),
    });
    let listener = ringfence_workload_api::bind(&path).unwrap();
    tokio::spawn(ringfence_workload_api::serve(listener, node.clone()));
    let client = WorkloadApiClient::connect_to(format!("unix:{}", path.display())).await;
    (client.unwrap(), node, folder)
}

/// `SO_PEERPIDFD` is of Linux 6.5: without it nobody gets anything, which other tests show.
fn kernel_names_callers() -> bool {
    let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
    let known = Caller::of(&a).is_ok();
    if !known {
        println!("skipped: this kernel has no SO_PEERPIDFD");
    }
    known
}

#[tokio::test]
async fn an_enrolled_pod_gets_its_own_svid_with_a_key_that_fits() {
    if !kernel_names_callers() {
        return;
    }
    let identity = workload("td.test", "demo", "web");
    let (client, _node, _folder) = client_of(Some((own_namespace(), identity.clone()))).await;
    // The client itself checks that key and certificate belong together.
    let svid = client.fetch_x509_svid().await.unwrap();
    assert_eq!(svid.spiffe_id().to_string(), identity.to_string());
    let bundles = client.fetch_x509_bundles().await.unwrap();
    let domain = spiffe::TrustDomain::new("td.test").unwrap();
    assert!(bundles.get(&domain).is_some());
}

#[tokio::test]
async fn two_callers_never_share_a_key() {
    if !kernel_names_callers() {
        return;
    }
    let pod = (own_namespace(), workload("td.test", "demo", "web"));
    let (client, _node, _folder) = client_of(Some(pod)).await;
    let first = client.fetch_x509_svid().await.unwrap();
    let second = client.fetch_x509_svid().await.unwrap();
    assert_ne!(
        first.private_key().as_bytes(),
        second.private_key().as_bytes()
    );
}

#[tokio::test]
async fn a_caller_outside_every_pod_gets_nothing() {
    let (client, _node, _folder) = client_of(None).await;
    let error = client.fetch_x509_svid().await.unwrap_err();
    assert!(
        format!("{error:?}").contains("NoIdentityIssued"),
        "{error:?}"
    );
    let error = client.fetch_x509_bundles().await.unwrap_err();
    assert!(
        format!("{error:?}").contains("NoIdentityIssued"),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_caller_of_another_namespace_gets_nothing() {
    let mut other = own_namespace();
    other.inode += 1;
    let pod = (other, workload("td.test", "demo", "web"));
    let (client, _node, _folder) = client_of(Some(pod)).await;
    assert!(client.fetch_x509_svid().await.is_err());
}

#[tokio::test]
async fn a_change_of_the_bundle_is_pushed() {
    if !kernel_names_callers() {
        return;
    }
    use tokio_stream::StreamExt;
    let pod = (own_namespace(), workload("td.test", "demo", "web"));
    let (client, node, _folder) = client_of(Some(pod)).await;
    let mut updates = client.stream_x509_contexts().await.unwrap();
    updates.next().await.unwrap().unwrap();
    node.bundles.send_replace(());
    let pushed = tokio::time::timeout(Duration::from_secs(20), updates.next()).await;
    pushed.expect("pushed in time").unwrap().unwrap();
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("precious");
    std::fs::write(&path, "x").unwrap();
    assert!(ringfence_workload_api::bind(&path).is_err());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "x");
}
