//! Compiles the eBPF workspace in `..` for `bpfel-unknown-none`, so that a plain
//! `cargo build` of anything that needs the programs is enough.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

const OBJECTS: [&str; 3] = ["node", "pod", "guard"];
const TARGET: &str = "bpfel-unknown-none";
const SETUP: &str = "run `cargo xtask setup`, which installs what the eBPF build needs";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let here = PathBuf::from(required("CARGO_MANIFEST_DIR")?);
    let workspace = here.parent().ok_or("bpf/objects has no parent folder")?;
    let out = PathBuf::from(required("OUT_DIR")?);

    for input in [
        "src",
        "common/src",
        "common/Cargo.toml",
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!(
            "cargo::rerun-if-changed={}",
            workspace.join(input).display()
        );
    }
    for variable in ["RINGFENCE_BPF_LINKER", "XDG_CACHE_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }

    let linker = linker()?;
    require_rust_src()?;

    let target_dir = out.join("bpf");
    let mut cargo = Command::new(required("CARGO")?);
    cargo.current_dir(workspace).args([
        "build",
        "--release",
        "--locked",
        "--target",
        TARGET,
        "-Z",
        "build-std=core",
    ]);
    // The outer cargo's settings are for another target and another kind of check.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let inherited = text.starts_with("RUSTC")
            || text.starts_with("CLIPPY")
            || text.starts_with("CARGO_BUILD_")
            || text.starts_with("CARGO_TARGET_")
            || text.starts_with("CARGO_PROFILE_")
            || text.starts_with("CARGO_UNSTABLE_")
            || text.starts_with("CARGO_ENCODED_")
            || ["RUSTFLAGS", "RUSTDOCFLAGS", "CARGO_MAKEFLAGS", "MAKEFLAGS"].contains(&&*text);
        if inherited {
            cargo.env_remove(&name);
        }
    }
    let flags = [
        format!("-Clinker={}", linker.display()),
        // BTF is derived from the debug information; socket storage cannot do without.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ];
    // The unstable flag `build-std` is all that the nightly switch is for.
    cargo
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));

    let status = cargo
        .status()
        .map_err(|e| format!("cannot run {:?}: {e}", cargo.get_program()))?;
    if !status.success() {
        return Err(format!(
            "the eBPF programs in {} did not compile ({status}); the compiler's messages are above. \
             If the linker or `core` is at fault, {SETUP}",
            workspace.display()
        ));
    }
    for object in OBJECTS {
        let from = target_dir.join(TARGET).join("release").join(object);
        fs::copy(&from, out.join(format!("{object}.o")))
            .map_err(|e| format!("cannot copy {}: {e}", from.display()))?;
    }
    Ok(())
}

/// `bpf-linker`: where the variable says, where `cargo xtask setup` puts it, or in `PATH`.
fn linker() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os("RINGFENCE_BPF_LINKER") {
        let path = PathBuf::from(path);
        if path.is_file() {
            return Ok(path);
        }
        return Err(format!(
            "RINGFENCE_BPF_LINKER names {}, which is no file",
            path.display()
        ));
    }
    let cache = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let cached = cache.map(|cache| cache.join("ringfence/tools/bin/bpf-linker"));
    if let Some(path) = cached.filter(|path| path.is_file()) {
        println!("cargo::rerun-if-changed={}", path.display());
        return Ok(path);
    }
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .map(|folder| folder.join("bpf-linker"))
        .find(|path| path.is_file())
        .ok_or(format!("bpf-linker is missing: {SETUP}"))
}

/// The source of `core`, which is built for the eBPF target.
fn require_rust_src() -> Result<(), String> {
    let rustc = required("RUSTC")?;
    let output = Command::new(&rustc)
        .args(["--print", "sysroot"])
        .output()
        .map_err(|e| format!("cannot run {rustc}: {e}"))?;
    let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if Path::new(&sysroot)
        .join("lib/rustlib/src/rust/library/core")
        .is_dir()
    {
        return Ok(());
    }
    Err(format!(
        "the toolchain in {sysroot} lacks the component rust-src: {SETUP}"
    ))
}

fn required(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("{name} is not set: run this through cargo"))
}
