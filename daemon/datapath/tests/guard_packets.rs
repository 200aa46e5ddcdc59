//! Which packets the guard drops, by what is in them: frames made by hand, each with its
//! twin that passes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod frames;
mod support;

use frames::*;
use ringfence_bpf_common::{
    POD_HOLD, POD_READY, POD_REGISTRY_ONLY, Pod, WORKLOAD_REFUSE, Workload,
};
use ringfence_datapath::GuardHook;
use support::*;

#[test]
fn segments_from_the_pod_are_told_apart() {
    if !can_run("segments_from_the_pod_are_told_apart") {
        return;
    }
    const MESH: &str = "guard_plaintext_to_mesh";
    for &hook in hooks() {
        let lab = known_lab();
        for vip in [VIP4, VIP6] {
            lab.datapath.put_service(endpoint(vip, 80), &[]).unwrap();
        }
        guard(&lab, hook);
        let mut bench = Bench::new(&lab, false);
        for (pod, mesh, plain, vip) in families() {
            let tcp = |port, to, flags| Segment::new((pod, port), to, flags);
            for (what, segment, expected) in [
                ("SYN", tcp(4000, (mesh, 8080), SYN), MESH),
                ("SYN outside", tcp(4000, (plain, 8080), SYN), "passes"),
                (
                    "SYN with data (Fast Open)",
                    tcp(4000, (mesh, 8080), SYN).with(b"early"),
                    MESH,
                ),
                ("SYN of a tunnel", tcp(4000, (mesh, INBOUND), SYN), "passes"),
                (
                    "data of a tunnel",
                    tcp(4000, (mesh, INBOUND), ACK).with(b"x"),
                    "passes",
                ),
                (
                    "SYN from the tunnel port",
                    tcp(INBOUND, (mesh, 8080), SYN),
                    MESH,
                ),
                (
                    "answer of the tunnel port",
                    tcp(INBOUND, (mesh, 4000), ACK | PSH).with(b"x"),
                    "passes",
                ),
                ("data", tcp(4000, (mesh, 8080), ACK | PSH).with(b"x"), MESH),
                (
                    "data outside",
                    tcp(4000, (plain, 8080), ACK | PSH).with(b"x"),
                    "passes",
                ),
                (
                    "FIN with data",
                    tcp(4000, (mesh, 8080), ACK | FIN).with(b"x"),
                    MESH,
                ),
                (
                    "RST with data",
                    tcp(4000, (mesh, 8080), RST).with(b"x"),
                    MESH,
                ),
                (
                    "no flags, data",
                    tcp(4000, (mesh, 8080), 0).with(b"x"),
                    MESH,
                ),
                ("SYN-ACK", tcp(8080, (mesh, 4000), SYN | ACK), "passes"),
                (
                    "SYN-ACK with data",
                    tcp(8080, (mesh, 4000), SYN | ACK).with(b"x"),
                    MESH,
                ),
                ("ACK", tcp(4000, (mesh, 8080), ACK), "passes"),
                ("RST", tcp(4000, (mesh, 8080), RST), "passes"),
                ("FIN", tcp(4000, (mesh, 8080), ACK | FIN), "passes"),
                ("SYN to a service", tcp(4000, (vip, 80), SYN), MESH),
                (
                    "SYN to another port of it",
                    tcp(4000, (vip, 81), SYN),
                    "passes",
                ),
                ("port 0", tcp(0, (mesh, 0), SYN), MESH),
                ("port 65535", tcp(65535, (mesh, 65535), SYN), MESH),
            ] {
                let verdict = bench.verdict(&segment.frame(false));
                assert_eq!(verdict, expected, "{what} to {mesh}, {hook:?}");
            }
            // Refused for another reason than the mesh: no difference.
            let refuse = Workload {
                flags: WORKLOAD_REFUSE,
            };
            lab.datapath.put_workload(plain.into(), refuse).unwrap();
            let syn = tcp(4000, (plain, 8080), SYN).frame(false);
            assert_eq!(bench.verdict(&syn), MESH);
            lab.datapath.remove_workload(&plain.into()).unwrap();
            assert_eq!(bench.verdict(&syn), "passes");
        }
    }
}

#[test]
fn ipv4_options_fragments_and_tags_hide_nothing() {
    if !can_run("ipv4_options_fragments_and_tags_hide_nothing") {
        return;
    }
    const MESH: &str = "guard_plaintext_to_mesh";
    const FRAGMENT: &str = "guard_tcp_fragment";
    const UNREADABLE: &str = "guard_unreadable";
    let lab = known_lab();
    guard(&lab, GuardHook::of_this_kernel());
    let mut bench = Bench::new(&lab, false);
    let syn = |to| Segment::new((POD4, 4000), (to, 8080), SYN).bytes();
    let long: [u8; 40] = {
        let mut options = [1; 40];
        options[38] = 0;
        options
    };
    let routed = [131, 7, 4, 10, 77, 0, 3, 0];
    let timestamp = [68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let tcp = |to, options: &[u8], fragment| ip(POD4, to, TCP, options, fragment, &syn(to));
    let other = |protocol, fragment| ip(POD4, MESH4, protocol, &[], fragment, &udp(b"x"));
    for (what, packet, expected) in [
        ("no-operations", tcp(MESH4, &[1; 4], 0), MESH),
        ("no-operations outside", tcp(PLAIN4, &[1; 4], 0), "passes"),
        ("40 bytes", tcp(MESH4, &long, 0), MESH),
        ("40 bytes outside", tcp(PLAIN4, &long, 0), "passes"),
        ("timestamp", tcp(MESH4, &timestamp, 0), MESH),
        ("timestamp outside", tcp(PLAIN4, &timestamp, 0), "passes"),
        ("loose source route", tcp(PLAIN4, &routed, 0), UNREADABLE),
        (
            "strict source route behind another option",
            tcp(PLAIN4, &[1, 137, 7, 4, 10, 77, 0, 3], 0),
            UNREADABLE,
        ),
        (
            "option of length 0",
            tcp(PLAIN4, &[7, 0, 0, 0], 0),
            UNREADABLE,
        ),
        ("first fragment", tcp(MESH4, &[], 0x2000), FRAGMENT),
        ("later fragment", tcp(MESH4, &[], 0x2001), FRAGMENT),
        ("last fragment", tcp(MESH4, &[], 0x0001), FRAGMENT),
        ("fragment outside", tcp(PLAIN4, &[], 0x2000), FRAGMENT),
        ("don't fragment", tcp(PLAIN4, &[], 0x4000), "passes"),
        ("UDP", other(UDP, 0), "passes"),
        ("UDP in fragments", other(UDP, 0x2000), "passes"),
        ("ICMP", other(1, 0), "passes"),
        (
            "half a TCP header",
            ip(POD4, PLAIN4, TCP, &[], 0, &[0; 9]),
            UNREADABLE,
        ),
        (
            "no TCP header",
            ip(POD4, PLAIN4, TCP, &[], 0, &[]),
            UNREADABLE,
        ),
        (
            "half an IP header",
            vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6],
            UNREADABLE,
        ),
        ("a header of 16 bytes", vec![0x44; 60], UNREADABLE),
        ("another version", vec![0x55; 60], UNREADABLE),
        (
            "a TCP header of 16 bytes",
            {
                let mut packet = tcp(MESH4, &[], 0);
                packet[32] = 4 << 4;
                packet
            },
            UNREADABLE,
        ),
    ] {
        let verdict = bench.verdict(&ethernet(false, &[], false, &packet));
        assert_eq!(verdict, expected, "{what}");
    }
    for (tags, to, expected) in [
        (&[0x8100][..], MESH4, MESH),
        (&[0x8100], PLAIN4, "passes"),
        (&[0x88a8, 0x8100], MESH4, MESH),
        (&[0x88a8, 0x8100], PLAIN4, "passes"),
        (&[0x88a8, 0x8100, 0x8100], MESH4, MESH),
        (&[0x8100, 0x8100, 0x8100, 0x8100], PLAIN4, UNREADABLE),
    ] {
        let verdict = bench.verdict(&ethernet(false, tags, false, &tcp(to, &[], 0)));
        assert_eq!(verdict, expected, "{tags:x?} to {to}");
    }
    // What is no IP at all passes: address resolution, for one.
    let mut arp = ethernet(false, &[], false, &[0; 28]);
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_eq!(bench.verdict(&arp), "passes");
}

#[test]
fn ipv6_extension_headers_hide_nothing() {
    if !can_run("ipv6_extension_headers_hide_nothing") {
        return;
    }
    const MESH: &str = "guard_plaintext_to_mesh";
    const FRAGMENT: &str = "guard_tcp_fragment";
    const UNREADABLE: &str = "guard_unreadable";
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT_HEADER: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const NONE: u8 = 59;
    const OPTIONS: u8 = 60;
    let lab = known_lab();
    guard(&lab, GuardHook::of_this_kernel());
    let mut bench = Bench::new(&lab, false);
    let syn = |to| Segment::new((POD6, 4000), (to, 8080), SYN).bytes();
    let options = |next| vec![next, 0, 1, 4, 0, 0, 0, 0];
    let long = |next| {
        let mut header = vec![next, 2, 1, 20];
        header.resize(24, 0);
        header
    };
    let routing = |left| {
        let mut header = vec![TCP, 2, 0, left, 0, 0, 0, 0];
        header.resize(24, 0);
        header
    };
    let fragment = |next, offset: u16, more: u16| {
        let mut header = vec![next, 0];
        header.extend((offset << 3 | more).to_be_bytes());
        header.extend([0, 0, 0, 9]);
        header
    };
    let chain = |headers: &[(u8, Vec<u8>)]| {
        let bytes: Vec<u8> = headers
            .iter()
            .flat_map(|(_, bytes)| bytes.clone())
            .collect();
        (headers[0].0, bytes)
    };
    let eight: Vec<_> = (0..8)
        .map(|i| (OPTIONS, options(if i == 7 { TCP } else { OPTIONS })))
        .collect();
    for (what, headers, in_mesh, outside) in [
        (
            "hop-by-hop",
            chain(&[(HOP_BY_HOP, options(TCP))]),
            MESH,
            "passes",
        ),
        (
            "three kinds",
            chain(&[
                (HOP_BY_HOP, long(OPTIONS)),
                (OPTIONS, options(AUTHENTICATION)),
                (AUTHENTICATION, vec![TCP, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]),
            ]),
            MESH,
            "passes",
        ),
        (
            "routing, arrived",
            chain(&[(ROUTING, routing(0))]),
            MESH,
            "passes",
        ),
        (
            "routing, on its way",
            chain(&[(ROUTING, routing(1))]),
            UNREADABLE,
            UNREADABLE,
        ),
        ("eight", chain(&eight), UNREADABLE, UNREADABLE),
        ("seven", chain(&eight[1..]), MESH, "passes"),
        (
            "first fragment",
            chain(&[(FRAGMENT_HEADER, fragment(TCP, 0, 1))]),
            FRAGMENT,
            FRAGMENT,
        ),
        (
            "first fragment, TCP behind another header",
            chain(&[
                (FRAGMENT_HEADER, fragment(OPTIONS, 0, 1)),
                (OPTIONS, options(TCP)),
            ]),
            FRAGMENT,
            FRAGMENT,
        ),
        (
            "later fragment",
            chain(&[(FRAGMENT_HEADER, fragment(TCP, 8, 0))]),
            FRAGMENT,
            FRAGMENT,
        ),
        (
            "later fragment of something else",
            chain(&[(FRAGMENT_HEADER, fragment(UDP, 8, 0))]),
            "passes",
            "passes",
        ),
        (
            "nothing next",
            chain(&[(HOP_BY_HOP, options(NONE))]),
            "passes",
            "passes",
        ),
        ("UDP", chain(&[(OPTIONS, options(UDP))]), "passes", "passes"),
    ] {
        for (to, expected) in [(MESH6, in_mesh), (PLAIN6, outside)] {
            let packet = ip(POD6, to, headers.0, &headers.1, 0, &syn(to));
            let verdict = bench.verdict(&ethernet(false, &[], true, &packet));
            assert_eq!(verdict, expected, "{what} to {to}");
        }
    }
    // A chain that ends before it says what it carries.
    let cut = ip(
        POD6,
        PLAIN6,
        FRAGMENT_HEADER,
        &fragment(OPTIONS, 0, 1),
        0,
        &[],
    );
    assert_eq!(bench.verdict(&ethernet(false, &[], true, &cut)), UNREADABLE);
    let short = vec![0x60; 30];
    assert_eq!(
        bench.verdict(&ethernet(false, &[], true, &short)),
        UNREADABLE
    );
    // An IPv4 destination in the clothes of IPv6.
    let packet = ip(POD6, mapped(MESH4), TCP, &[], 0, &syn(MESH6));
    assert_eq!(bench.verdict(&ethernet(false, &[], true, &packet)), MESH);
}

#[test]
fn segments_to_the_pod_are_told_apart() {
    if !can_run("segments_to_the_pod_are_told_apart") {
        return;
    }
    for &hook in hooks() {
        let lab = known_lab();
        guard(&lab, hook);
        let mut bench = Bench::new(&lab, true);
        for (pod, mesh, plain, _) in families() {
            let put = |flags| {
                let entry = Pod {
                    flags,
                    ..lab.entry()
                };
                lab.datapath.update_pod(lab.cookie, &entry).unwrap();
            };
            let tcp = |from, port, flags| Segment::new((from, 4000), (pod, port), flags);
            let waiting = "guard_waiting_for_policy";
            for (flags, what, segment, expected) in [
                (POD_READY, "SYN", tcp(plain, 8080, SYN), "passes"),
                (POD_READY, "data", tcp(mesh, 8080, ACK).with(b"x"), "passes"),
                (
                    POD_READY,
                    "own address",
                    tcp(pod, 8080, ACK).with(b"x"),
                    "guard_own_address",
                ),
                (
                    POD_READY,
                    "own address to the agent",
                    tcp(pod, INBOUND, SYN),
                    "guard_own_address",
                ),
                (
                    POD_READY | POD_HOLD,
                    "SYN while held",
                    tcp(plain, 8080, SYN),
                    waiting,
                ),
                (
                    POD_READY | POD_HOLD,
                    "SYN of a tunnel while held",
                    tcp(mesh, INBOUND, SYN),
                    "passes",
                ),
                (
                    POD_READY | POD_HOLD,
                    "data while held",
                    tcp(plain, 8080, ACK).with(b"x"),
                    "passes",
                ),
            ] {
                put(flags);
                let verdict = bench.verdict(&segment.frame(true));
                assert_eq!(verdict, expected, "{what} to {pod}, {hook:?}");
            }
            put(POD_READY);
            let fragment = if pod.is_ipv4() {
                ip(plain, pod, TCP, &[], 0x2000, &tcp(plain, 8080, SYN).bytes())
            } else {
                let header = [TCP, 0, 0, 1, 0, 0, 0, 9];
                ip(plain, pod, 44, &header, 0, &tcp(plain, 8080, SYN).bytes())
            };
            let frame = ethernet(true, &[], pod.is_ipv6(), &fragment);
            assert_eq!(bench.verdict(&frame), "guard_tcp_fragment");
        }
    }
}

#[test]
fn the_pods_state_decides_what_leaves() {
    if !can_run("the_pods_state_decides_what_leaves") {
        return;
    }
    const UNKNOWN: &str = "guard_egress_refused";
    let lab = known_lab();
    guard(&lab, GuardHook::of_this_kernel());
    let mut bench = Bench::new(&lab, false);
    let known = Workload { flags: 0 };
    for (pod, mesh, plain, _) in families() {
        let put = |flags| {
            let entry = Pod {
                flags,
                ..lab.entry()
            };
            lab.datapath.update_pod(lab.cookie, &entry).unwrap();
        };
        let syn = |to, port| Segment::new((pod, 4000), (to, port), SYN).frame(false);
        put(POD_READY | POD_REGISTRY_ONLY);
        assert_eq!(bench.verdict(&syn(plain, 8080)), UNKNOWN);
        assert_eq!(bench.verdict(&syn(plain, INBOUND)), UNKNOWN, "no tunnel");
        assert_eq!(bench.verdict(&syn(mesh, INBOUND)), "passes");
        lab.datapath.put_workload(plain.into(), known).unwrap();
        assert_eq!(bench.verdict(&syn(plain, 8080)), "passes");
        put(0);
        assert_eq!(bench.verdict(&syn(plain, 8080)), "guard_held");
        assert_eq!(bench.verdict(&syn(mesh, 8080)), "guard_plaintext_to_mesh");
        // The answer to a SYN that nobody admits.
        let reset = Segment::new((pod, 8080), (plain, 4000), RST | ACK).frame(false);
        assert_eq!(bench.verdict(&reset), "passes");
        put(POD_READY);
        assert_eq!(bench.verdict(&syn(plain, 8080)), "passes");
        lab.datapath.remove_workload(&plain.into()).unwrap();
    }
}
