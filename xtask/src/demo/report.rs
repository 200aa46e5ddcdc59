//! The demo's table: printed row by row while it runs, and kept for JSON.

use std::time::Instant;

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// All that a run of the demo found out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub kernel: String,
    pub record_layer: String,
    pub record_layer_reason: String,
    pub rows: Vec<Row>,
}

/// One promise and what was seen of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    pub verdict: Verdict,
    /// What was observed, or why it was not what it should be.
    pub observed: String,
    pub seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Passed,
    Failed,
    /// Cannot be observed here; `observed` says why.
    Skipped,
}

/// What a row's check returns when it did not fail.
pub enum Observed {
    Seen(String),
    NotHere(String),
}

impl Report {
    /// No row failed, and there are rows.
    pub fn passed(&self) -> bool {
        self.count(Verdict::Passed) > 0 && self.count(Verdict::Failed) == 0
    }

    pub fn summary(&self) -> String {
        format!(
            "\n{} passed, {} failed, {} skipped: kernel {}, records protected by: {}",
            self.count(Verdict::Passed),
            self.count(Verdict::Failed),
            self.count(Verdict::Skipped),
            self.kernel,
            self.record_layer
        )
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.rows
            .iter()
            .filter(|row| row.verdict == verdict)
            .count()
    }
}

/// Collects rows and prints each when it is there.
pub struct Rows {
    rows: Vec<Row>,
    quiet: bool,
}

const NAME_WIDTH: usize = 52;

impl Rows {
    pub fn new(quiet: bool) -> Self {
        Rows {
            rows: Vec::new(),
            quiet,
        }
    }

    pub fn heading(&self, text: &str) {
        if !self.quiet {
            println!("\n{text}\n");
        }
    }

    /// Runs one check. An error is a failed row, and the demo goes on.
    pub fn add(&mut self, name: &str, check: impl FnOnce() -> Result<Observed>) {
        let started = Instant::now();
        let (verdict, observed) = match check() {
            Ok(Observed::Seen(text)) => (Verdict::Passed, text),
            Ok(Observed::NotHere(reason)) => (Verdict::Skipped, reason),
            Err(error) => (Verdict::Failed, format!("{error:#}")),
        };
        let seconds = started.elapsed().as_secs_f64();
        let row = Row {
            name: name.to_owned(),
            verdict,
            observed,
            seconds,
        };
        if !self.quiet {
            println!("{}", row.line());
        }
        self.rows.push(row);
    }

    pub fn finish(self) -> Vec<Row> {
        self.rows
    }
}

impl Row {
    fn line(&self) -> String {
        let sign = match self.verdict {
            Verdict::Passed => '✓',
            Verdict::Failed => '✗',
            Verdict::Skipped => '–',
        };
        format!(
            "{sign} {:<NAME_WIDTH$} {:>5.1} s  {}",
            self.name, self.seconds, self.observed
        )
    }
}

/// An observation as the value of a check.
pub fn seen(text: impl Into<String>) -> Result<Observed> {
    Ok(Observed::Seen(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdicts: &[Verdict]) -> Report {
        let row = |verdict: &Verdict| Row {
            name: "x".into(),
            verdict: *verdict,
            observed: String::new(),
            seconds: 0.0,
        };
        Report {
            kernel: "6.12".into(),
            record_layer: "kernel".into(),
            record_layer_reason: String::new(),
            rows: verdicts.iter().map(row).collect(),
        }
    }

    #[test]
    fn one_failed_row_fails_the_demo() {
        assert!(report(&[Verdict::Passed, Verdict::Skipped]).passed());
        assert!(!report(&[Verdict::Passed, Verdict::Failed]).passed());
    }

    #[test]
    fn a_demo_that_observed_nothing_has_not_passed() {
        assert!(!report(&[]).passed());
        assert!(!report(&[Verdict::Skipped]).passed());
    }
}
