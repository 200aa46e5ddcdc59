//! Results of checks and tests, and how they are told.

use std::collections::BTreeMap;
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

/// All results so far. Failures are printed as they come in.
#[derive(Debug, Default)]
pub struct Tally {
    entries: Vec<Entry>,
}

impl Tally {
    pub fn add(&mut self, suite: &str, name: &str, outcome: Outcome) {
        if let Outcome::Failed(text) = &outcome {
            ui::line(format!(
                "FAILED  {suite}: {name}\n{}",
                ui::last_lines(text, 60)
            ));
        }
        self.entries.push(Entry {
            suite: suite.to_owned(),
            name: name.to_owned(),
            outcome,
        });
    }

    pub fn extend(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.add(&entry.suite, &entry.name, entry.outcome);
        }
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Adds entries without a word, for a count.
    pub fn of(entries: &[Entry]) -> Self {
        Tally {
            entries: entries.to_vec(),
        }
    }

    /// Passed, failed, skipped.
    pub fn counts(&self) -> (usize, usize, usize) {
        self.entries
            .iter()
            .fold((0, 0, 0), |(passed, failed, skipped), entry| {
                match entry.outcome {
                    Outcome::Passed => (passed + 1, failed, skipped),
                    Outcome::Failed(_) => (passed, failed + 1, skipped),
                    Outcome::Skipped(_) => (passed, failed, skipped + 1),
                }
            })
    }

    /// Names of what was skipped, by suite and reason.
    fn skips(&self) -> BTreeMap<(&str, &str), Vec<&str>> {
        let mut skips: BTreeMap<_, Vec<&str>> = BTreeMap::new();
        for entry in &self.entries {
            if let Outcome::Skipped(reason) = &entry.outcome {
                skips
                    .entry((entry.suite.as_str(), reason.as_str()))
                    .or_default()
                    .push(&entry.name);
            }
        }
        skips
    }

    /// Prints the summary. A run without a single passed check is a failure.
    pub fn finish(&self) -> ExitCode {
        let (passed, failed, skipped) = self.counts();
        println!();
        for ((suite, reason), names) in self.skips() {
            let which = match names.as_slice() {
                names if names.len() <= 3 => names.join(", "),
                names => format!("{} tests", names.len()),
            };
            println!("skipped  {suite}: {which}: {reason}");
        }
        for entry in &self.entries {
            if matches!(entry.outcome, Outcome::Failed(_)) {
                println!("FAILED   {}: {}", entry.suite, entry.name);
            }
        }
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        if failed == 0 && passed > 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
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

    #[test]
    fn skips_are_grouped_by_suite_and_reason() {
        let mut tally = Tally::default();
        for (suite, name) in [("s", "a"), ("t", "b"), ("s", "c")] {
            tally.add(suite, name, Outcome::Skipped("why".into()));
        }
        let skips = tally.skips();
        assert_eq!(skips.get(&("s", "why")), Some(&vec!["a", "c"]));
        assert_eq!(skips.len(), 2);
    }
}
