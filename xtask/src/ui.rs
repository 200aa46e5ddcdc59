//! What the person at the terminal sees: one line per thing that is done, and a sign of
//! life from everything that takes longer than two seconds.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Prints one line to standard error; standard output is kept for results.
pub fn line(text: impl AsRef<str>) {
    let mut err = std::io::stderr().lock();
    // A closed terminal is no reason to stop working.
    let _ = writeln!(err, "{}", text.as_ref());
}

/// Runs `command` with its output in a log file, showing progress; a failure carries the
/// command line, the log's path and its last lines.
pub fn run(label: &str, command: &mut Command) -> Result<()> {
    let log = log_path(label)?;
    let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    let progress = Progress::start(label);
    let status = command.status();
    progress.stop();
    let status = status.with_context(|| format!("starting {}", program_of(command)))?;
    if status.success() {
        return Ok(());
    }
    bail!(
        "{label}: `{}` ended with {status}; the last lines of {}:\n{}",
        command_line(command),
        log.display(),
        tail(&log, 25)
    );
}

/// A label that is repeated with the elapsed time until [`Progress::stop`].
#[derive(Debug)]
pub struct Progress {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Silent for the first two seconds.
    pub fn start(label: &str) -> Self {
        let (stop, stopped) = channel();
        let label = label.to_owned();
        let thread = std::thread::spawn(move || {
            let started = Instant::now();
            let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
            let terminal = std::io::stderr().is_terminal() && !dumb;
            let mut wait = Duration::from_secs(2);
            while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                let seconds = started.elapsed().as_secs();
                if terminal {
                    eprint!("\r\x1b[K  … {label} ({seconds} s)");
                    wait = Duration::from_secs(1);
                } else {
                    eprintln!("  … {label} ({seconds} s)");
                    wait = Duration::from_secs(15);
                }
            }
            if terminal {
                eprint!("\r\x1b[K");
            }
        });
        Progress {
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Removes the progress line.
    pub fn stop(self) {}
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The last `lines` lines of a file, or why they cannot be shown.
pub fn tail(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Ok(bytes) => last_lines(&String::from_utf8_lossy(&bytes), lines),
        Err(error) => format!("({}: {error})", path.display()),
    }
}

/// The last `lines` lines of `text`, indented.
pub fn last_lines(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all.iter()
        .skip(from)
        .map(|l| format!("    {l}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The command as one would type it.
pub fn command_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|part| part.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

fn program_of(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn log_path(label: &str) -> Result<PathBuf> {
    let dir = crate::setup::cache_dir()?.join("logs");
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let name: String = label
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    Ok(dir.join(format!("{name}.log")))
}

#[cfg(test)]
mod tests {
    use super::last_lines;

    #[test]
    fn the_tail_of_a_short_text_is_all_of_it() {
        assert_eq!(last_lines("a\nb", 5), "    a\n    b");
    }

    #[test]
    fn the_tail_of_a_long_text_is_its_end() {
        assert_eq!(last_lines("a\nb\nc", 1), "    c");
    }
}
