//! What outlives the agent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{fs, net::IpAddr, path::Path};

use ringfence_bpf_common::{
    Addr, Backend, IDENTITY_NONE, LAYOUT_VERSION, Query, Reason, SET_HAS_ALLOW, SET_STRICT,
    WORKLOAD_MESH,
};
use ringfence_datapath::{Datapath, DatapathError, Options, PolicyUsage};
use ringfence_policies::{CompiledSet, SourcePrefix, TermMask};
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
    let (stream, _) = agent.accept().unwrap();
    let record = lab.original(&stream);
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
    let (stream, _) = agent.accept().unwrap();
    let record = lab.original(&stream);
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
    lab.install(SET_STRICT, &[(0, terms(&[]))]);
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
    lab.install(SET_STRICT, &[]);
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
    let mut content = any_connection(0);
    content.ports = vec![(1, terms(&[7]))];
    let bound = [(1, terms(&[7]))];
    for set in 100..200 {
        lab.datapath.install_set(set, &content, &bound).unwrap();
        lab.datapath.remove_set(set).unwrap();
    }
    let left = lab.datapath.policy_sets().unwrap();
    assert!(left.len() < 70, "{} sets are left", left.len());
    assert!(left.contains(&SET));
    assert!(matches!(
        lab.datapath.install_set(0, &CompiledSet::default(), &[]),
        Err(DatapathError::ReservedSet)
    ));
}

#[test]
fn maps_of_another_size_are_not_taken_over() {
    if !can_run("maps_of_another_size_are_not_taken_over") {
        return;
    }
    let lab = Lab::new();
    let pin = lab
        .pin_dir()
        .join(format!("v{LAYOUT_VERSION}"))
        .join("PODS");
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

/// As many blocks as wanted, each for a port of its own.
fn of_blocks(number: u16, length: u16) -> CompiledSet {
    let mut set = any_connection(SET_HAS_ALLOW);
    set.ports = (0..number)
        .map(|port| {
            // No two masks are equal.
            let mask = (0..length).map(|block| block * 256 + (port + block) % 256);
            (port + 1, terms(&mask.collect::<Vec<_>>()))
        })
        .collect();
    set
}

fn usage(lab: &Lab) -> PolicyUsage {
    lab.datapath.policy_usage()
}

fn asks(lab: &Lab, set: u32, identity: u32, port: u16) -> (Reason, u16) {
    let query = Query {
        set,
        identity,
        source: Addr::from(PLAIN4),
        port,
        destination_v4: true,
    };
    let verdict = lab.datapath.judge(&[query]).unwrap()[0];
    (verdict.reason, verdict.term)
}

#[test]
fn restarted_agent_knows_which_blocks_are_in_use() {
    if !can_run("restarted_agent_knows_which_blocks_are_in_use") {
        return;
    }
    let mut lab = Lab::new();
    let bare = usage(&lab);
    // Three of these share most of their blocks.
    let wide = |own: u16| terms(&[own, 300, 600, 900, 1200]);
    let bound = [
        (IDENTITY_NONE, terms(&[3])),
        (9, terms(&[4, 300])),
        (11, wide(5)),
        (12, wide(6)),
    ];
    let mut set = of_blocks(40, 2);
    // Two prefixes and a marker.
    set.sources = [("fd01::", 16), ("fd02::", 17), ("fd03::", 32)]
        .map(|(addr, length)| {
            let addr = addr.parse::<IpAddr>().unwrap().into();
            (SourcePrefix { addr, length }, terms(&[u16::from(length)]))
        })
        .into();
    lab.datapath.install_set(50, &set, &bound).unwrap();
    lab.datapath.bind_identity(50, 10, &wide(7)).unwrap();
    let before = usage(&lab);
    assert_eq!(before.sources, bare.sources + 4);
    let verdict = asks(&lab, 50, IDENTITY_NONE, 4);
    assert_eq!(verdict, (Reason::Allowed, 3));

    lab.restart();
    assert_eq!(usage(&lab), before);
    assert_eq!(asks(&lab, 50, 12, 7), (Reason::Allowed, 6));
    // What is installed now overwrites nothing of it.
    let other = [(IDENTITY_NONE, terms(&[0]))];
    lab.datapath.install_set(51, &set, &other).unwrap();
    assert_eq!(asks(&lab, 50, IDENTITY_NONE, 4), verdict);
    assert_eq!(asks(&lab, 50, 12, 7), (Reason::Allowed, 6));
    for (set, expected) in [(51, before), (50, bare)] {
        lab.datapath.remove_set(set).unwrap();
        lab.restart();
        // A set that nobody points at any more was not given back yet.
        lab.datapath.remove_set(set).unwrap();
        eventually("the set is given back", || {
            lab.datapath.collect_sets().unwrap();
            usage(&lab) == expected
        });
    }
}

#[test]
fn half_a_set_of_a_killed_agent_is_removed() {
    if !can_run("half_a_set_of_a_killed_agent_is_removed") {
        return;
    }
    let mut lab = Lab::new();
    let before = usage(&lab);
    // An identity of a set that does not exist, as after a kill.
    lab.datapath.bind_identity(77, 5, &terms(&[1, 2])).unwrap();
    assert_ne!(usage(&lab), before);
    lab.restart();
    assert_eq!(usage(&lab), before);
    assert_eq!(asks(&lab, 77, 5, 1).0, Reason::NoPolicySet);
}

#[test]
fn exhausted_blocks_refuse_the_set_and_leave_nothing() {
    if !can_run("exhausted_blocks_refuse_the_set_and_leave_nothing") {
        return;
    }
    let lab = Lab::new();
    let plaintext = [(IDENTITY_NONE, terms(&[0]))];
    // 16 384 blocks each, of 262 144.
    let large = of_blocks(256, 64);
    let mut installed = Vec::new();
    let error = (100..120).find_map(|set| {
        let result = lab.datapath.install_set(set, &large, &plaintext);
        if result.is_ok() {
            installed.push(set);
        }
        result.err()
    });
    assert!(
        matches!(error, Some(DatapathError::Full { table }) if table == "POLICY_BLOCKS"),
        "{error:?}"
    );
    assert_eq!(installed.len(), 15);
    let full = usage(&lab);
    assert_eq!((full.sets, full.ports), (1 + 15, 15 * 256));
    assert_eq!(lab.datapath.policy_sets().unwrap().len(), 16);
    assert_eq!(asks(&lab, 115, IDENTITY_NONE, 1).0, Reason::NoPolicySet);
    // Those that are installed decide as before, and a small one still fits.
    assert_eq!(asks(&lab, 100, IDENTITY_NONE, 1), (Reason::Allowed, 0));
    lab.datapath
        .install_set(200, &of_blocks(3, 1), &plaintext)
        .unwrap();
    // Every second one goes: the gaps serve what comes, at once.
    for set in installed.iter().step_by(2) {
        lab.datapath.remove_set(*set).unwrap();
    }
    for set in 300..308 {
        lab.datapath.install_set(set, &large, &plaintext).unwrap();
        assert_eq!(asks(&lab, set, IDENTITY_NONE, 1), (Reason::Allowed, 0));
    }
    assert_eq!(usage(&lab).blocks, full.blocks + 4);
}

#[test]
fn identities_without_room_are_refused_and_the_rest_goes_on() {
    if !can_run("identities_without_room_are_refused_and_the_rest_goes_on") {
        return;
    }
    let lab = Lab::new();
    let plaintext = [(IDENTITY_NONE, TermMask::default())];
    lab.datapath
        .install_set(60, &any_connection(SET_HAS_ALLOW), &plaintext)
        .unwrap();
    lab.datapath.bind_identity(60, 1, &terms(&[1])).unwrap();
    lab.datapath.bind_identity(60, 2, &terms(&[1])).unwrap();
    let shared = usage(&lab).blocks;
    lab.datapath.bind_identity(60, 3, &terms(&[1])).unwrap();
    assert_eq!(usage(&lab).blocks, shared, "equal masks share their blocks");
    lab.datapath.unbind_identities(60, &[1, 3]).unwrap();
    assert_eq!(asks(&lab, 60, 1, 1).0, Reason::UnknownIdentity);
    assert_eq!(asks(&lab, 60, 2, 1), (Reason::Allowed, 1));
    lab.datapath.bind_identity(60, 1, &terms(&[1])).unwrap();
    assert_eq!(asks(&lab, 60, 1, 1), (Reason::Allowed, 1));
}
