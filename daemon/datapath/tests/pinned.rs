//! What outlives the agent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{fs, path::Path};

use ringfence_bpf_common::{Backend, Mask, PolicySet, SET_STRICT, WORKLOAD_MESH};
use ringfence_datapath::{Datapath, DatapathError, Options};
use support::*;

#[test]
fn restarted_agent_takes_over_what_is_pinned() {
    if !can_run("restarted_agent_takes_over_what_is_pinned") {
        return;
    }
    let mut lab = Lab::new();
    let vip = endpoint(VIP4, 80);
    let backend = |port| Backend {
        endpoint: endpoint(PLAIN4, port),
        flags: 0,
    };
    lab.datapath.put_service(vip, &[backend(8080)]).unwrap();
    let agent = lab.agent(POD4);
    let server = lab.wire.listen(at(PLAIN4, 8080));
    let waiting = lab.pod.connect(at(MESH4, 80)).unwrap();

    for _ in 0..2 {
        lab.restart();
        lab.enrol();
    }
    let (_, source) = agent.accept().unwrap();
    let record = lab
        .datapath
        .take_original_destination(lab.cookie, source, at(POD4, OUTBOUND));
    assert_eq!(
        record.unwrap().asked,
        endpoint(MESH4, 80),
        "made before the restart"
    );
    assert_eq!(waiting.peer_addr().unwrap(), at(MESH4, 80));

    assert_eq!(lab.datapath.pods().unwrap(), [lab.cookie]);
    assert_eq!(lab.datapath.pod(lab.cookie).unwrap(), Some(lab.entry()));
    assert_eq!(lab.datapath.services().unwrap(), [vip]);
    assert_eq!(lab.datapath.policy_sets().unwrap(), [SET]);
    let mut workloads = lab.datapath.workloads().unwrap();
    workloads.sort_by_key(|(addr, _)| *addr);
    assert!(
        workloads
            .iter()
            .all(|(_, workload)| workload.flags == WORKLOAD_MESH)
    );
    assert_eq!(workloads.len(), 2);

    // One program decides, not two in a row.
    let app = lab.pod.connect(at(MESH4, 80)).unwrap();
    let (_, source) = agent.accept().unwrap();
    let record = lab
        .datapath
        .take_original_destination(lab.cookie, source, at(POD4, OUTBOUND));
    assert_eq!(record.unwrap().asked, endpoint(MESH4, 80));
    drop(app);
    lab.pod.connect(at(VIP4, 80)).unwrap();
    server.accept().unwrap();
    // The new agent can change what the old one wrote.
    let moved = lab.wire.listen(at(PLAIN4, 8081));
    lab.datapath.put_service(vip, &[backend(8081)]).unwrap();
    lab.pod.connect(at(VIP4, 80)).unwrap();
    moved.accept().unwrap();
    lab.datapath.remove_set(SET).unwrap();
}

#[test]
fn enforcement_goes_on_without_an_agent() {
    if !can_run("enforcement_goes_on_without_an_agent") {
        return;
    }
    let lab = Lab::new();
    let set = PolicySet {
        flags: SET_STRICT,
        ..Default::default()
    };
    lab.install(&set, &[(0, Mask::NONE)]);
    let Lab { ref datapath, .. } = lab;
    // Dropping the handle is what the death of the process does to the descriptors.
    let _ = datapath;
    let pin_dir = lab.pin_dir().clone();
    let second = Datapath::load(Options {
        pin_dir,
        cgroup: None,
    })
    .unwrap();
    drop(second);
    let _agent = lab.agent(POD4);
    let _server = lab.pod.listen(at(POD4, 8080));
    lab.pod.connect(at(MESH4, 80)).unwrap();
    assert_eq!(lab.counter("redirected"), 1);
    assert_eq!(errno(lab.wire.connect(at(POD4, 8080))), libc::ECONNREFUSED);
}

#[test]
fn removal_leaves_nothing() {
    if !can_run("removal_leaves_nothing") {
        return;
    }
    let lab = Lab::new();
    let server = lab.wire.listen(at(MESH4, 8080));
    let own = lab.pod.listen(at(POD4, 8080));
    lab.install(
        &PolicySet {
            flags: SET_STRICT,
            ..Default::default()
        },
        &[],
    );
    assert!(lab.pod.connect(at(MESH4, 8080)).is_err());
    assert!(lab.wire.connect(at(POD4, 8080)).is_err());
    ringfence_datapath::remove(lab.pin_dir()).unwrap();
    assert!(!lab.pin_dir().exists());
    lab.pod.connect(at(MESH4, 8080)).unwrap();
    server.accept().unwrap();
    lab.wire.connect(at(POD4, 8080)).unwrap();
    own.accept().unwrap();
}

#[test]
fn pod_whose_namespace_ended_is_collected() {
    if !can_run("pod_whose_namespace_ended_is_collected") {
        return;
    }
    let mut lab = Lab::new();
    assert!(
        lab.datapath.collect_dead_pods().unwrap().is_empty(),
        "it lives"
    );
    lab.pod = Netns::new();
    eventually("the dead pod is collected", || {
        lab.datapath.collect_dead_pods().unwrap() == [lab.cookie]
    });
    assert!(lab.datapath.pods().unwrap().is_empty());
}

#[test]
fn another_layout_is_not_taken_over() {
    if !can_run("another_layout_is_not_taken_over") {
        return;
    }
    let lab = Lab::new();
    fs::create_dir(lab.pin_dir().join("v4000000000")).unwrap();
    let options = Options {
        pin_dir: lab.pin_dir().clone(),
        cgroup: None,
    };
    assert!(matches!(
        Datapath::load(options),
        Err(DatapathError::OtherLayout { .. })
    ));
}

#[test]
fn folder_that_is_no_bpf_file_system_is_refused() {
    if !can_run("folder_that_is_no_bpf_file_system_is_refused") {
        return;
    }
    let options = Options {
        pin_dir: Path::new("/tmp/ringfence-nowhere").into(),
        cgroup: None,
    };
    assert!(matches!(
        Datapath::load(options),
        Err(DatapathError::NoBpfFs { .. })
    ));
    assert!(!Path::new("/tmp/ringfence-nowhere").exists());
}

#[test]
fn retired_policy_set_disappears() {
    if !can_run("retired_policy_set_disappears") {
        return;
    }
    let lab = Lab::new();
    for set in 100..200 {
        let set_entries = [(1, Mask::ALL)];
        lab.datapath
            .install_set(
                set,
                &PolicySet::default(),
                &set_entries,
                &[],
                &[(1, Mask::ALL)],
            )
            .unwrap();
        lab.datapath.remove_set(set).unwrap();
    }
    let left = lab.datapath.policy_sets().unwrap();
    assert!(left.len() < 70, "{} sets are left", left.len());
    assert!(left.contains(&SET));
    assert!(matches!(
        lab.datapath
            .install_set(0, &PolicySet::default(), &[], &[], &[]),
        Err(DatapathError::ReservedSet)
    ));
}

#[test]
fn maps_of_another_size_are_not_taken_over() {
    if !can_run("maps_of_another_size_are_not_taken_over") {
        return;
    }
    let lab = Lab::new();
    let pin = lab.pin_dir().join("v1").join("PODS");
    fs::remove_file(&pin).unwrap();
    let smaller = aya::maps::HashMap::<_, u64, u64>::create(16, 0).unwrap();
    smaller.pin(&pin).unwrap();
    let options = Options {
        pin_dir: lab.pin_dir().clone(),
        cgroup: None,
    };
    assert!(matches!(
        Datapath::load(options),
        Err(DatapathError::OtherLayout { .. })
    ));
}
