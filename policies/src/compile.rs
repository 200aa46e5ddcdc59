//! The compiler: a workload's policies to the tables that the eBPF programs read.
//!
//! Every rule is multiplied out into *terms*, each a conjunction of matches. The fields
//! of a match fall into four dimensions that do not depend on each other (identity,
//! source address, port, destination address), so a term holds where its condition holds
//! in all four; one table per dimension gives the mask of the terms whose condition holds
//! there, and the intersection of the masks is the answer.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ringfence_bpf_common::{
    Addr, MAX_TERMS, Mask, PolicySet, Reason, SET_HAS_ALLOW, SET_POLICY_NOT_RECEIVED, SET_STRICT,
    SET_UNREPRESENTABLE, SourceKey, Verdict,
};

use crate::{
    Action, Cidr, Decision, Match, Mode, Peer, Policy, PolicyName, RejectedPolicy, Rule,
    WorkloadPolicies,
};

/// The compiled policies of one workload.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct CompiledSet {
    /// The entry of `POLICY_SETS`.
    pub set: PolicySet,
    /// The entries of `POLICY_SOURCES`, each prefix once.
    pub sources: Vec<(SourcePrefix, Mask)>,
    /// The entries of `POLICY_PORTS`, each port once.
    pub ports: Vec<(u16, Mask)>,
    /// Where each term comes from: index = bit in the masks = `Verdict::term`.
    pub terms: Vec<TermOrigin>,
    /// Why the set denies everything, if it does. Empty otherwise.
    pub problems: Vec<Problem>,
    /// Kept for [`CompiledSet::identity_mask`]: conjunctions, one per term.
    conditions: Vec<Vec<Arc<Match>>>,
}

/// The policy and rule that a term was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TermOrigin {
    pub policy: PolicyName,
    /// Counted from 0.
    pub rule: usize,
    pub action: Action,
}

/// Why a set denies everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The policies need more terms than a set holds; `policy` is the one that passed
    /// the limit.
    TooManyTerms { policy: PolicyName, limit: usize },
    /// A policy that applies has a value that cannot be used.
    Rejected(Arc<RejectedPolicy>),
    /// The workload names a policy that has not arrived.
    NotReceived(String),
}

/// The workload's own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WorkloadAddresses {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

/// A source prefix as the LPM trie holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourcePrefix {
    /// IPv4 is mapped (`::ffff:a.b.c.d`).
    pub addr: Addr,
    /// 0 to 128 bits of `addr`; IPv4 prefixes have 96 or more.
    pub length: u8,
}

impl SourcePrefix {
    /// The trie's key for the set with this id, and its prefix length in bits, which
    /// counts the 32 bits of the id.
    pub fn key(&self, set: u32) -> (u32, SourceKey) {
        let key = SourceKey {
            set: set.to_be_bytes(),
            addr: self.addr,
        };
        (u32::BITS + u32::from(self.length), key)
    }
}

/// Compiles. Never fails: what cannot be represented gives a set that denies everything
/// and says why in [`CompiledSet::problems`].
///
/// Destination addresses are judged as the workload's own. Where it has no address of a
/// family, DENY terms with a destination condition hold for that family and ALLOW terms
/// with one do not: nobody can say which address it would be.
pub fn compile(policies: &WorkloadPolicies, addresses: WorkloadAddresses) -> CompiledSet {
    let mut problems: Vec<Problem> = policies
        .rejected
        .iter()
        .cloned()
        .map(Problem::Rejected)
        .collect();
    let mut terms = Vec::new();
    let enforced = || policies.policies.iter().filter(|policy| !policy.dry_run);
    for policy in enforced() {
        if let Err(TooMany) = add_terms(&mut terms, policy) {
            problems.push(Problem::TooManyTerms {
                policy: policy.name.clone(),
                limit: MAX_TERMS,
            });
            break;
        }
    }

    let mut set = PolicySet::default();
    if policies.mode == Mode::Strict {
        set.flags |= SET_STRICT;
    }
    if enforced().any(|policy| policy.action == Action::Allow) {
        set.flags |= SET_HAS_ALLOW;
    }
    if !problems.is_empty() {
        set.flags |= SET_UNREPRESENTABLE;
        // Half a set must not be mistaken for a whole one.
        terms.clear();
    }
    if !policies.missing.is_empty() {
        set.flags |= SET_POLICY_NOT_RECEIVED;
        problems.extend(policies.missing.iter().cloned().map(Problem::NotReceived));
    }

    set.deny = mask_of(&terms, |term| term.origin.action == Action::Deny);
    set.allow = mask_of(&terms, |term| term.origin.action == Action::Allow);
    set.other_sources = mask_of(&terms, |term| term.source_holds(|_| false));
    set.other_ports = mask_of(&terms, |term| term.port_holds(|_| false));
    set.destination4 = destination_mask(&terms, addresses.v4.map(IpAddr::V4));
    set.destination6 = destination_mask(&terms, addresses.v6.map(IpAddr::V6));

    CompiledSet {
        set,
        sources: source_entries(&terms),
        ports: port_entries(&terms),
        problems,
        conditions: terms.iter().map(|term| term.matches.clone()).collect(),
        terms: terms.into_iter().map(|term| term.origin).collect(),
    }
}

impl CompiledSet {
    /// The entry of `POLICY_IDENTITIES` for a peer, or for plaintext (`None`, which
    /// belongs under `IDENTITY_NONE`). All wildcards are resolved here, once per identity.
    pub fn identity_mask(&self, peer: Option<&Peer>) -> Mask {
        let mut mask = Mask::NONE;
        for (bit, matches) in self.conditions.iter().enumerate() {
            if matches.iter().all(|m| identity_holds(m, peer)) {
                mask.set(bit);
            }
        }
        mask
    }

    /// Where the term with this number comes from.
    pub fn origin(&self, term: u16) -> Option<&TermOrigin> {
        self.terms.get(usize::from(term))
    }

    /// A verdict over this set in the words of the policies: which policy and rule
    /// decided, or which policy closes the workload.
    pub fn decision(&self, verdict: Verdict) -> Decision {
        let origin = self.origin(verdict.term);
        let policy = match verdict.reason {
            Reason::Unrepresentable => self.problems.iter().find_map(|problem| match problem {
                Problem::TooManyTerms { policy, .. } => Some(policy.clone()),
                Problem::Rejected(rejected) => Some(rejected.name.clone()),
                Problem::NotReceived(_) => None,
            }),
            Reason::PolicyNotReceived => self.problems.iter().find_map(|problem| match problem {
                Problem::NotReceived(name) => name.parse().ok(),
                Problem::TooManyTerms { .. } | Problem::Rejected(_) => None,
            }),
            _ => origin.map(|origin| origin.policy.clone()),
        };
        Decision {
            reason: verdict.reason,
            policy,
            rule: origin.map(|origin| origin.rule),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::TooManyTerms { policy, limit } => write!(
                f,
                "policy {policy} takes the workload past {limit} terms (combinations of one \
                 match per clause); split its rules or use fewer policies on this workload"
            ),
            Problem::Rejected(rejected) => rejected.error.fmt(f),
            Problem::NotReceived(name) => {
                write!(
                    f,
                    "policy {name} is named by the workload and has not been received"
                )
            }
        }
    }
}

/// A conjunction of matches.
struct Term {
    origin: TermOrigin,
    matches: Vec<Arc<Match>>,
}

struct TooMany;

fn add_terms(terms: &mut Vec<Term>, policy: &Policy) -> Result<(), TooMany> {
    for (rule_index, rule) in policy.rules.iter().enumerate() {
        for matches in multiply_out(rule, MAX_TERMS.saturating_sub(terms.len()))? {
            let origin = TermOrigin {
                policy: policy.name.clone(),
                rule: rule_index,
                action: policy.action,
            };
            terms.push(Term { origin, matches });
        }
    }
    Ok(())
}

/// All ways to take one match from every clause; at most `room`.
fn multiply_out(rule: &Rule, room: usize) -> Result<Vec<Vec<Arc<Match>>>, TooMany> {
    let mut factors: Vec<Vec<Arc<Match>>> = Vec::new();
    // A clause without matches holds always: it is no factor. An empty match holds never:
    // it is no choice, and a clause that had no other leaves the product empty.
    for clause in rule
        .clauses
        .iter()
        .filter(|clause| !clause.matches.is_empty())
    {
        factors.push(
            clause
                .matches
                .iter()
                .filter(|m| !m.is_empty())
                .map(|m| Arc::new(m.clone()))
                .collect(),
        );
    }
    if factors.iter().any(Vec::is_empty) {
        return Ok(Vec::new());
    }
    // Counted before anything is built: the product grows exponentially.
    let count = factors
        .iter()
        .try_fold(1usize, |count, factor| count.checked_mul(factor.len()));
    if count.is_none_or(|count| count > room) {
        return Err(TooMany);
    }
    let mut products = vec![Vec::new()];
    for factor in &factors {
        products = products
            .iter()
            .flat_map(|product: &Vec<Arc<Match>>| {
                factor
                    .iter()
                    .map(|m| product.iter().chain([m]).cloned().collect())
            })
            .collect();
    }
    Ok(products)
}

impl Term {
    fn source_holds(&self, within: impl Fn(&Cidr) -> bool) -> bool {
        self.matches
            .iter()
            .all(|m| holds(&m.source_ips, &m.not_source_ips, &within))
    }

    fn port_holds(&self, is: impl Fn(&u16) -> bool) -> bool {
        self.matches
            .iter()
            .all(|m| holds(&m.destination_ports, &m.not_destination_ports, &is))
    }

    fn destination_holds(&self, within: impl Fn(&Cidr) -> bool) -> bool {
        self.matches
            .iter()
            .all(|m| holds(&m.destination_ips, &m.not_destination_ips, &within))
    }

    fn has_destination_condition(&self) -> bool {
        self.matches
            .iter()
            .any(|m| !m.destination_ips.is_empty() || !m.not_destination_ips.is_empty())
    }
}

fn identity_holds(m: &Match, peer: Option<&Peer>) -> bool {
    // An absent name is matched by no pattern, so that positive lists fail and negative
    // ones hold.
    let namespace = peer.and_then(Peer::namespace);
    holds(&m.namespaces, &m.not_namespaces, |v| {
        namespace.is_some_and(|n| v.matches(n))
    }) && holds(&m.principals, &m.not_principals, |v| {
        peer.is_some_and(|peer| v.matches(peer.principal()))
    }) && holds(&m.service_accounts, &m.not_service_accounts, |v| {
        peer.is_some_and(|peer| v.matches(peer))
    })
}

fn holds<T>(positive: &[T], negative: &[T], is: impl Fn(&T) -> bool) -> bool {
    let admitted = positive.is_empty() || positive.iter().any(&is);
    let excluded = negative.iter().any(&is);
    admitted && !excluded
}

fn mask_of(terms: &[Term], holds: impl Fn(&Term) -> bool) -> Mask {
    let mut mask = Mask::NONE;
    for (bit, term) in terms.iter().enumerate() {
        if holds(term) {
            mask.set(bit);
        }
    }
    mask
}

fn destination_mask(terms: &[Term], address: Option<IpAddr>) -> Mask {
    mask_of(terms, |term| match address {
        Some(address) => term.destination_holds(|cidr| cidr.contains(address)),
        None => !term.has_destination_condition() || term.origin.action == Action::Deny,
    })
}

/// For each prefix the terms that hold for the addresses whose longest match it is. Those
/// addresses lie in exactly the prefixes that cover it.
fn source_entries(terms: &[Term]) -> Vec<(SourcePrefix, Mask)> {
    let mut prefixes: BTreeSet<Cidr> = terms
        .iter()
        .flat_map(|term| &term.matches)
        .flat_map(|m| m.source_ips.iter().chain(&m.not_source_ips))
        .copied()
        .collect();
    // The trie does not know families: keep a short IPv6 prefix from answering for IPv4.
    if prefixes.iter().any(Cidr::shadows_mapped) {
        prefixes.insert(Cidr::ALL_V4);
    }
    prefixes
        .iter()
        .map(|prefix| {
            let (addr, length) = prefix.trie_key();
            let mask = mask_of(terms, |term| term.source_holds(|cidr| cidr.covers(prefix)));
            (SourcePrefix { addr, length }, mask)
        })
        .collect()
}

fn port_entries(terms: &[Term]) -> Vec<(u16, Mask)> {
    let ports: BTreeSet<u16> = terms
        .iter()
        .flat_map(|term| &term.matches)
        .flat_map(|m| m.destination_ports.iter().chain(&m.not_destination_ports))
        .copied()
        .collect();
    ports
        .into_iter()
        .map(|port| (port, mask_of(terms, |term| term.port_holds(|p| *p == port))))
        .collect()
}
