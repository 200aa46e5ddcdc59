//! The authorization decision: one function, called by the eBPF programs (the
//! tunnel's last hop in `connect`, plaintext in `sk_lookup`) and by userspace tests,
//! over tables that are BPF maps in one case and plain collections in the other.

use crate::Addr;
use crate::policy::{
    BLOCK_TERMS, Block, IDENTITY_NONE, MASK_BLOCKS, Mask, PolicySet, SET_HAS_ALLOW, SET_HAS_PORTS,
    SET_POLICY_NOT_RECEIVED, SET_STRICT, SET_UNREPRESENTABLE, SOURCE_PROBES, SourceKey,
    SourceMatch, lowest_bit,
};

/// One connection to judge.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Key into `POLICY_SETS`; 0 denies.
    pub set: u32,
    /// The interned, verified identity of the peer, or [`IDENTITY_NONE`] for plaintext.
    pub identity: u32,
    /// The client's own address.
    pub source: Addr,
    /// The application's port, never the tunnel's.
    pub port: u16,
    /// Whether the connection goes to the pod's IPv4 address.
    pub destination_v4: bool,
}

/// Where the compiled policies are.
pub trait PolicyTables {
    /// The set with this id.
    fn set(&self, id: u32) -> Option<&PolicySet>;
    /// Terms whose source identity condition holds.
    fn identity(&self, set: u32, identity: u32) -> Option<&Mask>;
    /// A prefix of the source address.
    fn source(&self, key: &SourceKey) -> Option<&SourceMatch>;
    /// Terms whose port condition holds.
    fn port(&self, set: u32, port: u16) -> Option<&Mask>;
    /// The element of `POLICY_BLOCKS` with this index.
    fn block(&self, index: u32) -> Option<&Block>;
}

/// Why a connection was admitted or not.
#[repr(u16)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// No ALLOW policy exists and no DENY term matches.
    NoAllowPolicy = 0,
    /// An ALLOW term matches.
    Allowed = 1,
    /// A DENY term matches.
    Denied = 16,
    /// ALLOW policies exist and none matches.
    NotAllowed = 17,
    /// Plaintext towards a workload that requires mutual TLS.
    PlaintextRefused = 18,
    /// The workload has no compiled policy set (yet).
    NoPolicySet = 19,
    /// The workload's policies cannot be represented.
    Unrepresentable = 20,
    /// A policy that the workload names has not arrived.
    PolicyNotReceived = 21,
    /// The identity has not been prepared for this policy set.
    UnknownIdentity = 22,
    /// A last hop towards an address that is not the pod's own.
    NotThisPod = 23,
    /// A last hop towards one of the agent's own ports.
    AgentPort = 24,
    /// The pod may connect to what the registry knows alone, and it does not know this.
    EgressRefused = 25,
    /// Plaintext that was on its way to a destination inside the mesh.
    PlaintextToMesh = 26,
    /// The pod is held: its workload is not known.
    Held = 27,
    /// A segment from the wire for the agent's last hop.
    InjectedSegment = 28,
    /// A segment from the wire that bears the pod's own address as its source.
    OwnAddressFromWire = 29,
    /// A fragment of a TCP segment.
    Fragment = 30,
    /// A packet whose headers cannot be followed to its ports and destination.
    UnreadablePacket = 31,
}

impl Reason {
    /// All reasons, in order of their number.
    pub const ALL: [Reason; 18] = [
        Reason::NoAllowPolicy,
        Reason::Allowed,
        Reason::Denied,
        Reason::NotAllowed,
        Reason::PlaintextRefused,
        Reason::NoPolicySet,
        Reason::Unrepresentable,
        Reason::PolicyNotReceived,
        Reason::UnknownIdentity,
        Reason::NotThisPod,
        Reason::AgentPort,
        Reason::EgressRefused,
        Reason::PlaintextToMesh,
        Reason::Held,
        Reason::InjectedSegment,
        Reason::OwnAddressFromWire,
        Reason::Fragment,
        Reason::UnreadablePacket,
    ];

    /// The name used in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::NoAllowPolicy => "no-allow-policy",
            Reason::Allowed => "allowed",
            Reason::Denied => "denied-by-policy",
            Reason::NotAllowed => "not-allowed-by-any-policy",
            Reason::PlaintextRefused => "plaintext-refused",
            Reason::NoPolicySet => "no-policy-set",
            Reason::Unrepresentable => "policy-not-representable",
            Reason::PolicyNotReceived => "policy-not-received",
            Reason::UnknownIdentity => "unknown-identity",
            Reason::NotThisPod => "not-this-pod",
            Reason::AgentPort => "agent-port",
            Reason::EgressRefused => "egress-refused",
            Reason::PlaintextToMesh => "plaintext-to-mesh",
            Reason::Held => "pod-held",
            Reason::InjectedSegment => "injected-segment",
            Reason::OwnAddressFromWire => "own-address-from-the-wire",
            Reason::Fragment => "tcp-fragment",
            Reason::UnreadablePacket => "unreadable-packet",
        }
    }

    /// The reason with this number.
    pub fn from_number(number: u16) -> Option<Reason> {
        Self::ALL.into_iter().find(|r| *r as u16 == number)
    }
}

/// The outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    pub reason: Reason,
    /// The term that decided, or `u16::MAX`.
    pub term: u16,
}

impl Verdict {
    /// No term decided.
    pub const NO_TERM: u16 = u16::MAX;

    #[inline(always)]
    const fn of(reason: Reason) -> Self {
        Verdict {
            reason,
            term: Self::NO_TERM,
        }
    }

    /// Whether the connection is admitted.
    #[inline(always)]
    pub fn allows(&self) -> bool {
        (self.reason as u16) < 16
    }
}

/// Judges one connection: any DENY match denies; without an ALLOW policy the rest is
/// allowed; with one, a match is needed. Everything unknown is denied.
///
/// DENY terms have the lowest numbers, so the first term that matches decides.
#[inline(always)]
pub fn authorize<T: PolicyTables>(tables: &T, query: &Query) -> Verdict {
    let Some(set) = tables.set(query.set) else {
        return Verdict::of(Reason::NoPolicySet);
    };
    if set.flags & SET_UNREPRESENTABLE != 0 {
        return Verdict::of(Reason::Unrepresentable);
    }
    if set.flags & SET_POLICY_NOT_RECEIVED != 0 {
        return Verdict::of(Reason::PolicyNotReceived);
    }
    if query.identity == IDENTITY_NONE && set.flags & SET_STRICT != 0 {
        return Verdict::of(Reason::PlaintextRefused);
    }
    let Some(by_identity) = tables.identity(query.set, query.identity) else {
        return Verdict::of(Reason::UnknownIdentity);
    };
    let Some(by_source) = by_source(tables, set, query) else {
        return Verdict::of(Reason::NoPolicySet);
    };
    let mut by_port = &set.other_ports;
    if set.flags & SET_HAS_PORTS != 0
        && let Some(mask) = tables.port(query.set, query.port)
    {
        by_port = mask;
    }
    let by_destination = if query.destination_v4 {
        &set.destination4
    } else {
        &set.destination6
    };

    let mut blocks =
        by_identity.summary & by_source.summary & by_port.summary & by_destination.summary;
    let mut round = 0;
    // Each round takes a bit away; the second condition is what the verifier can see.
    while blocks != 0 && round < MASK_BLOCKS {
        let number = lowest_bit(blocks) & (MASK_BLOCKS as u32 - 1);
        blocks &= blocks - 1;
        round += 1;
        let (Some(identity), Some(source), Some(port), Some(destination)) = (
            tables.block(by_identity.index(number)),
            tables.block(by_source.index(number)),
            tables.block(by_port.index(number)),
            tables.block(by_destination.index(number)),
        ) else {
            return Verdict::of(Reason::NoPolicySet);
        };
        let matching = identity.and(source).and(port).and(destination);
        if let Some(first) = matching.first() {
            let term = number * BLOCK_TERMS as u32 + first;
            return Verdict {
                reason: if term < set.deny_terms {
                    Reason::Denied
                } else {
                    Reason::Allowed
                },
                term: term as u16,
            };
        }
    }
    if set.flags & SET_HAS_ALLOW != 0 {
        return Verdict::of(Reason::NotAllowed);
    }
    Verdict::of(Reason::NoAllowPolicy)
}

/// Terms whose source condition holds: those of the longest prefix that covers the source.
/// `None` when the search does not end, as it does over the tables of any compiled set.
#[inline(always)]
fn by_source<T: PolicyTables>(tables: &T, set: &PolicySet, query: &Query) -> Option<Mask> {
    let SourceMatch {
        mut mask,
        mut lengths,
    } = if query.source.is_v4() {
        set.sources4
    } else {
        set.sources6
    };
    let [upper, lower] = query.source.halves();
    let mut probes = 0;
    while lengths != 0 && probes < SOURCE_PROBES {
        let length = lengths as u32 & 0xff;
        lengths >>= 8;
        probes += 1;
        if let Some(found) = tables.source(&SourceKey::new(query.set, length, upper, lower)) {
            mask = found.mask;
            lengths = found.lengths;
        }
    }
    (lengths == 0).then_some(mask)
}
