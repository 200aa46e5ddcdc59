//! The compiler: a workload's policies to the tables that the eBPF programs read.
//!
//! Every rule becomes *terms*, each a conjunction of one condition per dimension
//! (identity, source address, port, destination address). The dimensions do not depend on
//! each other, so a term holds where its condition holds in all four; one table per
//! dimension gives the mask of the terms whose condition holds there, and the
//! intersection of the masks is the answer.

mod dimension;
mod identities;
mod problem;
mod search;
mod terms;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ringfence_bpf_common::{
    Addr, MAX_TERMS, Mask, PolicySet, Reason, SET_HAS_ALLOW, SET_HAS_PORTS,
    SET_POLICY_NOT_RECEIVED, SET_STRICT, SET_UNREPRESENTABLE, SourceKey, SourceMatch, Verdict,
};

use self::dimension::{Builder, Destinations, Ports, Sources};
use self::identities::{Identities, Names};
pub use self::problem::{MAX_COMPARISONS, MAX_SOURCES, MAX_VALUES, Problem};
use self::search::{Search, Step};
use self::terms::Alternative;
use crate::mask::Interner;
use crate::{
    Action, BlockStore, Decision, Layout, Mode, Peer, Policy, PolicyName, TermMask,
    WorkloadPolicies,
};

/// The compiled policies of one workload. Equal masks share their memory.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct CompiledSet {
    /// Bits of `SET_*`.
    pub flags: u32,
    /// Terms below this number are those of DENY policies, the others of ALLOW policies.
    pub deny_terms: u32,
    /// Terms whose source condition holds for an address in none of `sources`.
    pub other_sources: TermMask,
    /// Terms whose port condition holds for a port that `ports` lacks.
    pub other_ports: TermMask,
    /// Terms whose destination condition holds for the workload's IPv4 address.
    pub destination4: TermMask,
    /// Terms whose destination condition holds for the workload's IPv6 address.
    pub destination6: TermMask,
    /// The prefixes that decide, each once: the mask for the addresses whose longest match
    /// it is.
    pub sources: Vec<(SourcePrefix, TermMask)>,
    /// The entries of `POLICY_PORTS`, each port once.
    pub ports: Vec<(u16, TermMask)>,
    /// Where each term comes from: index = bit in the masks = `Verdict::term`.
    pub terms: Vec<TermOrigin>,
    /// Why the set denies everything, if it does. Empty otherwise.
    pub problems: Vec<Problem>,
    identities: Identities,
    depends_on_destination: bool,
}

/// The entries of the policy maps for one set, without identities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntries {
    /// Of `POLICY_SETS`.
    pub set: PolicySet,
    /// Of `POLICY_SOURCES`, each prefix once: those of the set and their markers.
    pub sources: Vec<(SourcePrefix, SourceMatch)>,
    /// Of `POLICY_PORTS`, each port once.
    pub ports: Vec<(u16, Mask)>,
}

/// The policy and rule that a term was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TermOrigin {
    pub policy: PolicyName,
    /// Counted from 0.
    pub rule: usize,
    pub action: Action,
}

/// The workload's own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WorkloadAddresses {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

/// A source prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourcePrefix {
    /// IPv4 is mapped (`::ffff:a.b.c.d`).
    pub addr: Addr,
    /// 0 to 128 bits of `addr`; IPv4 prefixes have 96 or more.
    pub length: u8,
}

impl SourcePrefix {
    /// Its key in `POLICY_SOURCES` for the set with this id.
    pub fn key(&self, set: u32) -> SourceKey {
        let [upper, lower] = self.addr.halves();
        SourceKey::new(set, self.length.into(), upper, lower)
    }
}

/// Compiles. Never fails: what cannot be represented gives a set that denies everything
/// and says why in [`CompiledSet::problems`].
///
/// Destination addresses are judged as the workload's own. Where it has no address of a
/// family, DENY terms with a destination condition hold for that family and ALLOW terms
/// with one do not: nobody can say which address it would be.
pub fn compile(policies: &WorkloadPolicies, addresses: WorkloadAddresses) -> CompiledSet {
    compile_where(policies, addresses, |policy| !policy.dry_run)
}

/// What [`compile`] would give if the dry-run policies were enforced too; `None` when the
/// workload has none. For reports only.
pub fn compile_with_dry_run(
    policies: &WorkloadPolicies,
    addresses: WorkloadAddresses,
) -> Option<CompiledSet> {
    policies
        .policies
        .iter()
        .any(|policy| policy.dry_run)
        .then(|| compile_where(policies, addresses, |_| true))
}

impl CompiledSet {
    /// The entry of `POLICY_IDENTITIES` for a peer, or for plaintext (`None`, which
    /// belongs under `IDENTITY_NONE`). All wildcards are resolved here, once per identity.
    pub fn identity_mask(&self, peer: Option<&Peer>) -> TermMask {
        self.identities.mask(peer)
    }

    /// Whether the workload's own addresses had a part in it. Otherwise every workload
    /// with the same policies has the same set.
    pub fn depends_on_destination(&self) -> bool {
        self.depends_on_destination
    }

    /// Stores all masks but those of identities (for which see [`Layout::mask`]) and
    /// gives the entries of the maps; `None` when the store has no room: then what
    /// `layout` lists was stored and is to be given back.
    pub fn lay_out(&self, layout: &mut Layout, store: &mut impl BlockStore) -> Option<MapEntries> {
        let search = Search::of(&self.sources, &self.other_sources);
        let mut place = |step: &Step<'_>| {
            Some(SourceMatch {
                mask: layout.mask(step.mask, store)?,
                lengths: step.lengths,
            })
        };
        let (sources4, sources6) = (place(&search.v4)?, place(&search.v6)?);
        let mut sources = Vec::with_capacity(search.entries.len());
        for (prefix, step) in &search.entries {
            sources.push((*prefix, place(step)?));
        }
        let has_ports = if self.ports.is_empty() {
            0
        } else {
            SET_HAS_PORTS
        };
        let set = PolicySet {
            flags: self.flags | has_ports,
            deny_terms: self.deny_terms,
            sources4,
            sources6,
            other_ports: layout.mask(&self.other_ports, store)?,
            destination4: layout.mask(&self.destination4, store)?,
            destination6: layout.mask(&self.destination6, store)?,
        };
        let mut ports = Vec::with_capacity(self.ports.len());
        for (port, mask) in &self.ports {
            ports.push((*port, layout.mask(mask, store)?));
        }
        Some(MapEntries {
            set,
            sources,
            ports,
        })
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
                Problem::TooManySources { .. }
                | Problem::TooManyValues { .. }
                | Problem::TooManyComparisons { .. }
                | Problem::NotReceived(_) => None,
            }),
            Reason::PolicyNotReceived => self.problems.iter().find_map(|problem| match problem {
                Problem::NotReceived(name) => name.parse().ok(),
                Problem::TooManyTerms { .. }
                | Problem::TooManySources { .. }
                | Problem::TooManyValues { .. }
                | Problem::TooManyComparisons { .. }
                | Problem::Rejected(_) => None,
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

fn compile_where(
    policies: &WorkloadPolicies,
    addresses: WorkloadAddresses,
    counts: impl Fn(&Policy) -> bool,
) -> CompiledSet {
    let enforced: Vec<&Policy> = policies
        .policies
        .iter()
        .map(Arc::as_ref)
        .filter(|policy| counts(policy))
        .collect();
    let mut problems: Vec<Problem> = policies
        .rejected
        .iter()
        .cloned()
        .map(Problem::Rejected)
        .collect();
    problems.extend(past_the_limit(&enforced));

    // Half a set must not be mistaken for a whole one: it is compiled whole or not at all.
    let mut compiled = CompiledSet::default();
    if problems.is_empty() {
        match Terms::of(&enforced).and_then(|terms| terms.compile(addresses)) {
            Ok(whole) => compiled = whole,
            Err(problem) => problems.push(problem),
        }
    }
    let mut flags = 0;
    if !problems.is_empty() {
        flags |= SET_UNREPRESENTABLE;
    }
    if policies.mode == Mode::Strict {
        flags |= SET_STRICT;
    }
    if enforced.iter().any(|policy| policy.action == Action::Allow) {
        flags |= SET_HAS_ALLOW;
    }
    if !policies.missing.is_empty() {
        flags |= SET_POLICY_NOT_RECEIVED;
        problems.extend(policies.missing.iter().cloned().map(Problem::NotReceived));
    }
    CompiledSet {
        flags,
        problems,
        ..compiled
    }
}

/// The size of all policies against what a set holds, before anything is built.
fn past_the_limit(policies: &[&Policy]) -> Option<Problem> {
    let (mut terms, mut choices) = (0usize, 0usize);
    for policy in policies {
        for rule in &policy.rules {
            let size = terms::size(rule);
            terms = size.map_or(usize::MAX, |size| terms.saturating_add(size.terms));
            if terms > MAX_TERMS {
                return Some(Problem::TooManyTerms {
                    policy: policy.name.clone(),
                    limit: MAX_TERMS,
                });
            }
            choices = choices.saturating_add(size.map_or(0, |size| size.choices));
            if choices > MAX_VALUES {
                return Some(Problem::TooManyValues { limit: MAX_VALUES });
            }
        }
    }
    None
}

/// The terms of a set, by what they demand in each dimension.
struct Terms {
    origins: Vec<TermOrigin>,
    deny_terms: u32,
    identities: Builder<Names>,
    sources: Builder<Sources>,
    ports: Builder<Ports>,
    destinations: Builder<Destinations>,
}

/// The numbers of an alternative's conditions.
#[derive(Clone, Copy)]
struct Parts {
    identity: Option<u32>,
    source: Option<u32>,
    port: Option<u32>,
    destination: Option<u32>,
}

impl Terms {
    fn new() -> Self {
        Terms {
            origins: Vec::new(),
            deny_terms: 0,
            identities: Builder::new(),
            sources: Builder::new(),
            ports: Builder::new(),
            destinations: Builder::new(),
        }
    }

    /// DENY policies first: the lowest term that matches decides.
    fn of(policies: &[&Policy]) -> Result<Self, Problem> {
        let mut terms = Terms::new();
        for action in [Action::Deny, Action::Allow] {
            for policy in policies.iter().filter(|policy| policy.action == action) {
                terms.add_policy(policy)?;
            }
            if action == Action::Deny {
                terms.deny_terms = terms.origins.len() as u32;
            }
        }
        Ok(terms)
    }

    fn add_policy(&mut self, policy: &Policy) -> Result<(), Problem> {
        for (number, rule) in policy.rules.iter().enumerate() {
            let Some(factors) = terms::factors(rule) else {
                continue;
            };
            let factors: Vec<Vec<Parts>> = factors
                .iter()
                .map(|ways| ways.iter().map(|way| self.parts(way)).collect())
                .collect();
            let mut fits = true;
            terms::multiply_out(&factors, |chosen| {
                let origin = TermOrigin {
                    policy: policy.name.clone(),
                    rule: number,
                    action: policy.action,
                };
                fits &= self.add_term(origin, chosen);
            });
            if !fits {
                return Err(Problem::TooManyTerms {
                    policy: policy.name.clone(),
                    limit: MAX_TERMS,
                });
            }
        }
        Ok(())
    }

    fn parts(&mut self, way: &Alternative<'_>) -> Parts {
        Parts {
            identity: self.identities.part(way),
            source: self.sources.part(way),
            port: self.ports.part(way),
            destination: self.destinations.part(way),
        }
    }

    fn add_term(&mut self, origin: TermOrigin, chosen: &[&Parts]) -> bool {
        let Ok(term) = u16::try_from(self.origins.len()) else {
            return false;
        };
        self.origins.push(origin);
        self.identities
            .add(term, chosen.iter().filter_map(|parts| parts.identity))
            && self
                .sources
                .add(term, chosen.iter().filter_map(|parts| parts.source))
            && self
                .ports
                .add(term, chosen.iter().filter_map(|parts| parts.port))
            && self
                .destinations
                .add(term, chosen.iter().filter_map(|parts| parts.destination))
    }

    fn compile(self, addresses: WorkloadAddresses) -> Result<CompiledSet, Problem> {
        let mut masks = Interner::default();
        let destinations = self.destinations.finish()?;
        let destination = |address| dimension::destination(&destinations, address, self.deny_terms);
        let (other_sources, sources) = dimension::sources(&self.sources.finish()?)?;
        let (other_ports, ports) = dimension::ports(&self.ports.finish()?);
        Ok(CompiledSet {
            flags: 0,
            deny_terms: self.deny_terms,
            other_sources: masks.intern(other_sources),
            other_ports: masks.intern(other_ports),
            destination4: masks.intern(destination(addresses.v4.map(IpAddr::V4))),
            destination6: masks.intern(destination(addresses.v6.map(IpAddr::V6))),
            sources: sources
                .into_iter()
                .map(|(prefix, mask)| (prefix, masks.intern(mask)))
                .collect(),
            ports: ports
                .into_iter()
                .map(|(port, mask)| (port, masks.intern(mask)))
                .collect(),
            terms: self.origins,
            problems: Vec::new(),
            identities: Identities::new(self.identities.finish()?),
            depends_on_destination: destinations.iter().any(|c| !c.parts.is_empty()),
        })
    }
}
