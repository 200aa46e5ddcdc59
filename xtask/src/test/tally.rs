//! Results of checks and tests, and how they are told.

use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::ui;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Passed,
    /// With what it printed.
    Failed(String),
    /// With the reason.
    Skipped(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub suite: String,
    pub name: String,
    pub outcome: Outcome,
}

/// All results so far. Failures and skips are printed as they come in.
#[derive(Debug, Default)]
pub struct Tally {
    entries: Vec<Entry>,
}

impl Tally {
    pub fn add(&mut self, suite: &str, name: &str, outcome: Outcome) {
        match &outcome {
            Outcome::Passed => {}
            Outcome::Failed(text) => ui::line(format!("FAILED  {suite}: {name}\n{}", ui::last_lines(text, 60))),
            Outcome::Skipped(reason) => ui::line(format!("SKIPPED {suite}: {name}: {reason}")),
        }
        self.entries.push(Entry { suite: suite.to_owned(), name: name.to_owned(), outcome });
    }

    pub fn extend(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.add(&entry.suite, &entry.name, entry.outcome);
        }
    }

    /// Adds an entry without a word, for a count.
    pub fn of(entries: &[Entry]) -> Self {
        Tally { entries: entries.to_vec() }
    }

    /// Passed, failed, skipped.
    pub fn counts(&self) -> (usize, usize, usize) {
        self.entries.iter().fold((0, 0, 0), |(passed, failed, skipped), entry| match entry.outcome {
            Outcome::Passed => (passed + 1, failed, skipped),
            Outcome::Failed(_) => (passed, failed + 1, skipped),
            Outcome::Skipped(_) => (passed, failed, skipped + 1),
        })
    }

    /// Prints the summary. A run without a single passed check is a failure.
    pub fn finish(&self) -> ExitCode {
        let (passed, failed, skipped) = self.counts();
        let with = |wanted: fn(&Outcome) -> Option<&String>| {
            self.entries.iter().filter_map(move |entry| Some((entry, wanted(&entry.outcome)?)))
        };
        println!();
        for (entry, reason) in with(|outcome| match outcome {
            Outcome::Skipped(reason) => Some(reason),
            _ => None,
        }) {
            println!("skipped  {}: {}: {reason}", entry.suite, entry.name);
        }
        for (entry, _) in with(|outcome| match outcome {
            Outcome::Failed(text) => Some(text),
            _ => None,
        }) {
            println!("FAILED   {}: {}", entry.suite, entry.name);
        }
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_and_skips_are_counted_apart() {
        let mut tally = Tally::default();
        tally.add("s", "a", Outcome::Passed);
        tally.add("s", "b", Outcome::Failed("x".into()));
        tally.add("s", "c", Outcome::Skipped("y".into()));
        assert_eq!(tally.counts(), (1, 1, 1));
    }
}
