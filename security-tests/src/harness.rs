//! Runs cases one after the other on one stage, and reports in the words of Rust's own
//! harness, so that whatever reads that reads this.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

/// One test.
#[derive(Debug)]
pub struct Case<S> {
    pub name: &'static str,
    pub run: fn(&mut S) -> Result<Verdict>,
}

/// How a case ended that found nothing wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Passed,
    /// It cannot be run here, for this reason.
    Skipped(String),
}

/// A list of cases from the names of their functions.
#[macro_export]
macro_rules! cases {
    ($($function:ident),* $(,)?) => {
        vec![$($crate::harness::Case { name: stringify!($function), run: $function }),*]
    };
}

/// What the command line asks for; options of Rust's own harness that mean nothing here are
/// taken and ignored.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
}

impl Arguments {
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Self {
        let mut parsed = Arguments::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--list" => parsed.list = true,
                "--exact" => parsed.exact = true,
                "--skip" => parsed.skip.extend(arguments.next()),
                "--color" | "--test-threads" | "--format" | "--logfile" => {
                    arguments.next();
                }
                option if option.starts_with('-') => {}
                _ => parsed.filters.push(argument),
            }
        }
        parsed
    }

    fn wants(&self, name: &str) -> bool {
        let matches = |text: &String| {
            if self.exact {
                text == name
            } else {
                name.contains(text.as_str())
            }
        };
        (self.filters.is_empty() || self.filters.iter().any(matches))
            && !self.skip.iter().any(matches)
    }
}

/// The stage the cases work on.
pub trait Stage: Sized {
    /// Makes the stage. `Err` fails every case, `Ok(Err(reason))` skips every case.
    fn set_up() -> Result<Result<Self, String>>;
    /// Brings back what the case changed; an error fails the case.
    fn after_case(&mut self) -> Result<()>;
    /// For the report of a failed case.
    fn evidence(&self) -> String;
    fn tear_down(self) -> Result<()>;
}

/// Runs the cases that `arguments` asks for.
pub fn run<S: Stage>(cases: &[Case<S>], arguments: &Arguments) -> ExitCode {
    let wanted: Vec<&Case<S>> = cases
        .iter()
        .filter(|case| arguments.wants(case.name))
        .collect();
    if arguments.list {
        wanted
            .iter()
            .for_each(|case| println!("{}: test", case.name));
        return ExitCode::SUCCESS;
    }
    let started = Instant::now();
    println!("\nrunning {} tests", wanted.len());
    let mut report = Report {
        filtered: cases.len() - wanted.len(),
        ..Report::default()
    };
    if !wanted.is_empty() {
        match S::set_up() {
            Ok(Ok(stage)) => play(&wanted, stage, &mut report),
            Ok(Err(reason)) => {
                println!("skipped: {reason}");
                wanted
                    .iter()
                    .for_each(|case| report.skipped(case.name, &reason));
            }
            Err(error) => wanted.iter().for_each(|case| {
                report.failed(case.name, format!("the stage cannot be set up: {error:#}"));
            }),
        }
    }
    report.finish(started)
}

fn play<S: Stage>(cases: &[&Case<S>], mut stage: S, report: &mut Report) {
    for case in cases {
        let result = catch_unwind(AssertUnwindSafe(|| (case.run)(&mut stage)))
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the case panicked")));
        // Before the restoration, which writes to the same logs.
        let evidence = if result.is_err() {
            stage.evidence()
        } else {
            String::new()
        };
        let restored = stage.after_case();
        match (result, restored) {
            (Ok(Verdict::Passed), Ok(())) => report.passed(case.name),
            (Ok(Verdict::Skipped(reason)), Ok(())) => report.skipped(case.name, &reason),
            (Err(error), _) => report.failed(case.name, format!("{error:#}\n\n{evidence}")),
            (Ok(_), Err(error)) => {
                report.failed(
                    case.name,
                    format!("what it changed cannot be undone: {error:#}"),
                );
            }
        }
    }
    if let Err(error) = stage.tear_down() {
        // The lab cleans up after itself at its next start; the run is a failure all the same.
        println!("tearing down failed: {error:#}");
        report.broken = true;
    }
}

#[derive(Default)]
struct Report {
    passed: usize,
    skipped: usize,
    filtered: usize,
    failures: Vec<(&'static str, String)>,
    broken: bool,
}

impl Report {
    fn passed(&mut self, name: &str) {
        println!("test {name} ... ok");
        self.passed += 1;
    }

    fn skipped(&mut self, name: &str, reason: &str) {
        println!("test {name} ... ignored, {reason}");
        self.skipped += 1;
    }

    fn failed(&mut self, name: &'static str, details: String) {
        println!("test {name} ... FAILED");
        self.failures.push((name, details));
    }

    fn finish(self, started: Instant) -> ExitCode {
        if !self.failures.is_empty() {
            println!("\nfailures:\n");
            for (name, details) in &self.failures {
                println!("---- {name} stdout ----\n{details}\n");
            }
            println!("\nfailures:");
            self.failures
                .iter()
                .for_each(|(name, _)| println!("    {name}"));
        }
        let good = self.failures.is_empty() && !self.broken;
        println!(
            "\ntest result: {}. {} passed; {} failed; {} ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
            if good { "ok" } else { "FAILED" },
            self.passed,
            self.failures.len(),
            self.skipped,
            self.filtered,
            started.elapsed().as_secs_f64()
        );
        if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(101)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Arguments {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_of_the_usual_harness_are_no_filters() {
        let arguments = parse("--color never --show-output --test-threads 1 --nocapture");
        assert_eq!(arguments, Arguments::default());
        assert!(arguments.wants("anything"));
    }

    #[test]
    fn a_filter_selects_by_part_of_the_name_and_exact_by_all_of_it() {
        assert!(parse("redis").wants("redis_answers"));
        assert!(!parse("redis").wants("curl_answers"));
        assert!(!parse("--exact redis").wants("redis_answers"));
        assert!(!parse("--skip redis").wants("redis_answers"));
    }
}
