//! What an SVID under management adds to the process's anonymous memory, aws-lc's share
//! included. Each figure comes from a process that has done nothing else.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringfence_identity::testing::{TestCa, workload};
use ringfence_identity::{
    FetchFuture, Issued, ManagerConfig, SvidManager, SvidSource, TrustBundles, WorkloadIdentity,
};
use serde_json::{Value, json};

/// Makes this program measure, for the number of identities that follows.
pub(super) const CHILD: &str = "--memory-of";

pub(super) fn in_processes_of_their_own(counts: &[usize]) -> Vec<Value> {
    let program = std::env::current_exe().unwrap();
    let measured = counts.iter().map(|count| {
        eprintln!("memory of {count} SVIDs");
        let output = Command::new(&program)
            .args([CHILD, &count.to_string()])
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", output.status);
        serde_json::from_slice(&output.stdout).unwrap()
    });
    measured.collect()
}

pub(super) fn measure(count: usize) -> Value {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let source = Arc::new(Source(TestCa::new("cluster.local")));
        let bundles = Arc::new(TrustBundles::new());
        let manager = SvidManager::start(source, bundles, ManagerConfig::default());
        // The first one pays for what there is once.
        issue(&manager, &workload("cluster.local", "bench", "first")).await;
        let identities: Vec<_> = (0..count)
            .map(|n| workload("cluster.local", "bench", &format!("sa-{n}")))
            .collect();
        let (before, start) = (anonymous_bytes(), Instant::now());
        identities
            .iter()
            .for_each(|identity| manager.want(identity));
        for identity in &identities {
            let svid = manager.ready(identity, Duration::from_secs(600)).await;
            svid.expect("issued");
        }
        let seconds = start.elapsed().as_secs_f64();
        let bytes = anonymous_bytes().saturating_sub(before);
        json!({
            "identities": count,
            "bytes_each": bytes / count,
            "per_mib": count as f64 / (bytes as f64 / f64::from(1 << 20)),
            "issued_in_seconds": seconds,
        })
    })
}

async fn issue(manager: &SvidManager, identity: &WorkloadIdentity) {
    manager.want(identity);
    let svid = manager.ready(identity, Duration::from_secs(60)).await;
    svid.expect("issued");
}

/// Issues from memory.
struct Source(TestCa);

impl SvidSource for Source {
    fn name(&self) -> &str {
        "bench"
    }

    fn fetch<'a>(&'a self, identity: &'a WorkloadIdentity, _ttl: Duration) -> FetchFuture<'a> {
        let svid = Arc::new(self.0.svid(identity));
        let roots = vec![self.0.root().clone()];
        Box::pin(async move { Ok(Issued { svid, roots }) })
    }
}

fn anonymous_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
    let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}
