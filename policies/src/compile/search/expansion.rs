//! "Controlled prefix expansion": prefixes of many lengths become some more of few lengths.

use std::collections::HashMap;

use super::Named;

/// Lengths that three look-ups search.
const FEW_LENGTHS: usize = 7;
/// How many prefixes each may become, in the mean, to have so few lengths.
pub(super) const MOST_EXPANSION: u64 = 4;

/// Replaces prefixes by the longer ones they consist of, so that [`FEW_LENGTHS`] are left;
/// not where it would take too many.
pub(super) fn with_fewer_lengths(named: Vec<Named<'_>>) -> Vec<Named<'_>> {
    let mut counts = [0u64; 129];
    for one in &named {
        if let Some(count) = counts.get_mut(usize::from(one.length)) {
            *count += 1;
        }
    }
    let counts: Vec<(u8, u64)> = (0u8..).zip(counts).filter(|(_, n)| *n > 0).collect();
    if counts.len() <= FEW_LENGTHS {
        return named;
    }
    let Some((number, kept)) = cheapest_lengths(&counts) else {
        return named;
    };
    if number > MOST_EXPANSION * named.len() as u64 {
        return named;
    }
    let mut expanded = HashMap::new();
    for one in named {
        let Some(length) = kept.iter().copied().find(|length| *length >= one.length) else {
            continue;
        };
        for part in 0..1u128 << (length - one.length).min(127) {
            let shift = 128 - u32::from(length);
            let bits = one.bits | part.checked_shl(shift).unwrap_or(0);
            // Of two that become the same, the one that was longer says more.
            let nearest = expanded.entry((bits, length)).or_insert(one);
            if nearest.length < one.length {
                *nearest = one;
            }
        }
    }
    expanded
        .into_iter()
        .map(|((bits, length), one)| Named {
            bits,
            length,
            ..one
        })
        .collect()
}

/// Of all choices of [`FEW_LENGTHS`] lengths, the one that expands the fewest: how many
/// prefixes there are then, and the lengths from the shortest. `counts` is by length.
fn cheapest_lengths(counts: &[(u8, u64)]) -> Option<(u64, Vec<u8>)> {
    // What the lengths after `from` up to and with `to` become when they all get that of `to`.
    let cost = |from: Option<usize>, to: usize| {
        let (length, _) = *counts.get(to)?;
        let joined = counts.get(from.map_or(0, |from| from + 1)..=to)?;
        joined.iter().try_fold(0u64, |sum, (shorter, number)| {
            let parts = 1u64.checked_shl((length - shorter).into())?;
            sum.checked_add(number.checked_mul(parts)?)
        })
    };
    // The best way to keep so many lengths, the last of them the one with this number.
    let mut best: Vec<Option<(u64, Vec<u8>)>> = (0..counts.len())
        .map(|to| Some((cost(None, to)?, vec![counts.get(to)?.0])))
        .collect();
    for _ in 1..FEW_LENGTHS {
        best = (0..counts.len())
            .map(|to| {
                let ways = (0..to).filter_map(|from| {
                    let (before, _) = best.get(from)?.as_ref()?;
                    Some((before.checked_add(cost(Some(from), to)?)?, from))
                });
                let (number, from) = ways.min()?;
                let mut lengths = best.get(from)?.as_ref()?.1.clone();
                lengths.push(counts.get(to)?.0);
                Some((number, lengths))
            })
            .collect();
    }
    best.pop()?
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn cheapest_lengths_leave_the_most_frequent_as_they_are() {
        let mut counts: Vec<(u8, u64)> = (104..=128).map(|length| (length, 1)).collect();
        counts[16].1 = 1000;
        counts[15].1 = 500;
        let (number, kept) = cheapest_lengths(&counts).unwrap();
        assert!(kept.contains(&119) && kept.contains(&120) && kept.contains(&128));
        assert_eq!(kept.len(), FEW_LENGTHS);
        assert!((1500..1700).contains(&number), "{number}");
    }
}
