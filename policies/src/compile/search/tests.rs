#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::collections::HashMap;
use std::net::IpAddr;

use proptest::prelude::*;
use ringfence_bpf_common::{SOURCE_PROBES, SourceKey};

use super::expansion::MOST_EXPANSION;
use super::*;

fn mapped(address: IpAddr) -> Addr {
    match address {
        IpAddr::V4(v4) => Addr::v4(v4.octets()),
        IpAddr::V6(v6) => Addr(v6.octets()),
    }
}

/// A mask by which a prefix is known.
fn number(of: u16) -> TermMask {
    let mut mask = TermMask::default();
    assert!(mask.set(of));
    mask
}

fn prefix(text: &str) -> SourcePrefix {
    let (addr, length) = text.split_once('/').unwrap();
    let addr: IpAddr = addr.parse().unwrap();
    let length: u8 = length.parse().unwrap();
    SourcePrefix {
        addr: mapped(addr),
        length: length + if addr.is_ipv4() { 96 } else { 0 },
    }
}

fn numbered(prefixes: impl IntoIterator<Item = SourcePrefix>) -> Vec<(SourcePrefix, TermMask)> {
    (1..).zip(prefixes).map(|(n, p)| (p, number(n))).collect()
}

/// A search as the kernel has it.
struct Stored<'a> {
    v4: Step<'a>,
    v6: Step<'a>,
    entries: HashMap<SourceKey, Step<'a>>,
}

impl<'a> Stored<'a> {
    fn of(prefixes: &'a [(SourcePrefix, TermMask)], other: &'a TermMask) -> Self {
        let Search { v4, v6, entries } = Search::of(prefixes, other);
        let number = entries.len();
        let entries: HashMap<_, _> = entries
            .into_iter()
            .map(|(prefix, step)| (prefix.key(1), step))
            .collect();
        assert_eq!(entries.len(), number, "a key is there twice");
        Stored { v4, v6, entries }
    }

    /// The mask for an address, and by how many look-ups it was found.
    fn find(&self, address: IpAddr) -> (&'a TermMask, u32) {
        let addr = mapped(address);
        let [upper, lower] = addr.halves();
        let mut step = if addr.is_v4() { self.v4 } else { self.v6 };
        let mut probes = 0;
        while step.lengths != 0 {
            let length = step.lengths as u32 & 0xff;
            step.lengths >>= 8;
            probes += 1;
            let key = SourceKey::new(1, length, upper, lower);
            if let Some(found) = self.entries.get(&key) {
                step = *found;
            }
        }
        (step.mask, probes)
    }
}

/// Every prefix is asked, the longest wins.
fn longest<'a>(
    prefixes: &'a [(SourcePrefix, TermMask)],
    other: &'a TermMask,
    address: IpAddr,
) -> &'a TermMask {
    let addr = mapped(address);
    let bits = u128::from_be_bytes(addr.0);
    let covers = |prefix: &SourcePrefix| {
        prefix.is_v4() == addr.is_v4()
            && first_bits(bits, prefix.length) == u128::from_be_bytes(prefix.addr.0)
    };
    let all = prefixes.iter().filter(|(prefix, _)| covers(prefix));
    all.max_by_key(|(prefix, _)| prefix.length)
        .map_or(other, |(_, mask)| mask)
}

#[test]
fn prefixes_of_one_length_take_one_probe_and_no_markers() {
    let all = (0..200).map(|n| prefix(&format!("10.0.{n}.0/24")));
    let prefixes = numbered(all);
    let other = number(0);
    let search = Stored::of(&prefixes, &other);
    assert_eq!(search.entries.len(), 200);
    assert_eq!(search.find("10.0.7.1".parse().unwrap()), (&number(8), 1));
    assert_eq!(search.find("10.1.7.1".parse().unwrap()), (&other, 1));
    assert_eq!(search.find("fd00::1".parse().unwrap()), (&other, 0));
}

#[test]
fn whole_family_is_where_its_search_begins() {
    let prefixes = numbered(["0.0.0.0/0", "::/0", "10.0.0.0/8"].map(prefix));
    let other = number(0);
    let search = Stored::of(&prefixes, &other);
    assert_eq!(search.entries.len(), 1);
    for (address, found) in [("10.1.1.1", 3), ("11.1.1.1", 1), ("fd00::1", 2)] {
        let address = address.parse().unwrap();
        assert_eq!(search.find(address).0, &number(found), "{address}");
    }
}

#[test]
fn marker_that_leads_nowhere_answers_what_covers_it() {
    // Lengths 8, 16 and 24: the search begins at 16, where 10.9.0.0 is a marker.
    let prefixes = numbered(["10.0.0.0/8", "10.9.9.0/24", "11.1.0.0/16"].map(prefix));
    let other = number(0);
    let search = Stored::of(&prefixes, &other);
    for (address, found) in [
        ("10.9.9.1", 2),
        ("10.9.8.1", 1),
        ("10.8.8.1", 1),
        ("12.0.0.1", 0),
    ] {
        let address = address.parse().unwrap();
        assert_eq!(search.find(address).0, &number(found), "{address}");
    }
}

#[test]
fn every_length_of_a_family_takes_no_more_probes_than_a_verdict_makes() {
    // At each length both what leads on and what leads off: too many to expand.
    let v4 = (1..=32).map(|length| prefix(&format!("128.0.0.0/{length}")));
    let v6 = (1..=128).map(|length| prefix(&format!("8000::/{length}")));
    let prefixes = numbered(v4.chain(v6));
    let other = number(0);
    let search = Stored::of(&prefixes, &other);
    let mut most = [0; 2];
    for (address, found, probes) in leaving(&search) {
        assert_eq!(found, longest(&prefixes, &other, address), "{address}");
        let most = &mut most[usize::from(address.is_ipv6())];
        *most = probes.max(*most);
    }
    assert_eq!(most, [6, SOURCE_PROBES]);
}

#[test]
fn many_lengths_near_each_other_take_three_probes() {
    let v4 = (8..=32).map(|length| prefix(&format!("128.0.0.0/{length}")));
    let prefixes = numbered(v4);
    let other = number(0);
    let search = Stored::of(&prefixes, &other);
    for (address, found, probes) in leaving(&search) {
        assert_eq!(found, longest(&prefixes, &other, address), "{address}");
        assert!(probes <= 3, "{address} took {probes}");
    }
    let room = prefixes.len() * MOST_EXPANSION as usize;
    assert!(search.entries.len() <= room, "{}", search.entries.len());
}

#[test]
fn prefixes_too_far_apart_are_not_expanded() {
    let v6 = (1..=8).map(|n| prefix(&format!("fd00::/{}", n * 16)));
    let prefixes = numbered(v6);
    let other = number(0);
    assert_eq!(Stored::of(&prefixes, &other).entries.len(), 8);
}

/// What is found for addresses that leave the prefixes of 128.0.0.0 and 8000:: after
/// each of their bits.
fn leaving<'a>(search: &Stored<'a>) -> Vec<(IpAddr, &'a TermMask, u32)> {
    let v4 = (0..31).map(|bit| IpAddr::from((1u32 << 31 | 1 << bit).to_be_bytes()));
    let v6 = (0..127).map(|bit| IpAddr::from((1u128 << 127 | 1 << bit).to_be_bytes()));
    let last = ["128.0.0.0", "0.0.0.0", "8000::", "::"].map(|text| text.parse().unwrap());
    v4.chain(v6)
        .chain(last)
        .map(|address| {
            let (found, probes) = search.find(address);
            (address, found, probes)
        })
        .collect()
}

/// Addresses that share long beginnings.
fn address() -> impl Strategy<Value = IpAddr> {
    let near = |bits: u32| (0..bits, 0..bits, any::<bool>());
    prop_oneof![
        near(32).prop_map(|(a, b, _)| IpAddr::from((1u32 << a | 1 << b).to_be_bytes())),
        near(128).prop_map(|(a, b, _)| IpAddr::from((1u128 << a | 1 << b).to_be_bytes())),
        any::<u32>().prop_map(|bits| IpAddr::from(bits.to_be_bytes())),
    ]
}

fn cut(address: IpAddr, length: u8) -> SourcePrefix {
    let length = if address.is_ipv4() {
        96 + length % 33
    } else {
        length
    };
    let bits = u128::from_be_bytes(mapped(address).0);
    SourcePrefix {
        addr: Addr(first_bits(bits, length).to_be_bytes()),
        length,
    }
}

proptest! {
    #[test]
    fn search_finds_what_asking_every_prefix_finds(
        named in prop::collection::vec((address(), 0..=128u8), 0..120),
        asked in prop::collection::vec(address(), 40),
    ) {
        let mut all: Vec<_> = named.iter().map(|(a, l)| cut(*a, *l)).collect();
        // ::ffff:0:0/96 and longer are IPv4 however they are written.
        all.sort_unstable_by_key(|prefix| (prefix.addr, prefix.length));
        all.dedup();
        let prefixes = numbered(all);
        let other = number(0);
        let search = Stored::of(&prefixes, &other);
        for address in asked.into_iter().chain(named.into_iter().map(|(a, _)| a)) {
            let (found, probes) = search.find(address);
            prop_assert_eq!(found, longest(&prefixes, &other, address), "{}", address);
            let most = if address.is_ipv4() { 6 } else { SOURCE_PROBES };
            prop_assert!(probes <= most, "{} took {}", address, probes);
        }
    }
}
