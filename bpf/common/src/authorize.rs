//! The authorization decision: one function, called by the eBPF programs (the
//! tunnel's last hop in `connect`, plaintext in `sk_lookup`) and by userspace tests,
//! over tables that are BPF maps in one case and plain collections in the other.

use crate::maps::{
    Addr, IDENTITY_NONE, Mask, PolicySet, SET_HAS_ALLOW, SET_POLICY_NOT_RECEIVED, SET_STRICT,
    SET_UNREPRESENTABLE,
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
    /// Terms whose source address condition holds: the longest prefix of `source`.
    fn source(&self, set: u32, source: &Addr) -> Option<&Mask>;
    /// Terms whose port condition holds.
    fn port(&self, set: u32, port: u16) -> Option<&Mask>;
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
}

impl Reason {
    /// All reasons, in order of their number.
    pub const ALL: [Reason; 11] = [
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
    // Each mask is used as soon as it is found: the verifier would follow every
    // combination of where they came from.
    let Some(by_identity) = tables.identity(query.set, query.identity) else {
        return Verdict::of(Reason::UnknownIdentity);
    };
    let matching = by_identity.and(match tables.source(query.set, &query.source) {
        Some(mask) => mask,
        None => &set.other_sources,
    });
    let matching = matching.and(match tables.port(query.set, query.port) {
        Some(mask) => mask,
        None => &set.other_ports,
    });
    let matching = matching.and(if query.destination_v4 {
        &set.destination4
    } else {
        &set.destination6
    });

    if let Some(term) = matching.and(&set.deny).first() {
        return Verdict {
            reason: Reason::Denied,
            term,
        };
    }
    if let Some(term) = matching.and(&set.allow).first() {
        return Verdict {
            reason: Reason::Allowed,
            term,
        };
    }
    if set.flags & SET_HAS_ALLOW != 0 {
        return Verdict::of(Reason::NotAllowed);
    }
    Verdict::of(Reason::NoAllowPolicy)
}
