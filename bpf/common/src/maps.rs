//! Keys and values of the BPF maps.

/// An IP address: 16 bytes, network byte order, IPv4 as `::ffff:a.b.c.d`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Addr(pub [u8; 16]);

impl Addr {
    /// The all-zero address, which stands for "no address".
    pub const NONE: Addr = Addr([0; 16]);

    /// The IPv4-mapped form of an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Addr([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    /// Whether this is an IPv4 (mapped) address.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = self.0;
        (a | b | c | d | e | f | g | h | i | j) == 0 && k == 0xff && l == 0xff
    }

    /// Whether this is 0.0.0.0 or ::, which `connect` takes for the loopback address.
    #[inline(always)]
    pub fn is_unspecified(&self) -> bool {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = self.0;
        let head = a | b | c | d | e | f | g | h | i | j;
        let mapped_or_zero = (k == 0 && l == 0) || (k == 0xff && l == 0xff);
        head == 0 && mapped_or_zero && (m | n | o | p) == 0
    }

    /// Whether this is 127.0.0.0/8 or ::1.
    #[inline(always)]
    pub fn is_loopback(&self) -> bool {
        if self.is_v4() {
            return self.0[12] == 127;
        }
        let mut rest = 0;
        let mut i = 0;
        while i < 15 {
            rest |= self.0[i];
            i += 1;
        }
        rest == 0 && self.0[15] == 1
    }
}

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

/// `SOCKS` (socket storage of an application's socket that was redirected or
/// given a backend): what the application asked for and what it got.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AppSocket {
    /// The destination that the application named.
    pub asked: Endpoint,
    /// The workload endpoint that was chosen for it.
    pub backend: Endpoint,
    pub netns: u64,
    pub cookie: u64,
    /// 1: redirected to the agent; 0: connected to `backend` directly.
    pub redirected: u32,
    pub pad: u32,
}

/// `ORIGINAL_DST` key: the redirected connection as the agent sees it at accept.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Flow {
    pub netns: u64,
    /// The application's end.
    pub source: Endpoint,
    /// The agent's end (its outbound listener).
    pub listener: Endpoint,
}

/// `ORIGINAL_DST` value: written before the SYN leaves, deleted at accept.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OriginalDst {
    pub asked: Endpoint,
    pub backend: Endpoint,
    /// Cookie of the application's socket; 0 marks a record that two connections
    /// claimed (the earlier one was not accepted yet), which serves neither.
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

/// The identity of plaintext.
pub const IDENTITY_NONE: u32 = 0;

/// One bit per term of a policy set.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mask(pub [u64; MASK_WORDS]);

/// 64-bit words in a [`Mask`].
pub const MASK_WORDS: usize = 4;
/// Terms that one policy set can hold.
pub const MAX_TERMS: usize = MASK_WORDS * 64;

impl Mask {
    pub const NONE: Mask = Mask([0; MASK_WORDS]);
    pub const ALL: Mask = Mask([u64::MAX; MASK_WORDS]);

    /// Bits set in both.
    #[inline(always)]
    pub fn and(&self, other: &Mask) -> Mask {
        let mut out = [0; MASK_WORDS];
        let mut i = 0;
        while i < MASK_WORDS {
            out[i] = self.0[i] & other.0[i];
            i += 1;
        }
        Mask(out)
    }

    /// The lowest bit that is set.
    #[inline(always)]
    pub fn first(&self) -> Option<u16> {
        let mut i = 0;
        while i < MASK_WORDS {
            if self.0[i] != 0 {
                return Some((i as u16) * 64 + lowest_bit(self.0[i]));
            }
            i += 1;
        }
        None
    }

    /// Sets bit `bit`; out of range is ignored.
    pub fn set(&mut self, bit: usize) {
        if let Some(word) = self.0.get_mut(bit / 64) {
            *word |= 1 << (bit % 64);
        }
    }
}

/// Index of the lowest set bit. The BPF instruction set has no count-zeros, and the
/// compiler's table for it would need a relocation: halving works everywhere.
#[inline(always)]
fn lowest_bit(mut word: u64) -> u16 {
    let mut n = 0;
    if word & 0xffff_ffff == 0 {
        n += 32;
        word >>= 32;
    }
    if word & 0xffff == 0 {
        n += 16;
        word >>= 16;
    }
    if word & 0xff == 0 {
        n += 8;
        word >>= 8;
    }
    if word & 0xf == 0 {
        n += 4;
        word >>= 4;
    }
    if word & 0x3 == 0 {
        n += 2;
        word >>= 2;
    }
    if word & 0x1 == 0 {
        n += 1;
    }
    n
}

/// `POLICY_SETS`: the compiled policies of one workload.
///
/// The policies are flattened to *terms*, each a conjunction of one condition per
/// dimension (source identity, source address, destination port, destination
/// address). A look-up in each dimension gives the mask of the terms whose condition
/// holds there; their intersection are the terms that match.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PolicySet {
    /// Bits of `SET_*`.
    pub flags: u32,
    pub pad: u32,
    /// Terms of DENY policies.
    pub deny: Mask,
    /// Terms of ALLOW policies.
    pub allow: Mask,
    /// Terms whose source condition holds for an address that `POLICY_SOURCES` lacks.
    pub other_sources: Mask,
    /// Terms whose port condition holds for a port that `POLICY_PORTS` lacks.
    pub other_ports: Mask,
    /// Terms whose destination condition holds for the pod's IPv4 address.
    pub destination4: Mask,
    /// Terms whose destination condition holds for the pod's IPv6 address.
    pub destination6: Mask,
}

/// Plaintext is refused (PeerAuthentication STRICT).
pub const SET_STRICT: u32 = 1;
/// There is at least one ALLOW policy: what no term allows is denied.
pub const SET_HAS_ALLOW: u32 = 2;
/// The policies cannot be represented: everything is denied.
pub const SET_UNREPRESENTABLE: u32 = 4;
/// A policy that the workload names has not arrived: everything is denied.
pub const SET_POLICY_NOT_RECEIVED: u32 = 8;

/// `POLICY_IDENTITIES` key → `Mask` of the terms whose source identity condition holds.
/// An identity without an entry is denied.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct IdentityKey {
    pub set: u32,
    pub identity: u32,
}

/// `POLICY_PORTS` key → `Mask`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PortKey {
    pub set: u32,
    pub port: u16,
    pub pad: u16,
}

/// `POLICY_SOURCES` key data (LPM trie) → `Mask`: the answer for every address whose
/// longest match this prefix is. The prefix length counts the 32 bits of `set` too.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SourceKey {
    /// Big endian, so that the trie compares it as a prefix.
    pub set: [u8; 4],
    pub addr: Addr,
}

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
    pub pad: u32,
}

pub const HOOK_CONNECT: u32 = 1;
pub const HOOK_SK_LOOKUP: u32 = 2;

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
    /// plaintext: `WORKLOAD_REFUSE`, MPTCP, a socket bound to a device.
    Refused = 11,
}

/// Entries of `COUNTERS`.
pub const COUNTERS: u32 = 12;

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
        Addr, Endpoint, Pod, Service, BackendKey, Backend, Workload, AppSocket, Flow, OriginalDst,
        AgentSocket, Mask, PolicySet, IdentityKey, PortKey, SourceKey, Event
    );
}

const _: () = {
    assert!(size_of::<Endpoint>() == 20);
    assert!(size_of::<Pod>() == 48);
    assert!(size_of::<Backend>() == 24);
    assert!(size_of::<AppSocket>() == 64);
    assert!(size_of::<Flow>() == 48);
    assert!(size_of::<OriginalDst>() == 48);
    assert!(size_of::<AgentSocket>() == 24);
    assert!(size_of::<Mask>() == 32);
    assert!(size_of::<PolicySet>() == 8 + 6 * 32);
    assert!(size_of::<SourceKey>() == 20);
    assert!(size_of::<Event>() == 64);
};
