//! Starting, watching and ending processes.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::sys;

/// The kernel ends the child when the thread that starts it ends, however it ends.
pub fn die_with_parent(command: &mut Command) {
    sys::die_with_parent_before_exec(command);
}

/// Starts a process that outlives us, in a session of its own, with its output appended
/// to `log`.
pub fn spawn_daemon(mut command: Command, log: &Path) -> Result<Child> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("opening {}", log.display()))?;
    // The log is a file: no colours.
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .env("NO_COLOR", "1");
    sys::new_session_before_exec(&mut command);
    command
        .spawn()
        .with_context(|| format!("starting {}", command.get_program().to_string_lossy()))
}

/// Ends the processes: SIGTERM, after `grace` SIGKILL. Returns when all are gone.
pub fn end(pids: &[i32], grace: Duration) -> Result<()> {
    for (signal, wait) in [
        (Signal::SIGTERM, grace),
        (Signal::SIGKILL, Duration::from_secs(10)),
    ] {
        for pid in pids {
            match kill(Pid::from_raw(*pid), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => bail!("sending {signal} to process {pid}: {error}"),
            }
        }
        let deadline = Instant::now() + wait;
        if pids.iter().all(|pid| ended_by(*pid, deadline)) {
            return Ok(());
        }
    }
    bail!("processes {pids:?} survive SIGKILL")
}

/// Standard output and standard error of a command that must end in time; one that does not
/// is killed, and an error.
pub fn output_within(mut command: Command, patience: Duration) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let pid = i32::try_from(child.id())?;
    let pidfd = sys::pidfd(pid).with_context(|| format!("watching {program}"))?;
    let (sender, output) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(child.wait_with_output());
    });
    match output.recv_timeout(patience) {
        Ok(output) => output.with_context(|| format!("waiting for {program}")),
        Err(_) => {
            sys::kill_by_pidfd(&pidfd)?;
            let written = match output.recv_timeout(Duration::from_secs(5)) {
                Ok(Ok(output)) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
                _ => String::new(),
            };
            bail!(
                "{program} did not end within {} s; it wrote {written:?}",
                patience.as_secs()
            )
        }
    }
}

/// Waits for the end of a process, of which we need not be the parent.
fn ended_by(pid: i32, deadline: Instant) -> bool {
    let Ok(pidfd) = sys::pidfd(pid) else {
        return true;
    };
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let ended = poll(
        &mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)],
        timeout,
    )
    .is_ok_and(|ready| ready > 0);
    if ended {
        // Our own child would stay a zombie; for others this is an error without effect.
        let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
    }
    ended
}

/// A process ended that should run: nothing to wait for any more.
#[derive(Debug)]
pub struct Ended(pub String);

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Ended {}

/// Asks `attempt` again until it gives a value or `patience` is over; the error then has
/// its last reason. An [`Ended`] gives up at once. For conditions that have no descriptor to wait on.
pub fn wait_until<T>(
    what: &str,
    patience: Duration,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        let reason = match attempt() {
            Ok(value) => return Ok(value),
            Err(reason) if reason.is::<Ended>() => return Err(reason),
            Err(reason) => reason,
        };
        if Instant::now() >= deadline {
            return Err(reason)
                .with_context(|| format!("waited {} s for {what}", patience.as_secs()));
        }
        std::thread::park_timeout(Duration::from_millis(25));
    }
}

/// The last lines of a log, for error messages.
pub fn tail(path: &Path, lines: usize) -> String {
    let Ok(bytes) = std::fs::read(path) else {
        return format!("({} is missing)", path.display());
    };
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    let skip = all.len().saturating_sub(lines);
    all.iter()
        .skip(skip)
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// User and system time of a process, from `/proc/PID/stat` (proc(5), fields 14 and 15).
pub fn cpu_time(pid: i32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything, blanks and parentheses included.
    let (_, rest) = stat.rsplit_once(')').context("no name in /proc/PID/stat")?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks =
        || -> Result<u64> { Ok(fields.next().context("short /proc/PID/stat")?.parse()?) };
    let total = ticks()? + ticks()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs_f64(total as f64 / per_second as f64))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_process_that_ignores_sigterm_is_killed() {
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = [0u8; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        end(&[pid], Duration::from_millis(200)).unwrap();
        // `end` has reaped it already.
        let _ = child.wait();
        assert!(kill(Pid::from_raw(pid), None).is_err());
    }

    #[test]
    fn a_command_that_hangs_is_killed_and_its_words_are_kept() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo started; exec sleep 1000"]);
        let error = output_within(command, Duration::from_millis(300)).unwrap_err();
        assert!(error.to_string().contains("started"), "{error}");
    }

    #[test]
    fn a_command_that_ends_in_time_gives_both_outputs() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let output = output_within(command, Duration::from_secs(30)).unwrap();
        assert_eq!(
            (output.stdout.as_slice(), output.stderr.as_slice()),
            (&b"out\n"[..], &b"err\n"[..])
        );
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn a_process_that_is_already_gone_is_no_error() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        end(&[pid], Duration::from_millis(200)).unwrap();
    }

    #[test]
    fn a_wait_for_a_process_that_has_ended_is_over_at_once() {
        let mut attempts = 0;
        let error = wait_until("nothing", Duration::from_secs(60), || -> Result<()> {
            attempts += 1;
            Err(Ended("it is gone".into()).into())
        });
        assert!(error.unwrap_err().is::<Ended>());
        assert_eq!(attempts, 1);
    }

    #[test]
    fn a_wait_that_fails_gives_the_last_reason() {
        let error = wait_until("nothing", Duration::ZERO, || -> Result<()> {
            bail!("not yet")
        });
        assert!(format!("{:#}", error.unwrap_err()).contains("not yet"));
    }
}
