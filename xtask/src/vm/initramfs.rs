//! The guest's file system: an archive per kernel with what never changes (kept in the
//! cache), followed by a small one with the files of this run. The kernel unpacks both.

use std::collections::hash_map::DefaultHasher;
use std::fs::File;
use std::hash::{Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::{Guest, REPORT, done_marker, ready_marker};
use crate::setup::{GuestKernel, cache_dir, find_program};
use crate::ui;

/// The archive with busybox, kmod, the modules and the given host programs.
pub fn base(kernel: &GuestKernel, programs: &[&str]) -> Result<PathBuf> {
    let mut paths = vec![required("kmod")?, required("dash")?, required("bash")?];
    for program in programs {
        paths.push(required(program)?);
    }
    let busybox = required("busybox")?;
    let dir = cache_dir()?.join("vm");
    std::fs::create_dir_all(&dir)?;
    let stem = format!("{}-", kernel.series);
    let name = format!("{stem}{:016x}.cpio", fingerprint(kernel, &busybox, &paths)?);
    let path = dir.join(&name);
    if path.is_file() {
        return Ok(path);
    }
    for old in std::fs::read_dir(&dir)?.flatten() {
        if old.file_name().to_string_lossy().starts_with(&stem) {
            let _ = std::fs::remove_file(old.path());
        }
    }
    ui::line(format!(
        "building the guest's file system for kernel {}",
        kernel.release
    ));
    let staged = dir.join(format!("{name}.{}", std::process::id()));
    let mut archive = Archive::create(&staged)?;
    for folder in [
        "proc", "sys", "dev", "tmp", "run", "root", "var/log", "var/lib", "var/tmp", "sbin",
        "usr/sbin",
    ] {
        archive.folder(folder)?;
    }
    archive.file("bin/busybox", &busybox)?;
    for applet in ["modprobe", "insmod", "lsmod"] {
        archive.link(&format!("sbin/{applet}"), "/usr/bin/kmod")?;
    }
    // Not busybox's shell: it prefers its own applets to the programs in the path.
    archive.link("bin/sh", "/usr/bin/dash")?;
    archive.link("bin/bash", "/usr/bin/bash")?;
    archive.bytes(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    )?;
    archive.bytes("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    archive.bytes(
        "etc/nsswitch.conf",
        0o644,
        b"passwd: files\ngroup: files\nhosts: files\n",
    )?;
    archive.bytes("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n")?;
    for path in &paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        program(&mut archive, path, &format!("usr/bin/{name}"))?;
    }
    for optional in ["/etc/iproute2/rt_protos", "/etc/ssl/openssl.cnf"] {
        if Path::new(optional).is_file() {
            archive.file(optional, Path::new(optional))?;
        }
    }
    modules(
        &mut archive,
        &kernel.modules_root,
        &kernel.modules_root.join("lib/modules"),
    )?;
    archive.finish()?;
    std::fs::rename(&staged, &path)?;
    Ok(path)
}

/// The base archive followed by init, the command of `guest` and the given files.
pub fn complete(
    guest: &Guest,
    files: &[(PathBuf, String)],
    base: &Path,
    nonce: &str,
    path: &Path,
) -> Result<()> {
    std::fs::copy(base, path).with_context(|| format!("copying {}", base.display()))?;
    let file = File::options().append(true).open(path)?;
    let mut archive = Archive::new(std::io::BufWriter::with_capacity(1 << 20, file));
    for (source, place) in files {
        if source.is_dir() {
            folder(&mut archive, source, place)?;
        } else {
            program(&mut archive, source, place)?;
        }
    }
    archive.bytes("run-command", 0o755, command_script(guest).as_bytes())?;
    archive.bytes("init", 0o755, init_script(nonce).as_bytes())?;
    archive.finish()?.flush()?;
    Ok(())
}

fn init_script(nonce: &str) -> String {
    let (ready, done) = (ready_marker(nonce), done_marker(nonce));
    format!(
        r#"#!/bin/sh
# Applets go where they shadow no real program, and modprobe stays kmod's.
/bin/busybox mkdir -p /busybox
/bin/busybox --install -s /busybox
/busybox/rm -f /busybox/modprobe /busybox/insmod /busybox/lsmod /busybox/depmod /busybox/ip
export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:/busybox HOME=/root TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o size=75% tmpfs /tmp
mount -t tmpfs -o size=75% tmpfs /run
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
ip link set lo up
for module in tls aesni-intel gcm ctr veth; do modprobe "$module"; done
stty -F /dev/ttyS0 -onlcr
stty -F /dev/ttyS1 raw
echo "{ready}"
setsid /bin/sh /run-command </dev/null
code=$?
echo "{done}"
[ -f {REPORT} ] && cat {REPORT} >/dev/ttyS1 && echo >/dev/ttyS1
# Changing a setting waits until everything written before has left the port.
stty -F /dev/ttyS0 sane
echo "end {nonce} $code" >/dev/ttyS1
stty -F /dev/ttyS1 sane
poweroff -f
"#
    )
}

fn command_script(guest: &Guest) -> String {
    let mut script = String::from("cd /tmp\n");
    for (name, value) in &guest.environment {
        script.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    let words: Vec<String> = guest.command.iter().map(|word| quoted(word)).collect();
    script.push_str(&format!("exec {}\n", words.join(" ")));
    script
}

/// One word for the shell, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn required(name: &str) -> Result<PathBuf> {
    find_program(name).with_context(|| format!("{name} is missing on this host"))
}

/// Changes when one of the inputs does.
fn fingerprint(kernel: &GuestKernel, busybox: &Path, programs: &[PathBuf]) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    (env!("CARGO_PKG_VERSION"), &kernel.release).hash(&mut hasher);
    include_str!("initramfs.rs").hash(&mut hasher);
    for path in std::iter::once(busybox).chain(programs.iter().map(PathBuf::as_path)) {
        let metadata = path
            .metadata()
            .with_context(|| format!("reading {}", path.display()))?;
        (path, metadata.len(), metadata.modified()?).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn folder<W: Write>(archive: &mut Archive<W>, source: &Path, place: &str) -> Result<()> {
    archive.folder(place)?;
    for entry in std::fs::read_dir(source)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let place = format!("{place}/{name}");
        if path.is_dir() {
            folder(archive, &path, &place)?;
        } else {
            archive.file(&place, &path)?;
        }
    }
    Ok(())
}

/// A file and, when it is a dynamic program, the libraries it names.
fn program<W: Write>(archive: &mut Archive<W>, source: &Path, place: &str) -> Result<()> {
    archive.file(place, source)?;
    for library in libraries(source)? {
        let place = library.to_string_lossy().into_owned();
        if !archive.has(&place) {
            archive.file(&place, &library)?;
        }
    }
    Ok(())
}

/// Libraries by `ldd`; empty for scripts and static programs.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("starting ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!(
            "{} needs a library that is missing: {}",
            program.display(),
            line.trim()
        );
    }
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/') && word.contains(".so"))
        .map(PathBuf::from)
        .collect())
}

fn modules<W: Write>(archive: &mut Archive<W>, root: &Path, dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            modules(archive, root, &path)?;
        } else {
            let place = path
                .strip_prefix(root)
                .unwrap_or(&path)
                .to_string_lossy()
                .into_owned();
            archive.file(&place, &path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_with_quotes_stays_one_word() {
        assert_eq!(quoted("it's; rm"), r"'it'\''s; rm'");
    }

    #[test]
    fn the_command_is_executed_with_its_environment() {
        let mut guest = Guest::new("6.12", vec!["echo".into(), "a b".into()]);
        guest.environment.push(("X".into(), "1 2".into()));
        assert_eq!(
            command_script(&guest),
            "cd /tmp\nexport X='1 2'\nexec 'echo' 'a b'\n"
        );
    }
}
