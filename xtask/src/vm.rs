//! Boots a guest kernel on software emulation, runs one command in it and returns the
//! command's exit code.
//!
//! What the command prints comes over the first serial port, as it is printed. The exit code
//! and a report file come over the second, where neither the kernel nor the command writes:
//! a guest that hangs, panics or is powered off by the command has sent no code and is a
//! failure. Not guaranteed: timing (software emulation is ten to thirty times slower).

mod cpio;
mod initramfs;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::setup::{self, GUEST, ensure_kernel, ensure_programs};
use crate::ui;

/// One boot of a guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// A series of [`setup::KERNELS`].
    pub kernel: String,
    /// The program and its arguments, looked up in the guest's `$PATH`.
    pub command: Vec<String>,
    /// Files of the host, and their places in the guest. Libraries of programs come along.
    pub files: Vec<(PathBuf, String)>,
    pub environment: Vec<(String, String)>,
    /// Whether this very program is in the guest, as [`OWN_PROGRAM`].
    pub with_xtask: bool,
    pub timeout: Duration,
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Exit code of the command; 128 + signal number when a signal ended it.
    pub code: i32,
    /// What the command left in [`REPORT`].
    pub report: String,
}

/// A file in the guest whose content comes back in [`Ended::report`].
pub const REPORT: &str = "/run/guest-report";

/// Where this program is in a guest that has it.
pub const OWN_PROGRAM: &str = "/usr/local/bin/xtask";

/// Host programs that every guest has, beside dash, bash and busybox's applets.
const GUEST_PROGRAMS: &[&str] = &[
    "ip",
    "tc",
    "ss",
    "nginx",
    "redis-server",
    "redis-cli",
    "iperf3",
    "curl",
    "sha256sum",
    "nsenter",
    "openssl",
];

impl Guest {
    pub fn new(kernel: &str, command: Vec<String>) -> Self {
        Guest {
            kernel: kernel.to_owned(),
            command,
            files: Vec::new(),
            environment: Vec::new(),
            with_xtask: false,
            timeout: Duration::from_secs(300),
        }
    }

    /// Boots, runs the command, and hands every line that it prints to `print`.
    pub fn run(&self, mut print: impl FnMut(&str)) -> Result<Ended> {
        ensure!(
            cfg!(target_arch = "x86_64"),
            "the guest kernels are for x86-64 hosts"
        );
        ensure_programs(&[GUEST, setup::LAB].concat())?;
        let kernel = ensure_kernel(&self.kernel)?;
        let base = initramfs::base(&kernel, GUEST_PROGRAMS)?;
        let work = WorkDir::create()?;
        let nonce = nonce();
        let archive = work.path.join("initramfs");
        initramfs::complete(self, &self.slim_files(&work.path)?, &base, &nonce, &archive)?;
        let control = work.path.join("control");
        std::fs::write(&control, "")?;
        let mut qemu = self.boot(&kernel.image, &archive, &control)?;
        let console = console_lines(&mut qemu.0)?;
        let transcript = self.follow(&console, &nonce, &mut print)?;
        qemu.end()?;
        let control = String::from_utf8_lossy(&std::fs::read(&control)?).replace('\r', "");
        parse_control(&control, &nonce).with_context(|| {
            format!(
                "the guest (kernel {}) ended without an exit code of the command; the end of its console:\n{}",
                kernel.release,
                ui::last_lines(&transcript, 40)
            )
        })
    }

    /// The files, with programs freed of debug information: a guest's file system lives in
    /// its memory.
    fn slim_files(&self, dir: &Path) -> Result<Vec<(PathBuf, String)>> {
        let mut files = self.files.clone();
        if self.with_xtask {
            // Not by its path: a build in the meantime may have replaced the file.
            let copy = dir.join("xtask");
            std::fs::copy("/proc/self/exe", &copy).context("copying this program")?;
            files.push((copy, OWN_PROGRAM.to_owned()));
        }
        for (number, (source, _)) in files.iter_mut().enumerate() {
            let slim = dir.join(format!("file-{number}"));
            let stripped = Command::new("strip")
                .arg("--strip-debug")
                .arg("-o")
                .arg(&slim)
                .arg(&*source)
                .stderr(Stdio::null())
                .status();
            // What is no program, or a machine without binutils: as it is.
            if stripped.is_ok_and(|status| status.success()) {
                *source = slim;
            }
        }
        Ok(files)
    }

    fn boot(&self, image: &Path, archive: &Path, control: &Path) -> Result<Qemu> {
        let qemu =
            setup::find_program("qemu-system-x86_64").context("qemu-system-x86_64 is missing")?;
        let mut command = Command::new(qemu);
        command
            // A /dev/kvm that does not run stock kernels is common inside VMs; emulation
            // works everywhere.
            .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"])
            .args(["-smp", "2", "-m", "4G", "-no-reboot", "-display", "none", "-vga", "none"])
            .args(["-nic", "none", "-monitor", "none"])
            .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
            .arg("-chardev")
            .arg(format!("file,id=control,path={}", control.display()))
            .args(["-serial", "chardev:control"])
            .arg("-kernel")
            .arg(image)
            .arg("-initrd")
            .arg(archive)
            .args([
                "-append",
                "console=ttyS0 panic=-1 oops=panic quiet loglevel=4 mitigations=off random.trust_cpu=on",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        ringfence_lab::process::die_with_parent(&mut command);
        Ok(Qemu(
            command.spawn().context("starting qemu-system-x86_64")?,
        ))
    }

    /// Passes the console on until it closes, and returns all of it.
    fn follow(
        &self,
        console: &Receiver<String>,
        nonce: &str,
        print: &mut impl FnMut(&str),
    ) -> Result<String> {
        let deadline = Instant::now() + self.timeout;
        let mut transcript = String::new();
        let (mut ready, mut running) = (false, false);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match console.recv_timeout(left) {
                Ok(line) => {
                    transcript.push_str(&line);
                    transcript.push('\n');
                    if line.ends_with(&done_marker(nonce)) {
                        running = false;
                    }
                    if running {
                        print(&line);
                    }
                    if line.ends_with(&ready_marker(nonce)) {
                        (ready, running) = (true, true);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(transcript),
                Err(RecvTimeoutError::Timeout) => bail!(
                    "the guest (kernel {}) did not finish within {} s{}; the end of its console:\n{}",
                    self.kernel,
                    self.timeout.as_secs(),
                    if ready {
                        ""
                    } else {
                        " and never got to the command"
                    },
                    ui::last_lines(&transcript, 40)
                ),
            }
        }
    }
}

fn ready_marker(nonce: &str) -> String {
    format!("guest-ready-{nonce}")
}

fn done_marker(nonce: &str) -> String {
    format!("guest-done-{nonce}")
}

/// The control port carries `report <text>` lines and, last, `end <nonce> <code>`.
fn parse_control(text: &str, nonce: &str) -> Option<Ended> {
    let (report, end) = text.rsplit_once(&format!("end {nonce} "))?;
    let code = end.trim().parse().ok()?;
    Some(Ended {
        code,
        report: report.trim_end().to_owned(),
    })
}

/// Something that no output of an earlier run can contain.
fn nonce() -> String {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    format!("{:016x}", hasher.finish())
}

fn console_lines(qemu: &mut Child) -> Result<Receiver<String>> {
    let (sender, lines) = channel();
    let stdout = qemu.stdout.take().context("qemu's output")?;
    let stderr = qemu.stderr.take().context("qemu's messages")?;
    let messages = sender.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            // TCG names each CPU feature that it lacks.
            if !line.contains("TCG doesn't support requested feature") {
                let _ = messages.send(line);
            }
        }
    });
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let line = String::from_utf8_lossy(&bytes);
            if sender
                .send(line.trim_end_matches(['\r', '\n']).to_owned())
                .is_err()
            {
                return;
            }
            bytes.clear();
        }
    });
    Ok(lines)
}

/// A running emulator, which does not outlive this value.
struct Qemu(Child);

impl Qemu {
    /// The console is closed: qemu has ended or is about to.
    fn end(mut self) -> Result<()> {
        let status = self.0.wait()?;
        ensure!(status.success(), "qemu-system-x86_64 ended with {status}");
        Ok(())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder for one boot, removed afterwards; folders of runs that were killed go first.
struct WorkDir {
    path: PathBuf,
}

impl WorkDir {
    fn create() -> Result<Self> {
        let runs = setup::cache_dir()?.join("vm/runs");
        std::fs::create_dir_all(&runs)?;
        for entry in std::fs::read_dir(&runs)?.flatten() {
            let owner = entry
                .file_name()
                .to_string_lossy()
                .split('-')
                .next()
                .map(str::to_owned);
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let path = runs.join(format!("{}-{}", std::process::id(), nonce()));
        std::fs::create_dir_all(&path)?;
        Ok(WorkDir { path })
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_read_after_the_report() {
        let ended = parse_control("{\"rows\":[]}\nend abc 3\n", "abc");
        assert_eq!(
            ended,
            Some(Ended {
                code: 3,
                report: "{\"rows\":[]}".to_owned()
            })
        );
    }

    #[test]
    fn a_guest_without_the_end_marker_has_no_exit_code() {
        assert_eq!(parse_control("{\"rows\":[]}\n", "abc"), None);
    }

    #[test]
    fn the_end_marker_of_another_run_does_not_count() {
        assert_eq!(parse_control("end other 0\n", "abc"), None);
    }
}
