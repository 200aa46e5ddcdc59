#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use tempfile::TempDir;
use tokio::time::Instant;

use super::*;
use crate::auth::TokenHasher;
use crate::rotate;

const TD: &str = "cluster.local";

struct Lab {
    folder: TempDir,
    ca: Arc<Ca>,
    certificate: Arc<ServerCertificate>,
    state: watch::Sender<Arc<MeshState>>,
}

impl Lab {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let ca = Arc::new(Ca::open(folder.path(), TD).unwrap());
        let state = state(&folder, "a.internal");
        let certificate = ServerCertificate::new(ca.clone(), state.config()).unwrap();
        Self {
            folder,
            ca,
            certificate,
            state: watch::Sender::new(Arc::new(state)),
        }
    }

    /// Runs the task on the paused clock of the test.
    fn keep_fresh(&self) {
        let (certificate, state) = (self.certificate.clone(), self.state.subscribe());
        let (wall, start) = (SystemTime::now(), Instant::now());
        tokio::spawn(async move {
            certificate
                .keep_fresh(state, move || wall + start.elapsed())
                .await;
        });
    }

    fn current(&self) -> Arc<CertifiedKey> {
        self.certificate.current.load_full()
    }
}

fn state(folder: &TempDir, name: &str) -> MeshState {
    let path = folder.path().join("mesh.yaml");
    let text = format!("listen: ['127.0.0.1:0']\nserver_names: [{name}]\n");
    std::fs::write(&path, text).unwrap();
    MeshState::new(MeshConfig::load(&path).unwrap().config, &TokenHasher::new())
}

/// Lets the task run as far as it can without time going by.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn certificate_is_made_again_at_half_its_life_and_not_before() {
    let lab = Lab::new();
    lab.keep_fresh();
    settle().await;
    for _ in 0..3 {
        let made = lab.current();
        tokio::time::sleep(VALIDITY / 2 - Duration::from_secs(60)).await;
        settle().await;
        assert!(Arc::ptr_eq(&made, &lab.current()), "too early");
        tokio::time::sleep(Duration::from_secs(62)).await;
        settle().await;
        assert!(!Arc::ptr_eq(&made, &lab.current()), "too late");
    }
}

#[tokio::test(start_paused = true)]
async fn certificate_is_made_again_when_its_names_or_the_roots_change_and_not_otherwise() {
    let lab = Lab::new();
    lab.keep_fresh();
    settle().await;
    let first = lab.current();
    lab.state
        .send_replace(Arc::new(state(&lab.folder, "a.internal")));
    settle().await;
    assert!(Arc::ptr_eq(&first, &lab.current()));
    lab.state
        .send_replace(Arc::new(state(&lab.folder, "b.internal")));
    settle().await;
    let second = lab.current();
    assert!(!Arc::ptr_eq(&first, &second));

    rotate::prepare(lab.folder.path(), TD).unwrap();
    rotate::switch(lab.folder.path(), TD, true).unwrap();
    assert!(lab.ca.reload().unwrap());
    settle().await;
    assert!(!Arc::ptr_eq(&second, &lab.current()));
}

#[test]
fn clock_that_went_back_makes_the_certificate_due() {
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    assert_eq!(until_due(now + hour, now), Duration::from_secs(1));
    assert_eq!(until_due(now, now), LONGEST_WAIT);
    assert_eq!(until_due(now - VALIDITY, now), Duration::from_secs(1));
}
