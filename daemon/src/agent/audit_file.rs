//! Where audit lines go: a thread of its own, so that neither a slow disk nor a full one
//! holds up whoever reads the kernel's verdicts.
//!
//! A line is written whole or, when too many wait, not at all: then it is counted as lost.
//! The verdict was enforced long before.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;

/// Lines that wait for the thread.
const MOST_LINES: usize = 8192;
/// Bytes that wait for a disk that takes none.
const MOST_BYTES: usize = 1 << 20;
/// When a write that failed is tried again, if no line comes before.
const RETRY: Duration = Duration::from_secs(1);

/// The sending end.
#[derive(Debug)]
pub struct AuditFile {
    lines: SyncSender<String>,
    lost: Counter,
}

/// Where to, and how much is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Standard output when `None`.
    pub path: Option<PathBuf>,
    /// Size at which a file is put aside.
    pub max_bytes: u64,
    /// Files kept, the current one included.
    pub files: u32,
}

impl AuditFile {
    /// Opens the target and starts the thread, which ends with the last sender. `lost` counts
    /// lines, `errors` failed writes.
    pub fn open(target: Target, lost: Counter, errors: Counter) -> io::Result<Self> {
        let (lines, received) = sync_channel(MOST_LINES);
        let mut writer = Writer::open(target, lost.clone(), errors)?;
        std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || writer.run(&received))?;
        Ok(AuditFile { lines, lost })
    }

    /// Hands a line over; never waits.
    pub fn write(&self, line: String) {
        match self.lines.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost.inc();
            }
        }
    }
}

struct Writer {
    target: Target,
    out: Out,
    /// Lines to be written.
    pending: Vec<u8>,
    /// What was written so far ends with a whole line.
    whole: bool,
    failing: bool,
    lost: Counter,
    errors: Counter,
}

enum Out {
    Stdout,
    File { file: File, size: u64 },
}

impl Writer {
    fn open(target: Target, lost: Counter, errors: Counter) -> io::Result<Self> {
        let out = match &target.path {
            None => Out::Stdout,
            Some(path) => open(path)?,
        };
        Ok(Writer {
            target,
            out,
            pending: Vec::new(),
            whole: true,
            failing: false,
            lost,
            errors,
        })
    }

    fn run(&mut self, lines: &Receiver<String>) {
        loop {
            let patience = if self.failing { RETRY } else { Duration::MAX };
            match lines.recv_timeout(patience) {
                Ok(line) => {
                    self.take(&line);
                    // What came meanwhile goes in the same write.
                    while self.pending.len() < MOST_BYTES / 16
                        && let Ok(line) = lines.try_recv()
                    {
                        self.take(&line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.flush();
                    return;
                }
            }
            self.flush();
        }
    }

    fn take(&mut self, line: &str) {
        if self.pending.len() + line.len() >= MOST_BYTES {
            self.lost.inc();
            return;
        }
        self.pending.extend_from_slice(line.as_bytes());
        self.pending.push(b'\n');
    }

    fn flush(&mut self) {
        match self.attempt() {
            Ok(()) if self.failing => {
                self.failing = false;
                tracing::info!("the audit log is written again");
            }
            Ok(()) => {}
            Err(error) => {
                self.errors.inc();
                // Said once, not for every line.
                if !std::mem::replace(&mut self.failing, true) {
                    let path = self.target.path.as_deref().unwrap_or(Path::new("stdout"));
                    tracing::error!(
                        %error, path = %path.display(),
                        "the audit log cannot be written; verdicts are enforced all the same"
                    );
                }
            }
        }
    }

    fn attempt(&mut self) -> io::Result<()> {
        self.rotate()?;
        while !self.pending.is_empty() {
            let written = match &mut self.out {
                Out::Stdout => {
                    let mut out = io::stdout().lock();
                    let written = out.write(&self.pending)?;
                    out.flush()?;
                    written
                }
                Out::File { file, size } => {
                    let written = file.write(&self.pending)?;
                    *size += written as u64;
                    written
                }
            };
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            let last = written
                .checked_sub(1)
                .and_then(|last| self.pending.get(last));
            self.whole = last == Some(&b'\n');
            self.pending.drain(..written);
        }
        Ok(())
    }

    /// Puts a file that is full aside: `audit.jsonl` becomes `audit.jsonl.1`, and so on.
    fn rotate(&mut self) -> io::Result<()> {
        let (Out::File { size, .. }, Some(path)) = (&self.out, &self.target.path) else {
            return Ok(());
        };
        if *size < self.target.max_bytes || !self.whole {
            return Ok(());
        }
        let aside = |number: u32| {
            let mut name = path.clone().into_os_string();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        match self.target.files.saturating_sub(1) {
            0 => std::fs::remove_file(path)?,
            oldest => {
                for number in (1..oldest).rev() {
                    match std::fs::rename(aside(number), aside(number + 1)) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                std::fs::rename(path, aside(1))?;
            }
        }
        self.out = open(path)?;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<Out> {
    // Who talks to whom is nobody else's business.
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    let size = file.metadata()?.len();
    Ok(Out::File { file, size })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn writer(path: &Path, max_bytes: u64, files: u32) -> Writer {
        let target = Target {
            path: Some(path.into()),
            max_bytes,
            files,
        };
        Writer::open(target, Counter::default(), Counter::default()).unwrap()
    }

    fn line(writer: &mut Writer, line: &str) {
        writer.take(line);
        writer.flush();
    }

    #[test]
    fn full_file_is_put_aside_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let mut writer = writer(&path, 4, 3);
        for text in ["one", "two", "three", "four"] {
            line(&mut writer, text);
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("audit.jsonl"), "four\n");
        assert_eq!(read("audit.jsonl.1"), "three\n");
        assert_eq!(read("audit.jsonl.2"), "two\n");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
        assert_eq!(writer.errors.get(), 0);
    }

    #[test]
    fn full_disk_is_an_error_once_and_waiting_lines_are_bounded() {
        let mut writer = writer(Path::new("/dev/full"), u64::MAX, 2);
        let long = "x".repeat(1000);
        for _ in 0..2000 {
            line(&mut writer, &long);
        }
        assert!(writer.failing);
        assert!(writer.errors.get() > 0 && writer.lost.get() > 0);
        assert!(writer.pending.len() <= MOST_BYTES);
        // The disk has room again: what waited is written, from the first line on.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        writer.out = open(&path).unwrap();
        line(&mut writer, "last");
        assert!(!writer.failing && writer.pending.is_empty());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("last\n") && text.lines().all(|l| l == long || l == "last"));
    }

    #[test]
    fn lines_reach_the_file_before_the_thread_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let mut writer = writer(&path, 1 << 20, 2);
        let (send, received) = sync_channel(4);
        let thread = std::thread::spawn(move || writer.run(&received));
        send.send("one".to_owned()).unwrap();
        send.send("two".to_owned()).unwrap();
        drop(send);
        thread.join().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn path_that_cannot_be_opened_is_an_error_at_the_start() {
        let target = Target {
            path: Some("/nowhere/audit.jsonl".into()),
            max_bytes: 1,
            files: 1,
        };
        assert!(AuditFile::open(target, Counter::default(), Counter::default()).is_err());
    }
}
