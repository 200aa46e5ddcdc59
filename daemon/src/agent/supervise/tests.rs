#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

use ktls_offload::{RecordLayer, SoftwareReason};
use nix::sched::{CloneFlags, unshare};
use ringfence_bpf_common::{
    Addr, IDENTITY_NONE, MAX_TERMS, POD_HOLD, POD_READY, Pod as KernelPod, Query, Reason,
};
use ringfence_datapath::{Datapath, Options};
use ringfence_policies::{
    Action, Clause, CompiledSet, Match, Policy, PolicyChange, Rule, Scope, TermMask,
};
use ringfence_xds::proto::workload as wire;
use tokio::time::{Instant, advance};

use crate::agent::guard::{Guard, State};
use crate::agent::mesh::Workload;
use crate::agent::netns::Netns;
use crate::agent::pods::Pod;
use crate::config::PodConfig;
use crate::status;

/// An agent that nobody talks to, with a data path of its own and one pod.
struct Node {
    agent: Arc<Agent>,
    tables: Tables,
    pending: Changes,
    pod: Arc<Pod>,
    pin_dir: PathBuf,
    _folder: tempfile::TempDir,
}

impl Node {
    /// `None`, visibly, where that cannot be. On a tokio runtime.
    fn of(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED {test}: needs root (eBPF)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("agent.yaml");
        let identity = format!("{{source: {{files: {{directory: {:?}}}}}}}", folder.path());
        let text = format!(
            "node: {{name: node-a, address: 10.77.0.1}}\n\
             control_plane: {{address: 'https://127.0.0.1:1', root_ca: /none, token: /none}}\n\
             identity: {identity}\n"
        );
        std::fs::write(&file, text).unwrap();
        let config = AgentConfig::load(&file).unwrap();
        let id = std::process::id();
        let pin_dir = PathBuf::from(format!("/sys/fs/bpf/ringfence-{test}-{id}"));
        let datapath = Datapath::load(Options {
            pin_dir: pin_dir.clone(),
            cgroup: None,
        })
        .unwrap();
        let tables = Tables::read("", &datapath).unwrap();
        let records = RecordLayer::Software(SoftwareReason::Configured);
        let agent = Arc::new(Agent::new(config, records, datapath).unwrap());
        agent.sync.addresses();
        agent.sync.policies();
        let netns = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let up = Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status();
            assert!(up.unwrap().success());
            std::fs::File::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", netns.as_raw_fd()));
        let config = PodConfig {
            netns: path.clone(),
            namespace: "demo".into(),
            name: "web".into(),
        };
        let guard = Guard::new(State::Off("not tested here".into()));
        let pod = Arc::new(Pod::new(config, Netns::open(&path).unwrap(), guard));
        agent.pods.insert(pod.clone());
        Some(Node {
            agent,
            tables,
            pending: Changes::default(),
            pod,
            pin_dir,
            _folder: folder,
        })
    }

    fn put_workload(&self, policies: &[&str]) {
        let workload = wire::Workload {
            uid: "u".into(),
            name: "web".into(),
            namespace: "demo".into(),
            addresses: vec![vec![127, 0, 0, 1]],
            tunnel_protocol: wire::TunnelProtocol::Hbone as i32,
            authorization_policies: policies.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let workload = Workload::from_wire(workload).unwrap();
        self.agent.mesh_mut().put_workload(workload);
    }

    /// One rule for each port from 1 on, so many terms.
    fn admit_ports(&self, ports: usize) {
        let rule = |port: usize| Rule {
            clauses: vec![Clause {
                matches: vec![Match {
                    destination_ports: vec![u16::try_from(port).unwrap()],
                    ..Match::default()
                }],
            }],
        };
        let policy = Policy {
            name: "demo/ports".parse().unwrap(),
            scope: Scope::Namespace,
            action: Action::Allow,
            dry_run: false,
            rules: (1..=ports).map(rule).collect(),
        };
        let change = PolicyChange::Put(policy);
        self.agent.mesh_mut().change_policies([change]);
    }

    fn pass(&mut self) {
        reconcile(&self.agent, &mut self.tables, &mut self.pending);
    }

    /// The pod's entry in the kernel.
    fn entry(&self) -> KernelPod {
        let cookie = self.pod.netns.cookie();
        self.agent.datapath.pod(cookie).unwrap().unwrap()
    }

    /// What the kernel says of a plaintext connection to a port of the pod.
    fn judge(&self, port: u16) -> Reason {
        let query = Query {
            set: self.entry().policy_set,
            identity: IDENTITY_NONE,
            source: Addr::v4([10, 0, 0, 9]),
            port,
            destination_v4: true,
        };
        self.agent.datapath.judge(&[query]).unwrap()[0].reason
    }

    /// The line of the status page.
    fn status(&self) -> status::Pod {
        self.agent.status().pods.remove(0)
    }

    /// From now on there is no entry for the pod and no room for one, until one of those
    /// that are returned is withdrawn.
    fn leave_no_room_for_the_pod(&self) -> Vec<u64> {
        let datapath = &self.agent.datapath;
        datapath.withdraw(self.pod.netns.cookie()).unwrap();
        let nobodys = 1 << 60..1 << 61;
        let fits = |cookie: &u64| datapath.update_pod(*cookie, &KernelPod::default()).is_ok();
        nobodys.take_while(fits).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        ringfence_datapath::remove(&self.pin_dir).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn wait_that_is_over_ends_although_the_kernel_refuses_and_is_settled_later() {
    let Some(mut node) = Node::of("refused-late") else {
        return;
    };
    let begin = Instant::now();
    let patience = node.agent.config.policy_hold();
    node.put_workload(&["demo/late"]);
    node.pass();
    assert_eq!(node.pod.hold.until(), Some(begin + patience));
    assert_eq!(node.entry().flags & POD_HOLD, POD_HOLD);

    let others = node.leave_no_room_for_the_pod();
    advance(patience).await;
    node.pass();
    // Else the supervisor would be woken by it at once, for ever.
    assert_eq!(node.pod.hold.until(), None);
    let cookie = node.pod.netns.cookie();
    assert_eq!(node.agent.datapath.pod(cookie).unwrap(), None);
    // With the next tick, without any news.
    node.agent.datapath.withdraw(others[0]).unwrap();
    node.pass();
    assert_eq!(node.entry().flags & (POD_READY | POD_HOLD), POD_READY);
    assert_eq!(node.judge(80), Reason::PolicyNotReceived);
    assert!(node.pending.workloads.is_empty(), "and then no more");
}

#[tokio::test(start_paused = true)]
async fn wait_that_is_not_over_goes_on_although_the_kernel_refuses() {
    let Some(mut node) = Node::of("refused-early") else {
        return;
    };
    let begin = Instant::now();
    let patience = node.agent.config.policy_hold();
    node.put_workload(&["demo/late"]);
    node.pass();
    node.leave_no_room_for_the_pod();
    advance(patience / 2).await;
    node.pass();
    assert_eq!(node.pod.hold.until(), Some(begin + patience));
}

#[tokio::test]
async fn policies_past_a_limit_close_the_pod_and_status_says_which() {
    let Some(mut node) = Node::of("limit") else {
        return;
    };
    node.put_workload(&[]);
    node.admit_ports(MAX_TERMS);
    node.pass();
    assert_eq!(node.judge(80), Reason::Allowed);
    assert_eq!(node.status().reason, None, "as many as fit");

    node.admit_ports(MAX_TERMS + 1);
    node.pass();
    assert_eq!(node.judge(80), Reason::Unrepresentable);
    let reason = node.status().reason.unwrap();
    assert!(reason.contains("demo/ports"), "{reason}");
    assert!(reason.contains("16384"), "{reason}");

    node.admit_ports(80);
    node.pass();
    assert_eq!(node.judge(80), Reason::Allowed);
    assert_eq!(node.status().reason, None);
}

#[tokio::test]
async fn policies_the_kernel_has_no_room_for_close_the_pod_and_status_says_so() {
    let Some(mut node) = Node::of("no-room") else {
        return;
    };
    node.put_workload(&[]);
    node.admit_ports(80);
    node.pass();
    assert_eq!(node.judge(80), Reason::Allowed);

    let install = |set: &u32| {
        let plaintext = [(IDENTITY_NONE, TermMask::default())];
        let datapath = &node.agent.datapath;
        let result = datapath.install_set(*set, &CompiledSet::default(), &plaintext);
        match result {
            Ok(()) => true,
            Err(DatapathError::Full { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    };
    let others: Vec<u32> = (1 << 30..1 << 31).take_while(install).collect();
    assert!(others.len() > 1000);
    // What was in force admits the port, and so would what cannot be put in its place.
    node.admit_ports(81);
    node.pass();
    assert_eq!(node.entry().policy_set, 0);
    assert_eq!(node.judge(80), Reason::NoPolicySet);
    let reason = node.status().reason.unwrap();
    assert!(reason.contains("not in force"), "{reason}");
    assert!(reason.contains("POLICY_"), "which table: {reason}");

    // Once there is room, the next tick does it.
    for set in others {
        node.agent.datapath.remove_set(set).unwrap();
    }
    node.agent.datapath.collect_sets().unwrap();
    node.pass();
    assert_eq!(node.judge(81), Reason::Allowed);
    assert_eq!(node.judge(82), Reason::NotAllowed);
    assert_eq!(node.status().reason, None);
}
