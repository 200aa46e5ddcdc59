//! Runs test programs of Rust's own harness and reads what they print.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::tally::{Entry, Outcome};

/// One test program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suite {
    /// As the summary names it.
    pub name: String,
    pub program: PathBuf,
    /// Where cargo would run it.
    pub folder: PathBuf,
    /// One test at a time: the suite works on things that exist once on a machine.
    pub serial: bool,
    pub environment: Vec<(String, String)>,
}

/// Longest time that one program may take.
const PATIENCE: Duration = Duration::from_secs(2400);

impl Suite {
    /// Runs the program; each of its tests is one entry.
    pub fn run(&self) -> Result<Vec<Entry>> {
        let mut command = Command::new(&self.program);
        command.args(["--color", "never", "--show-output"]);
        if self.serial {
            command.args(["--test-threads", "1"]);
        }
        if self.folder.is_dir() {
            command
                .current_dir(&self.folder)
                .env("CARGO_MANIFEST_DIR", &self.folder);
        }
        // A failure is told by its message; a back trace of the runtime would bury it.
        command.env("RUST_BACKTRACE", "0");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let ended = run_with_patience(command, PATIENCE)
            .with_context(|| format!("running {}", self.program.display()))?;
        Ok(self.entries(&ended))
    }

    fn entries(&self, ended: &Finished) -> Vec<Entry> {
        let mut entries: Vec<Entry> = ended
            .output
            .lines()
            .filter_map(|line| parse(line, ended))
            .map(|(name, outcome)| Entry {
                suite: self.name.clone(),
                name,
                outcome,
            })
            .collect();
        let announced = ended.output.lines().find_map(announced);
        let failed = entries
            .iter()
            .any(|entry| matches!(entry.outcome, Outcome::Failed(_)));
        // A program that dies or hangs has tests that never reported.
        let complete = announced == Some(entries.len());
        if !complete || (ended.code != Some(0) && !failed) {
            let reason = match ended.code {
                None => format!("did not finish within {} s", PATIENCE.as_secs()),
                Some(code) => format!("ended with {code}"),
            };
            entries.push(Entry {
                suite: self.name.clone(),
                name: "the whole program".into(),
                outcome: Outcome::Failed(format!(
                    "{reason}; {} of {announced:?} tests reported\n{}\n{}",
                    entries.len(),
                    ended.output,
                    ended.errors
                )),
            });
        }
        entries
    }
}

struct Finished {
    /// What the harness says. Standard error is kept apart: some tests write to it past the
    /// harness, and would tear its lines.
    output: String,
    errors: String,
    /// `None`: it was ended because it took too long.
    code: Option<i32>,
}

fn run_with_patience(mut command: Command, patience: Duration) -> Result<Finished> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let output = collect(child.stdout.take());
    let errors = collect(child.stderr.take());
    let deadline = Instant::now() + patience;
    let in_time = output.recv_timeout(patience);
    if in_time.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    // What the program left running may hold the pipes open.
    let rest = deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_secs(5));
    let code = in_time.is_ok().then(|| status.code().unwrap_or(-1));
    Ok(Finished {
        output: in_time
            .or_else(|_| output.recv_timeout(rest))
            .unwrap_or_default(),
        errors: errors.recv_timeout(rest).unwrap_or_default(),
        code,
    })
}

/// All that comes out of a pipe, once it is closed.
fn collect(pipe: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, text) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    text
}

/// `running 12 tests`
fn announced(line: &str) -> Option<usize> {
    line.strip_prefix("running ")?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// A line such as `test name ... ok`; the rest of the output has the details.
fn parse(line: &str, ended: &Finished) -> Option<(String, Outcome)> {
    let (name, verdict) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    // `test name - should panic ... ok`
    let name = name.split(" - ").next().unwrap_or(name);
    let outcome = match verdict.split_once(',').map_or(verdict, |(word, _)| word) {
        "ok" => match skipped(name, ended) {
            Some(reason) => Outcome::Skipped(reason),
            None => Outcome::Passed,
        },
        "ignored" => {
            let reason = verdict
                .split_once(", ")
                .map_or("no reason given", |(_, reason)| reason);
            Outcome::Skipped(reason.to_owned())
        }
        "FAILED" => Outcome::Failed(details(name, &ended.output)),
        _ => return None,
    };
    Some((name.to_owned(), outcome))
}

/// A test that finds out by itself that it cannot run prints `SKIPPED …: reason`: into its own
/// section of the output, or with its name past the harness.
fn skipped(name: &str, ended: &Finished) -> Option<String> {
    let reason = |line: &str| -> Option<(String, String)> {
        let (who, reason) = line.trim().strip_prefix("SKIPPED")?.split_once(": ")?;
        Some((who.trim().to_owned(), reason.to_owned()))
    };
    if let Some((_, reason)) = details(name, &ended.output).lines().find_map(reason) {
        return Some(reason);
    }
    ended
        .errors
        .lines()
        .filter_map(reason)
        .find(|(who, _)| names(who, name))
        .map(|(_, reason)| reason)
}

/// Whether `who`, such as `a_test` or `a_test on kernel records`, is the test
/// `module::kernel_records::a_test`.
fn names(who: &str, test: &str) -> bool {
    let (own, variant) = who.split_once(" on ").unwrap_or((who, ""));
    let variant = variant.replace(' ', "_");
    let mut path: Vec<&str> = test.split("::").collect();
    let last = path.pop();
    (last == Some(own) || test == own) && (variant.is_empty() || path.contains(&variant.as_str()))
}

/// What the harness shows between `---- name stdout ----` and the next such line.
fn details(name: &str, output: &str) -> String {
    let head = format!("---- {name} stdout ----");
    let Some((_, after)) = output.rsplit_once(&head) else {
        return "(no output)".into();
    };
    let end = after
        .find("\n---- ")
        .or_else(|| after.find("\nfailures:"))
        .unwrap_or(after.len());
    after.get(..end).unwrap_or(after).trim().to_owned()
}

/// A suite's name in the summary: `daemon/datapath tests/connect`.
pub fn suite_name(package: &str, target: &str, library: bool) -> String {
    let package = if package.is_empty() { "." } else { package };
    if library {
        package.to_owned()
    } else {
        format!("{package} tests/{target}")
    }
}

/// The host's tests of a package run in its folder.
pub fn folder(workspace: &Path, package: &str) -> PathBuf {
    workspace.join(package)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const OUTPUT: &str = "
running 4 tests
test a::works ... ok
test a::waits ... ignored, needs a second machine
test a::breaks ... FAILED
test a::cannot ... ok

successes:

---- a::cannot stdout ----
SKIPPED cannot: needs root

failures:

---- a::breaks stdout ----
thread panicked: left != right

failures:
    a::breaks

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out
";

    fn suite() -> Suite {
        Suite {
            name: "s".into(),
            program: "/x".into(),
            folder: "/".into(),
            serial: false,
            environment: Vec::new(),
        }
    }

    fn outcomes(output: &str, code: Option<i32>) -> Vec<Outcome> {
        let ended = Finished {
            output: output.to_owned(),
            errors: String::new(),
            code,
        };
        suite()
            .entries(&ended)
            .into_iter()
            .map(|entry| entry.outcome)
            .collect()
    }

    #[test]
    fn every_kind_of_result_is_read() {
        assert_eq!(
            outcomes(OUTPUT, Some(101)),
            [
                Outcome::Passed,
                Outcome::Skipped("needs a second machine".into()),
                Outcome::Failed("thread panicked: left != right".into()),
                Outcome::Skipped("needs root".into()),
            ]
        );
    }

    #[test]
    fn a_skip_belongs_to_the_variant_that_it_names() {
        let who = "a_test on kernel records";
        assert!(names(who, "relay::kernel_records::a_test"));
        assert!(!names(who, "relay::software_records::a_test"));
        assert!(!names("another", "relay::a_test"));
        assert!(names("a_test", "relay::a_test"));
    }

    #[test]
    fn a_program_that_dies_midway_is_a_failure() {
        let cut = OUTPUT.split("test a::waits").next().unwrap();
        let outcomes = outcomes(cut, Some(139));
        assert_eq!(outcomes.len(), 2);
        assert!(matches!(outcomes.last(), Some(Outcome::Failed(_))));
    }

    #[test]
    fn a_program_that_prints_nothing_is_a_failure_even_with_exit_code_0() {
        assert!(matches!(
            outcomes("", Some(0)).as_slice(),
            [Outcome::Failed(_)]
        ));
    }

    #[test]
    fn a_program_that_hangs_is_ended_and_reported() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo started; exec sleep 1000"]);
        let ended = run_with_patience(command, Duration::from_millis(300)).unwrap();
        assert_eq!((ended.code, ended.output.trim()), (None, "started"));
    }
}
