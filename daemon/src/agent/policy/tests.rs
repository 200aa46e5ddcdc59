#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use ringfence_bpf_common::Reason;
use ringfence_datapath::Options;
use ringfence_policies::{Action, Clause, Match, Policy, PolicyStore, Rule, Scope};
use std::path::PathBuf;

/// A data path of its own; `None`, visibly, where that cannot be.
struct Kernel(Datapath, PathBuf);

impl Kernel {
    fn of(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED {test}: needs root (eBPF)");
            return None;
        }
        let id = std::process::id();
        let pin_dir = PathBuf::from(format!("/sys/fs/bpf/ringfence-{test}-{id}"));
        let options = Options {
            pin_dir: pin_dir.clone(),
            cgroup: None,
        };
        Some(Kernel(Datapath::load(options).unwrap(), pin_dir))
    }

    fn judge(&self, set: u32, identity: u32) -> Reason {
        let query = Query {
            set,
            identity,
            source: Addr::v4([10, 0, 0, 9]),
            port: 80,
            destination_v4: true,
        };
        self.0.judge(&[query]).unwrap()[0].reason
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        ringfence_datapath::remove(&self.1).unwrap();
    }
}

fn allowing(name: &str, one: Match) -> Policy {
    Policy {
        name: name.parse().unwrap(),
        scope: Scope::Namespace,
        action: Action::Allow,
        dry_run: false,
        rules: vec![Rule {
            clauses: vec![Clause { matches: vec![one] }],
        }],
    }
}

fn from_namespace(name: &str) -> Match {
    Match {
        namespaces: vec![ringfence_policies::StringMatch::exact(name).unwrap()],
        ..Match::default()
    }
}

fn at(last: u8) -> WorkloadAddresses {
    by_family(&[IpAddr::from([10, 0, 0, last])])
}

fn sets_after(highest: u32) -> Sets {
    Sets::after(highest, Histogram::new([1.0]))
}

const NAMES_NONE: [&str; 0] = [];

#[test]
fn pods_with_the_same_policies_share_a_set_until_none_is_left() {
    let Some(kernel) = Kernel::of("share") else {
        return;
    };
    let mut store = PolicyStore::new("root");
    store.insert(allowing("a/p", from_namespace("a")));
    store.insert(allowing("b/p", from_namespace("a")));
    let sets = sets_after(7);
    let acquire = |namespace: &str, last| {
        let policies = store.applicable(namespace, NAMES_NONE);
        sets.acquire(policies, at(last), &kernel.0).unwrap()
    };
    let (one, same, other) = (acquire("a", 1), acquire("a", 2), acquire("b", 3));
    assert_eq!(one.number(), 8, "after those of an earlier agent");
    assert_eq!(one.number(), same.number());
    assert_ne!(one.number(), other.number());
    assert_eq!(kernel.0.policy_usage().sets, 2);
    sets.release(&one, &kernel.0).unwrap();
    assert_eq!(
        acquire("a", 1).number(),
        one.number(),
        "one pod had it still"
    );
    sets.release(&one, &kernel.0).unwrap();
    sets.release(&same, &kernel.0).unwrap();
    // The number is not given again, so that nothing judged by it is taken for new.
    assert!(acquire("a", 1).number() > other.number());
}

#[test]
fn policy_that_looks_at_the_destination_is_shared_by_address_only() {
    let Some(kernel) = Kernel::of("destination") else {
        return;
    };
    let mut store = PolicyStore::new("root");
    let one = Match {
        destination_ips: vec!["10.0.0.1/32".parse().unwrap()],
        ..Match::default()
    };
    store.insert(allowing("a/p", one));
    let sets = sets_after(0);
    let acquire = |last| {
        let policies = store.applicable("a", NAMES_NONE);
        sets.acquire(policies, at(last), &kernel.0)
            .unwrap()
            .number()
    };
    let (first, second) = (acquire(1), acquire(2));
    assert_ne!(first, second);
    assert_eq!((acquire(1), acquire(2)), (first, second));
    let verdicts = [first, second].map(|set| kernel.judge(set, IDENTITY_NONE));
    assert_eq!(verdicts, [Reason::Allowed, Reason::NotAllowed]);
}

#[test]
fn identity_is_prepared_when_it_first_connects() {
    let Some(kernel) = Kernel::of("identity") else {
        return;
    };
    let identities = Identities::default();
    let id = |namespace| {
        let id = format!("spiffe://cluster.local/ns/{namespace}/sa/x");
        let id = SpiffeId::parse(&id).unwrap();
        identities
            .number(&id, &TrustDomainAliases::default())
            .unwrap()
    };
    let (friend, foe) = (id("a"), id("b"));
    let mut store = PolicyStore::new("root");
    store.insert(allowing("a/p", from_namespace("a")));
    let sets = sets_after(0);
    let policies = store.applicable("a", NAMES_NONE);
    let set = sets.acquire(policies, at(1), &kernel.0).unwrap();
    let pod = PodPolicy::default();
    let judged = |identity| Judged {
        set: set.number(),
        identity,
        source: [10, 0, 0, 9].into(),
        destination: ([10, 0, 0, 1], 80).into(),
    };
    assert!(
        !pod.admits(&identities, &judged(friend), false),
        "no set, no entry"
    );
    pod.replace(Some(set.clone()), |_| Ok(())).unwrap();
    for (identity, expected) in [(friend, Reason::Allowed), (foe, Reason::NotAllowed)] {
        let number = set.number();
        assert_eq!(kernel.judge(number, identity), Reason::UnknownIdentity);
        let admits = expected == Reason::Allowed;
        assert_eq!(pod.admits(&identities, &judged(identity), false), admits);
        let connect = || kernel.judge(number, identity);
        let (by, reason) = pod
            .with_identity(&identities, &kernel.0, identity, connect)
            .unwrap();
        assert_eq!((by, reason), (number, expected));
    }
}

#[tokio::test(start_paused = true)]
async fn idle_identities_make_room_and_those_in_use_keep_theirs() {
    let Some(kernel) = Kernel::of("idle") else {
        return;
    };
    let identities = Identities::default();
    let mut store = PolicyStore::new("root");
    store.insert(allowing("a/p", from_namespace("a")));
    let sets = Sets {
        enough_bound: 2,
        ..sets_after(0)
    };
    let policies = store.applicable("a", NAMES_NONE);
    let set = sets.acquire(policies, at(1), &kernel.0).unwrap();
    let pod = PodPolicy::default();
    pod.replace(Some(set.clone()), |_| Ok(())).unwrap();
    let [idle, used, third, fourth] = ["w", "x", "y", "z"].map(|account| {
        let id = SpiffeId::parse(&format!("spiffe://td/ns/a/sa/{account}")).unwrap();
        let aliases = TrustDomainAliases::default();
        identities.number(&id, &aliases).unwrap()
    });
    let connects = |identity| {
        let connect = || kernel.judge(set.number(), identity);
        let judged = pod.with_identity(&identities, &kernel.0, identity, connect);
        judged.unwrap().1
    };
    let in_kernel = || {
        let of = |identity| kernel.judge(set.number(), identity) == Reason::Allowed;
        [idle, used, third, fourth].map(of)
    };
    assert_eq!([idle, used].map(connects), [Reason::Allowed; 2]);
    tokio::time::advance(IDLE / 2).await;
    assert_eq!(connects(used), Reason::Allowed);
    // Nobody is idle: who comes is admitted all the same, and nobody loses anything.
    assert_eq!(connects(third), Reason::Allowed);
    assert_eq!(in_kernel(), [true, true, true, false]);

    tokio::time::advance(IDLE / 2).await;
    assert_eq!(connects(fourth), Reason::Allowed);
    assert_eq!(
        in_kernel(),
        [false, true, true, true],
        "the idle one is gone"
    );
    assert_eq!(kernel.judge(set.number(), idle), Reason::UnknownIdentity);
    // Its live streams are judged as before, and its next connection brings it back.
    let live = Judged {
        set: set.number(),
        identity: idle,
        source: [10, 0, 0, 9].into(),
        destination: ([10, 0, 0, 1], 80).into(),
    };
    assert!(pod.admits(&identities, &live, false));
    assert_eq!(connects(idle), Reason::Allowed);
}

#[test]
fn live_connection_outlives_a_missing_policy_while_it_is_waited_for_and_no_longer() {
    let Some(kernel) = Kernel::of("waiting") else {
        return;
    };
    let identities = Identities::default();
    let id = |ns: &str| {
        let id = format!("spiffe://td/ns/{ns}/sa/x");
        let id = SpiffeId::parse(&id).unwrap();
        identities
            .number(&id, &TrustDomainAliases::default())
            .unwrap()
    };
    let mut store = PolicyStore::new("root");
    store.insert(allowing("a/p", from_namespace("a")));
    let policies = store.applicable("a", ["a/late"]);
    let set = sets_after(0).acquire(policies, at(1), &kernel.0).unwrap();
    let pod = PodPolicy::default();
    pod.replace(Some(set.clone()), |_| Ok(())).unwrap();
    let admits = |identity, waiting| {
        let live = Judged {
            set: set.number(),
            identity,
            source: [10, 0, 0, 9].into(),
            destination: ([10, 0, 0, 1], 80).into(),
        };
        pod.admits(&identities, &live, waiting)
    };
    assert!(admits(id("a"), true));
    assert!(!admits(id("b"), true), "what is known still decides");
    assert!(!admits(id("a"), false), "given up");
}

#[test]
fn names_of_one_trust_domain_group_have_one_number_and_are_all_meant_by_policies() {
    let td = |name| ringfence_identity::TrustDomain::parse(name).unwrap();
    let id = |text| SpiffeId::parse(text).unwrap();
    let aliases = TrustDomainAliases::new([(td("old"), td("new"))]).unwrap();
    let identities = Identities::default();
    let number = |text| identities.number(&id(text), &aliases).unwrap();

    let old = number("spiffe://old/ns/a/sa/b");
    assert_eq!(old, number("spiffe://new/ns/a/sa/b"));
    let peer = identities.peer(old).unwrap();
    assert!(peer.principals().eq(["new/ns/a/sa/b", "old/ns/a/sa/b"]));

    let other = number("spiffe://else/ns/a/sa/b");
    assert_ne!(old, other);
    let peer = identities.peer(other).unwrap();
    assert!(peer.principals().eq(["else/ns/a/sa/b"]));
}
