//! Keys and values of the BPF maps.

/// An IP address: 16 bytes, network byte order, IPv4 as `::ffff:a.b.c.d`.
///
/// Aligned, so that eBPF programs compare it by words: byte by byte costs the verifier
/// more steps than it grants.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Addr(pub [u8; 16]);

impl Addr {
    /// The all-zero address, which stands for "no address".
    pub const NONE: Addr = Addr([0; 16]);

    /// The IPv4-mapped form of an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Addr::from_words([0, 0, MAPPED, u32::from_ne_bytes(octets)])
    }

    /// Whether this is an IPv4 (mapped) address.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        let [a, b, c, _] = self.words();
        (a | b | (c ^ MAPPED)) == 0
    }

    /// Whether this is 0.0.0.0 or ::, which `connect` takes for the loopback address.
    #[inline(always)]
    pub fn is_unspecified(&self) -> bool {
        let [a, b, c, d] = self.words();
        (a | b | d) == 0 && (c == 0 || c == MAPPED)
    }

    /// Whether this is 127.0.0.0/8 or ::1.
    #[inline(always)]
    pub fn is_loopback(&self) -> bool {
        let [a, b, c, d] = self.words();
        if self.is_v4() {
            return d.to_ne_bytes()[0] == 127;
        }
        (a | b | c | (d ^ u32::from_ne_bytes([0, 0, 0, 1]))) == 0
    }

    /// The address as four words in memory order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        // SAFETY: the same size, and any bytes are words.
        unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(self.0) }
    }

    /// The first and the last 64 bits as numbers.
    #[inline(always)]
    pub const fn halves(&self) -> [u64; 2] {
        let [a, b, c, d] = self.words();
        [
            (u32::from_be(a) as u64) << 32 | u32::from_be(b) as u64,
            (u32::from_be(c) as u64) << 32 | u32::from_be(d) as u64,
        ]
    }

    /// The address of four words in memory order.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        // SAFETY: the same size, and any bytes are an address.
        Addr(unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) })
    }
}

/// The third word of an IPv4-mapped address.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

#[cfg(feature = "aya")]
extern crate std;

#[cfg(feature = "aya")]
impl From<std::net::IpAddr> for Addr {
    fn from(ip: std::net::IpAddr) -> Self {
        match ip {
            std::net::IpAddr::V4(v4) => Addr::v4(v4.octets()),
            std::net::IpAddr::V6(v6) => Addr(v6.octets()),
        }
    }
}

#[cfg(feature = "aya")]
impl From<Addr> for std::net::IpAddr {
    fn from(addr: Addr) -> Self {
        std::net::Ipv6Addr::from(addr.0).to_canonical()
    }
}

/// An address and a port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Endpoint {
    pub addr: Addr,
    pub port: u16,
    pub pad: u16,
}

impl Endpoint {
    #[inline(always)]
    pub const fn new(addr: Addr, port: u16) -> Self {
        Endpoint { addr, port, pad: 0 }
    }
}

/// `PODS`: network namespace cookie (`SO_NETNS_COOKIE`) → the enrolled pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pod {
    /// Key into `POLICY_SETS`; 0 = none yet, which denies.
    pub policy_set: u32,
    /// Bits of `POD_*`.
    pub flags: u32,
    /// The pod's addresses; `Addr::NONE` when it lacks the family.
    pub addr4: Addr,
    pub addr6: Addr,
    /// Where the agent accepts redirected connections, on the pod's addresses.
    pub outbound_port: u16,
    /// Where the agent accepts tunnels (15008 on the wire).
    pub inbound_port: u16,
    pub pad: u32,
}

/// The pod's workload, addresses and policies are known. Without it the pod is held:
/// it connects to nothing but itself (a connect is refused, never sent in plaintext).
pub const POD_READY: u32 = 1;
/// A policy that the pod's workload names has not arrived and is waited for: a SYN of
/// plaintext from the wire is dropped without an answer, so that the client tries again.
pub const POD_HOLD: u32 = 2;
/// The pod connects to what the registry knows and to nothing else.
pub const POD_REGISTRY_ONLY: u32 = 4;

/// `SERVICES` key: a virtual IP and port.
pub type ServiceKey = Endpoint;

/// `SERVICES` value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Service {
    /// First half of the `BACKENDS` key. A changed service gets a new id, so that a
    /// reader sees the old backends or the new ones and never a mixture.
    pub id: u32,
    /// Number of healthy backends, which have the indices 0..backends.
    pub backends: u32,
}

/// `BACKENDS` key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct BackendKey {
    pub service: u32,
    pub index: u32,
}

/// `BACKENDS` value: where a connection to the service goes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Backend {
    pub endpoint: Endpoint,
    /// Bits of `WORKLOAD_*` of the backend.
    pub flags: u32,
}

/// `WORKLOADS`: address → what is known of the workload that has it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Workload {
    /// Bits of `WORKLOAD_*`.
    pub flags: u32,
}

/// The workload is reached through a tunnel; without it, directly.
pub const WORKLOAD_MESH: u32 = 1;
/// Connections to the workload are refused (for example a waypoint is required
/// that this version cannot use): never sent in plaintext.
pub const WORKLOAD_REFUSE: u32 = 2;

/// `SOCKS` (socket storage): of an application's socket that was redirected or given a
/// backend, what it asked for and what it got; of the agent's last hop, that it is one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AppSocket {
    /// The destination that the application named.
    pub asked: Endpoint,
    /// The workload endpoint that was chosen for it.
    pub backend: Endpoint,
    pub netns: u64,
    pub cookie: u64,
    /// One of `SOCKET_*`.
    pub kind: u32,
    /// The sequence numbers of the [`Handshake`] that the record was written under.
    pub source_seq: u32,
    pub listener_seq: u32,
    pub pad: u32,
}

/// Connected to `backend` directly.
pub const SOCKET_DIRECT: u32 = 0;
/// Redirected to the agent.
pub const SOCKET_REDIRECTED: u32 = 1;
/// The agent's last hop, admitted by `authorize()`.
pub const SOCKET_LAST_HOP: u32 = 2;

/// A connection as its listening end sees it.
///
/// `LAST_HOPS` key → cookie of the agent's socket: a last hop that was admitted. Its
/// SYN names a client that is elsewhere and, to the receiving side, came in through
/// the device that has the pod's address: nothing else tells it from the wire.
///
/// `PLAINTEXT` key → cookie of the application's socket: a connection from the wire that
/// was admitted in plaintext.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Flow {
    pub netns: u64,
    /// The end that connects: the application, or the client whose address the last
    /// hop bears.
    pub source: Endpoint,
    /// The end that listens: the agent's outbound listener, or the application.
    pub listener: Endpoint,
}

/// `ORIGINAL_DST` key: one handshake of a redirected connection. A port can be used again
/// while an earlier connection from it still waits to be accepted; the sequence numbers,
/// which both ends know once they have shaken hands (RFC 9293, 3.5), tell the two apart.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Handshake {
    pub flow: Flow,
    /// The number of the first byte that the connecting end sends.
    pub source_seq: u32,
    /// The number of the first byte that the listening end sends.
    pub listener_seq: u32,
}

/// `ORIGINAL_DST` value: written when the application's end is established, which is
/// before the ACK leaves that brings about the agent's end. There it becomes the value of
/// `ACCEPTED` (socket storage), before the agent can accept it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OriginalDst {
    pub asked: Endpoint,
    pub backend: Endpoint,
    /// Cookie of the application's socket.
    pub cookie: u64,
}

/// `AGENT_SOCKS`: cookie of one of the agent's own sockets → what it is for. Only the
/// agent can write this map, which is why no mark and no port is trusted instead.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AgentSocket {
    /// One of `AGENT_*`.
    pub role: u32,
    /// Last hop: the verified peer, as interned by userspace. Never `IDENTITY_NONE`.
    pub identity: u32,
    /// Last hop: the client's own address, which the policy judges.
    pub source: Addr,
}

/// The agent dials a tunnel or a control plane: passes untouched.
pub const AGENT_DIAL: u32 = 1;
/// The agent connects to the application on behalf of a verified peer: judged by
/// `authorize()`, and only ever towards the pod's own addresses.
pub const AGENT_LAST_HOP: u32 = 2;

/// What happened, as the `EVENTS` ring buffer carries it. A full ring loses events
/// (counted), never a verdict.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Event {
    pub netns: u64,
    pub source: Endpoint,
    pub destination: Endpoint,
    pub identity: u32,
    /// A [`crate::Reason`] as a number.
    pub reason: u16,
    /// The term that decided, or `u16::MAX`.
    pub term: u16,
    /// One of `HOOK_*`.
    pub hook: u32,
    /// The policy set that was asked; 0 for none.
    pub set: u32,
}

pub const HOOK_CONNECT: u32 = 1;
pub const HOOK_SK_LOOKUP: u32 = 2;
/// The guard at the host side of a pod's device: a packet from the pod.
pub const HOOK_GUARD_FROM: u32 = 3;
/// The guard: a packet to the pod.
pub const HOOK_GUARD_TO: u32 = 4;

/// Indices into the per-CPU array `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Counter {
    /// Connections redirected to the agent.
    Redirected = 0,
    /// Connections of enrolled pods to destinations outside the mesh.
    Direct = 1,
    /// Connections to a service without a healthy endpoint.
    NoEndpoint = 2,
    /// Connects refused because they aimed at the agent's own ports.
    AgentPort = 3,
    /// Last hops allowed and denied.
    LastHopAllowed = 4,
    LastHopDenied = 5,
    /// Plaintext connections allowed and denied.
    PlaintextAllowed = 6,
    PlaintextDenied = 7,
    /// Events that the ring buffer had no room for.
    EventsLost = 8,
    /// Connects refused because their state could not be recorded.
    NoRoom = 9,
    /// Connects of pods that are held (`POD_READY` is missing).
    Held = 10,
    /// Connects refused because they could neither be redirected nor may go in
    /// plaintext: `WORKLOAD_REFUSE`, a socket bound to a device.
    Refused = 11,
    /// Connects of registry-only pods to what the registry does not know.
    EgressRefused = 12,
    /// MPTCP sockets that enrolled pods were not given.
    Mptcp = 13,
    /// Packets that the guard dropped, by why: on the way from the pod...
    GuardToMesh = 14,
    GuardEgress = 15,
    GuardHeld = 16,
    /// ... either way ...
    GuardFragment = 17,
    GuardUnreadable = 18,
    /// ... and on the way to it.
    GuardInjected = 19,
    GuardOwnAddress = 20,
    GuardWaiting = 21,
}

/// Entries of `COUNTERS`.
pub const COUNTERS: u32 = 22;

impl Counter {
    /// All counters, in order of their index.
    pub const ALL: [Counter; COUNTERS as usize] = [
        Counter::Redirected,
        Counter::Direct,
        Counter::NoEndpoint,
        Counter::AgentPort,
        Counter::LastHopAllowed,
        Counter::LastHopDenied,
        Counter::PlaintextAllowed,
        Counter::PlaintextDenied,
        Counter::EventsLost,
        Counter::NoRoom,
        Counter::Held,
        Counter::Refused,
        Counter::EgressRefused,
        Counter::Mptcp,
        Counter::GuardToMesh,
        Counter::GuardEgress,
        Counter::GuardHeld,
        Counter::GuardFragment,
        Counter::GuardUnreadable,
        Counter::GuardInjected,
        Counter::GuardOwnAddress,
        Counter::GuardWaiting,
    ];

    /// The name used in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Counter::Redirected => "redirected",
            Counter::Direct => "direct",
            Counter::NoEndpoint => "no_endpoint",
            Counter::AgentPort => "agent_port_refused",
            Counter::LastHopAllowed => "last_hop_allowed",
            Counter::LastHopDenied => "last_hop_denied",
            Counter::PlaintextAllowed => "plaintext_allowed",
            Counter::PlaintextDenied => "plaintext_denied",
            Counter::EventsLost => "events_lost",
            Counter::NoRoom => "no_room",
            Counter::Held => "held",
            Counter::Refused => "refused",
            Counter::EgressRefused => "egress_refused",
            Counter::Mptcp => "mptcp_refused",
            Counter::GuardToMesh => "guard_plaintext_to_mesh",
            Counter::GuardEgress => "guard_egress_refused",
            Counter::GuardHeld => "guard_held",
            Counter::GuardFragment => "guard_tcp_fragment",
            Counter::GuardUnreadable => "guard_unreadable",
            Counter::GuardInjected => "guard_injected_segment",
            Counter::GuardOwnAddress => "guard_own_address",
            Counter::GuardWaiting => "guard_waiting_for_policy",
        }
    }
}

#[cfg(feature = "aya")]
mod pod {
    use super::*;
    macro_rules! pod {
        ($($t:ty),*) => {$(
            // SAFETY: `#[repr(C)]`, made of integers and arrays of them, without
            // implicit padding (asserted below), so any bytes are a valid value.
            unsafe impl aya::Pod for $t {}
        )*};
    }
    pod!(
        Addr,
        Endpoint,
        Pod,
        Service,
        BackendKey,
        Backend,
        Workload,
        AppSocket,
        Flow,
        Handshake,
        OriginalDst,
        AgentSocket,
        Event
    );
}

const _: () = {
    assert!(size_of::<Endpoint>() == 20);
    assert!(size_of::<Pod>() == 48);
    assert!(size_of::<Backend>() == 24);
    assert!(size_of::<AppSocket>() == 72);
    assert!(size_of::<Flow>() == 48);
    assert!(size_of::<Handshake>() == 56);
    assert!(size_of::<OriginalDst>() == 48);
    assert!(size_of::<AgentSocket>() == 24);
    assert!(size_of::<Event>() == 64);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_apart() {
        let v4 = |a, b, c, d| Addr::v4([a, b, c, d]);
        let v6 = |last: u8, first: u8| {
            let mut bytes = [0; 16];
            bytes[0] = first;
            bytes[15] = last;
            Addr(bytes)
        };
        assert!(v4(10, 0, 0, 1).is_v4() && v4(0, 0, 0, 0).is_v4());
        assert!(!v6(1, 0).is_v4() && !Addr::NONE.is_v4());
        let mut compatible = Addr::v4([10, 0, 0, 1]);
        compatible.0[10] = 0;
        assert!(!compatible.is_v4());
        assert!(v4(127, 0, 0, 1).is_loopback() && v4(127, 9, 9, 9).is_loopback());
        assert!(v6(1, 0).is_loopback());
        assert!(!v4(128, 0, 0, 127).is_loopback() && !v6(1, 0x20).is_loopback());
        assert!(!v6(2, 0).is_loopback() && !Addr::NONE.is_loopback());
        assert!(Addr::NONE.is_unspecified() && v4(0, 0, 0, 0).is_unspecified());
        assert!(!v4(0, 0, 0, 1).is_unspecified() && !v6(1, 0).is_unspecified());
        assert!(!v6(0, 1).is_unspecified());
        assert_eq!(Addr::from_words(v4(1, 2, 3, 4).words()), v4(1, 2, 3, 4));
    }

    #[test]
    fn counters_are_in_the_order_of_their_indices() {
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
        }
    }
}
