//! The prefixes of a set arranged for a binary search on their lengths, whose number of
//! look-ups does not depend on how many prefixes there are
//! ([`ringfence_bpf_common::SourceMatch`] says how it is searched).
//!
//! Each hit has a search of its own over the lengths that occur below it (Waldvogel's
//! "mutating" search): behind most prefixes there is nothing longer, and it ends there.
//! Where prefixes have many lengths, some are first replaced by the longer ones they consist
//! of ("controlled prefix expansion"), so that three look-ups do.

mod expansion;

use ringfence_bpf_common::Addr;

use self::expansion::with_fewer_lengths;
use super::SourcePrefix;
use crate::TermMask;

/// What [`ringfence_bpf_common::SourceMatch`] holds, before masks have a place.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    pub mask: &'a TermMask,
    pub lengths: u64,
}

/// The entries of `POLICY_SOURCES`, and where the searches of both families begin.
pub struct Search<'a> {
    pub v4: Step<'a>,
    pub v6: Step<'a>,
    pub entries: Vec<(SourcePrefix, Step<'a>)>,
}

impl<'a> Search<'a> {
    /// Of prefixes in any order, each once, with the masks of the addresses whose longest
    /// match they are; `other` is that of the rest.
    pub fn of(prefixes: &'a [(SourcePrefix, TermMask)], other: &'a TermMask) -> Self {
        let (v4, v6): (Vec<_>, Vec<_>) = prefixes.iter().partition(|(prefix, _)| prefix.is_v4());
        let mut entries = Vec::new();
        Search {
            v4: arranged(v4, MAPPED, other, &mut entries),
            v6: arranged(v6, 0, other, &mut entries),
            entries,
        }
    }
}

/// The bits of an IPv4-mapped address in front of the IPv4 address.
const MAPPED: u8 = 96;

impl SourcePrefix {
    fn is_v4(&self) -> bool {
        self.length >= MAPPED && self.addr.is_v4()
    }
}

/// Arranges the prefixes of one family; `all` is the length of the prefix that has every
/// address of the family. Gives where its search begins.
fn arranged<'a>(
    prefixes: Vec<&'a (SourcePrefix, TermMask)>,
    all: u8,
    other: &'a TermMask,
    entries: &mut Vec<(SourcePrefix, Step<'a>)>,
) -> Step<'a> {
    let mut named: Vec<Named<'a>> = prefixes
        .into_iter()
        .map(|(prefix, mask)| Named {
            bits: first_bits(u128::from_be_bytes(prefix.addr.0), prefix.length),
            length: prefix.length.min(128),
            mask,
            above: None,
        })
        .collect();
    let whole = named.iter().position(|one| one.length == all);
    let whole = whole.map(|at| named.swap_remove(at).mask);
    let mut named = with_fewer_lengths(named);
    // A prefix comes before all that it covers, and those come before anything else.
    named.sort_unstable_by_key(|one| (one.bits, one.length));
    let mut chain: Vec<usize> = Vec::new();
    for number in 0..named.len() {
        let Some(one) = named.get(number).copied() else {
            continue;
        };
        let covers = |above: &usize| named.get(*above).is_some_and(|above| above.covers(&one));
        while chain.last().is_some_and(|above| !covers(above)) {
            chain.pop();
        }
        let above = chain.last().copied();
        if let Some(one) = named.get_mut(number) {
            one.above = above;
        }
        chain.push(number);
    }
    let mask = whole.unwrap_or(other);
    let every: Vec<Named<'a>> = named.clone();
    let mut arrangement = Arrangement {
        named: &named,
        rest: mask,
        entries,
    };
    Step {
        mask,
        lengths: arrangement.steps(&every),
    }
}

/// A prefix that policies name.
#[derive(Clone, Copy)]
struct Named<'a> {
    bits: u128,
    length: u8,
    mask: &'a TermMask,
    /// The longest one that covers it.
    above: Option<usize>,
}

impl Named<'_> {
    fn covers(&self, other: &Self) -> bool {
        self.length <= other.length && first_bits(other.bits, self.length) == self.bits
    }
}

struct Arrangement<'n, 'a> {
    named: &'n [Named<'a>],
    /// For addresses in none of them.
    rest: &'a TermMask,
    entries: &'n mut Vec<(SourcePrefix, Step<'a>)>,
}

impl<'a> Arrangement<'_, 'a> {
    /// Puts down the entries that find these prefixes, sorted, and gives the lengths to ask
    /// for. Each half has at most half the lengths, so there are at most 8 to ask for on
    /// any way, and as many calls inside each other.
    fn steps(&mut self, prefixes: &[Named<'a>]) -> u64 {
        let mut lengths = [false; 129];
        for prefix in prefixes {
            if let Some(occurs) = lengths.get_mut(usize::from(prefix.length)) {
                *occurs = true;
            }
        }
        let lengths: Vec<u8> = (0u8..)
            .zip(lengths)
            .filter(|(_, occurs)| *occurs)
            .map(|(length, _)| length)
            .collect();
        let Some(middle) = lengths.get(lengths.len() / 2).copied() else {
            return 0;
        };
        let (shorter, rest): (Vec<_>, Vec<_>) =
            prefixes.iter().partition(|prefix| prefix.length < middle);
        let cut = |prefix: &Named<'_>| first_bits(prefix.bits, middle);
        for below in rest.chunk_by(|a, b| cut(a) == cut(b)) {
            let Some(first) = below.first() else {
                continue;
            };
            // The first one is the entry itself, if a policy names it.
            let longer = below.get(usize::from(first.length == middle)..);
            let step = Step {
                mask: self.answer(first, middle),
                lengths: self.steps(longer.unwrap_or_default()),
            };
            let prefix = SourcePrefix {
                addr: Addr(cut(first).to_be_bytes()),
                length: middle,
            };
            self.entries.push((prefix, step));
        }
        u64::from(middle) | self.steps(&shorter) << 8
    }

    /// The mask of the longest prefix that covers the first `length` bits of this one.
    fn answer(&self, of: &Named<'a>, length: u8) -> &'a TermMask {
        let mut found = Some(*of);
        while let Some(one) = found {
            if one.length <= length {
                return one.mask;
            }
            found = one.above.and_then(|above| self.named.get(above).copied());
        }
        self.rest
    }
}

fn first_bits(bits: u128, length: u8) -> u128 {
    let behind = 128u32.saturating_sub(length.into());
    bits & u128::MAX.checked_shl(behind).unwrap_or(0)
}

#[cfg(test)]
mod tests;
