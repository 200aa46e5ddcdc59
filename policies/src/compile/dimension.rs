//! One dimension: the distinct conditions that terms have there, and the masks of the
//! terms whose condition holds at each value that any of them mentions.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use super::terms::{self, Alternative};
use super::{MAX_COMPARISONS, MAX_SOURCES, MAX_VALUES, Problem, SourcePrefix};
use crate::{Cidr, Match, TermMask};

/// What a match says in one dimension.
pub trait Part: Clone + Eq + Hash {
    /// The bit of the dimension.
    const DIMENSION: u8;

    /// Whether a condition is asked about each of its own values.
    const ASKED_BY_VALUE: bool = false;

    /// What any of these matches says.
    fn any_of(matches: &[&Match]) -> Vec<Self>;

    /// The number of values in it.
    fn len(&self) -> usize;
}

/// All parts, each of which is any of its elements; no part holds always.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition<P> {
    pub parts: Vec<Arc<[P]>>,
    /// The terms that have this condition.
    pub terms: TermMask,
}

impl<P> Condition<P> {
    pub fn holds(&self, is: impl Fn(&P) -> bool) -> bool {
        self.parts.iter().all(|any| any.iter().any(&is))
    }

    fn elements(&self) -> impl Iterator<Item = &P> {
        self.parts.iter().flat_map(|any| any.iter())
    }
}

/// Collects the conditions of the terms; equal ones once.
pub struct Builder<P> {
    parts: Vec<(Arc<[P]>, Weight)>,
    part_numbers: HashMap<Arc<[P]>, u32>,
    conditions: HashMap<Vec<u32>, TermMask>,
}

/// What a condition costs.
#[derive(Clone, Copy, Default)]
struct Weight {
    /// Names, prefixes or ports.
    values: usize,
    /// To be looked through whenever the condition is asked.
    elements: usize,
}

impl<P: Part> Builder<P> {
    pub fn new() -> Self {
        Builder {
            parts: Vec::new(),
            part_numbers: HashMap::new(),
            conditions: HashMap::new(),
        }
    }

    /// The number of what an alternative says in this dimension, if anything.
    pub fn part(&mut self, alternative: &Alternative<'_>) -> Option<u32> {
        if alternative.dimensions & P::DIMENSION == 0 {
            return None;
        }
        let part: Arc<[P]> = P::any_of(&alternative.matches).into();
        if let Some(number) = self.part_numbers.get(&part) {
            return Some(*number);
        }
        let number = self.parts.len() as u32;
        let weight = Weight {
            values: part.iter().map(P::len).sum(),
            elements: part.len(),
        };
        self.parts.push((Arc::clone(&part), weight));
        self.part_numbers.insert(part, number);
        Some(number)
    }

    /// Gives a term the condition that all these parts make. Says `false` for a term
    /// that no mask can hold.
    #[must_use]
    pub fn add(&mut self, term: u16, parts: impl Iterator<Item = u32>) -> bool {
        let mut parts: Vec<u32> = parts.collect();
        parts.sort_unstable();
        parts.dedup();
        self.conditions.entry(parts).or_default().set(term)
    }

    /// The conditions, in a fixed order.
    pub fn finish(self) -> Result<Vec<Condition<P>>, Problem> {
        let mut sorted: Vec<_> = self.conditions.into_iter().collect();
        sorted.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        let (mut values, mut work) = (0usize, 0usize);
        let mut conditions = Vec::with_capacity(sorted.len());
        for (numbers, terms) in sorted {
            let mut parts = Vec::with_capacity(numbers.len());
            let mut whole = Weight::default();
            for (part, weight) in numbers.iter().filter_map(|n| self.parts.get(*n as usize)) {
                parts.push(Arc::clone(part));
                whole.values += weight.values;
                whole.elements += weight.elements;
            }
            values += whole.values;
            if values > MAX_VALUES {
                return Err(Problem::TooManyValues { limit: MAX_VALUES });
            }
            if P::ASKED_BY_VALUE {
                work = work.saturating_add(whole.values.saturating_mul(whole.elements));
            }
            if work > MAX_COMPARISONS {
                let limit = MAX_COMPARISONS;
                return Err(Problem::TooManyComparisons { limit });
            }
            conditions.push(Condition { parts, terms });
        }
        Ok(conditions)
    }
}

/// A field and its `not_` twin, both sorted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lists<T> {
    pub positive: Vec<T>,
    pub negative: Vec<T>,
}

impl<T: Ord + Clone> Lists<T> {
    pub fn new(positive: &[T], negative: &[T]) -> Self {
        let sorted = |list: &[T]| {
            let mut list = list.to_vec();
            list.sort_unstable();
            list.dedup();
            list
        };
        Lists {
            positive: sorted(positive),
            negative: sorted(negative),
        }
    }

    pub fn holds(&self, has: impl Fn(&[T]) -> bool) -> bool {
        (self.positive.is_empty() || has(&self.positive)) && !has(&self.negative)
    }

    /// What any of these says. Lists without a `not_` twin become one list.
    fn any_of(lists: impl Iterator<Item = Self>) -> Vec<Self> {
        let (positive, mut rest): (Vec<_>, Vec<_>) =
            lists.partition(|one| one.negative.is_empty() && !one.positive.is_empty());
        let union: Vec<T> = positive.into_iter().flat_map(|one| one.positive).collect();
        if !union.is_empty() {
            rest.push(Lists::new(&union, &[]));
        }
        rest
    }

    pub fn len(&self) -> usize {
        self.positive.len() + self.negative.len()
    }

    fn values(&self) -> impl Iterator<Item = &T> {
        self.positive.iter().chain(&self.negative)
    }
}

/// What a match says about the source address.
pub type Sources = Lists<Cidr>;

impl Part for Sources {
    const DIMENSION: u8 = terms::SOURCE;
    const ASKED_BY_VALUE: bool = true;

    fn any_of(matches: &[&Match]) -> Vec<Self> {
        let lists = matches
            .iter()
            .map(|m| Lists::new(&m.source_ips, &m.not_source_ips));
        Lists::any_of(lists)
    }

    fn len(&self) -> usize {
        Lists::len(self)
    }
}

/// What a match says about the port.
pub type Ports = Lists<u16>;

impl Part for Ports {
    const DIMENSION: u8 = terms::PORT;
    const ASKED_BY_VALUE: bool = true;

    fn any_of(matches: &[&Match]) -> Vec<Self> {
        let lists = matches
            .iter()
            .map(|m| Lists::new(&m.destination_ports, &m.not_destination_ports));
        Lists::any_of(lists)
    }

    fn len(&self) -> usize {
        Lists::len(self)
    }
}

/// What a match says about the workload's own address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destinations(Lists<Cidr>);

impl Part for Destinations {
    const DIMENSION: u8 = terms::DESTINATION;

    fn any_of(matches: &[&Match]) -> Vec<Self> {
        let lists = matches
            .iter()
            .map(|m| Lists::new(&m.destination_ips, &m.not_destination_ips));
        Lists::any_of(lists).into_iter().map(Destinations).collect()
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// The terms whose condition `holds`.
pub fn mask_where<P>(
    conditions: &[Condition<P>],
    holds: impl Fn(&Condition<P>) -> bool,
) -> TermMask {
    let mut mask = TermMask::default();
    for condition in conditions.iter().filter(|c| holds(c)) {
        mask.add(&condition.terms);
    }
    mask
}

/// For connections to `address`, which is the workload's own. Without one, the terms below
/// `deny_terms` hold and the others do not: nobody can say which address it would be.
pub fn destination(
    conditions: &[Condition<Destinations>],
    address: Option<IpAddr>,
    deny_terms: u32,
) -> TermMask {
    if let Some(address) = address {
        return mask_where(conditions, |condition| {
            condition.holds(|lists| {
                lists
                    .0
                    .holds(|list| list.iter().any(|c| c.contains(address)))
            })
        });
    }
    let mut mask = mask_where(conditions, |condition| condition.parts.is_empty());
    for condition in conditions {
        mask.add(&condition.terms.below(deny_terms));
    }
    mask
}

/// The mask for addresses in no prefix, and each prefix whose answer differs from that of
/// the next shorter one.
///
/// The addresses whose longest match a prefix is lie in exactly the prefixes that cover
/// it. A condition that does not mention the prefix therefore holds for them exactly when
/// it holds for its nearest ancestor, so only those that mention it are asked again.
pub fn sources(
    conditions: &[Condition<Sources>],
) -> Result<(TermMask, Vec<(SourcePrefix, TermMask)>), Problem> {
    let other = mask_where(conditions, |c| c.holds(|lists| lists.holds(|_| false)));
    let mut mentions = mentions(conditions);
    // A prefix comes before all that it covers, and those come before anything else.
    mentions.sort_unstable();
    mentions.dedup();
    let prefixes = mentions.chunk_by(|(a, _), (b, _)| a == b);
    if prefixes.clone().count() > MAX_SOURCES {
        return Err(Problem::TooManySources { limit: MAX_SOURCES });
    }

    let mut entries = Vec::new();
    // The prefix itself and all that cover it, with the masks of their own addresses.
    let mut chain: Vec<Cidr> = Vec::new();
    let mut masks: Vec<TermMask> = Vec::new();
    for of_prefix in prefixes {
        let Some((prefix, _)) = of_prefix.first() else {
            continue;
        };
        while chain.last().is_some_and(|above| !above.covers(prefix)) {
            chain.pop();
            masks.pop();
        }
        chain.push(*prefix);
        let above = masks.last().unwrap_or(&other);
        let mut mask = above.clone();
        let in_list = |list: &[Cidr]| chain.iter().any(|c| list.binary_search(c).is_ok());
        for condition in of_prefix
            .iter()
            .filter_map(|(_, number)| conditions.get(*number))
        {
            if condition.holds(|lists| lists.holds(in_list)) {
                mask.add(&condition.terms);
            } else {
                mask.remove(&condition.terms);
            }
        }
        if mask != *above {
            let (addr, length) = prefix.mapped();
            entries.push((SourcePrefix { addr, length }, mask.clone()));
        }
        masks.push(mask);
    }
    Ok((other, entries))
}

/// The mask for ports that nothing mentions, and each port whose answer differs.
pub fn ports(conditions: &[Condition<Ports>]) -> (TermMask, Vec<(u16, TermMask)>) {
    let other = mask_where(conditions, |c| c.holds(|lists| lists.holds(|_| false)));
    let mut mentions = mentions(conditions);
    mentions.sort_unstable();
    mentions.dedup();

    let mut entries = Vec::new();
    for of_port in mentions.chunk_by(|(a, _), (b, _)| a == b) {
        let Some((port, _)) = of_port.first() else {
            continue;
        };
        let mut mask = other.clone();
        let in_list = |list: &[u16]| list.binary_search(port).is_ok();
        for condition in of_port.iter().filter_map(|(_, n)| conditions.get(*n)) {
            if condition.holds(|lists| lists.holds(in_list)) {
                mask.add(&condition.terms);
            } else {
                mask.remove(&condition.terms);
            }
        }
        if mask != other {
            entries.push((*port, mask));
        }
    }
    (other, entries)
}

/// Each value with each condition that mentions it, in no order.
fn mentions<T: Ord + Copy>(conditions: &[Condition<Lists<T>>]) -> Vec<(T, usize)> {
    let of = |(number, condition): (usize, &Condition<Lists<T>>)| {
        let values = condition.elements().flat_map(Lists::values).copied();
        values.map(|value| (value, number)).collect::<Vec<_>>()
    };
    conditions.iter().enumerate().flat_map(of).collect()
}
