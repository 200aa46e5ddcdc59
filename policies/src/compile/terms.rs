//! Rules to terms: which matches of different clauses have to be multiplied out.

use crate::{Clause, Match, Rule};

/// Bits of the dimensions that a match says something in.
pub const IDENTITY: u8 = 1;
pub const SOURCE: u8 = 2;
pub const PORT: u8 = 4;
pub const DESTINATION: u8 = 8;

/// One way to satisfy a clause: any of `matches`, which are several only when all of them
/// speak about the same single dimension.
#[derive(Debug)]
pub struct Alternative<'p> {
    pub dimensions: u8,
    pub matches: Vec<&'p Match>,
}

/// What a rule demands: one alternative of each. `None` when it can never match.
///
/// A term is one choice of alternatives. Matches about one and the same dimension need no
/// choice, they are a condition of that dimension; so an ordinary rule is one term.
pub fn factors(rule: &Rule) -> Option<Vec<Vec<Alternative<'_>>>> {
    rule.clauses
        .iter()
        // A clause without matches holds always.
        .filter(|clause| !clause.matches.is_empty())
        .map(|clause| Some(alternatives(clause)).filter(|ways| !ways.is_empty()))
        .collect()
}

/// What a rule would take; nothing is built, because the product grows exponentially.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub terms: usize,
    /// Alternatives in all terms together.
    pub choices: usize,
}

/// The size of a rule; `None` beyond what can be counted.
pub fn size(rule: &Rule) -> Option<Size> {
    let Some(factors) = factors(rule) else {
        return Some(Size {
            terms: 0,
            choices: 0,
        });
    };
    let terms = factors
        .iter()
        .try_fold(1usize, |terms, ways| terms.checked_mul(ways.len()))?;
    let choices = terms.checked_mul(factors.len())?;
    Some(Size { terms, choices })
}

/// Calls `term` with every way to take one of each factor.
pub fn multiply_out<'a, T>(factors: &'a [Vec<T>], mut term: impl FnMut(&[&'a T])) {
    // Where there is no choice there is no recursion either: a rule may have any number
    // of clauses, but few of those that multiply.
    let (single, several): (Vec<_>, Vec<_>) = factors.iter().partition(|ways| ways.len() == 1);
    let mut chosen: Vec<&T> = single.into_iter().flatten().collect();
    choose(&several, &mut chosen, &mut term);
}

fn choose<'a, T>(factors: &[&'a Vec<T>], chosen: &mut Vec<&'a T>, term: &mut impl FnMut(&[&'a T])) {
    let Some((first, rest)) = factors.split_first() else {
        return term(chosen);
    };
    for way in *first {
        chosen.push(way);
        choose(rest, chosen, term);
        chosen.pop();
    }
}

fn alternatives(clause: &Clause) -> Vec<Alternative<'_>> {
    let mut pure: Vec<Alternative<'_>> = Vec::new();
    let mut mixed: Vec<Alternative<'_>> = Vec::new();
    for m in &clause.matches {
        let dimensions = dimensions(m);
        let alone = || Alternative {
            dimensions,
            matches: vec![m],
        };
        match dimensions.count_ones() {
            // An empty match holds never: it is no choice.
            0 => {}
            1 => match pure.iter_mut().find(|a| a.dimensions == dimensions) {
                Some(same) => same.matches.push(m),
                None => pure.push(alone()),
            },
            _ => mixed.push(alone()),
        }
    }
    pure.extend(mixed);
    pure
}

fn dimensions(m: &Match) -> u8 {
    // Every field by name: a field added later does not compile until it is here.
    let Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        service_accounts,
        not_service_accounts,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
    } = m;
    let identity = !namespaces.is_empty()
        || !not_namespaces.is_empty()
        || !principals.is_empty()
        || !not_principals.is_empty()
        || !service_accounts.is_empty()
        || !not_service_accounts.is_empty();
    let source = !source_ips.is_empty() || !not_source_ips.is_empty();
    let port = !destination_ports.is_empty() || !not_destination_ports.is_empty();
    let destination = !destination_ips.is_empty() || !not_destination_ips.is_empty();
    [
        (identity, IDENTITY),
        (source, SOURCE),
        (port, PORT),
        (destination, DESTINATION),
    ]
    .into_iter()
    .filter(|(set, _)| *set)
    .fold(0, |all, (_, bit)| all | bit)
}
