//! Tools that come from the Rust toolchain and from the crate registry.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::cache_dir;
use crate::ui;

const BPF_LINKER: &str = "0.13.0";
const CARGO_DENY: &str = "^0.20";

/// What the eBPF build needs: the sources of `core`, and `bpf-linker` linked against the
/// toolchain's own LLVM. Returns the linker's path.
pub fn ensure_ebpf_toolchain() -> Result<PathBuf> {
    ensure_rust_src()?;
    ensure_bpf_linker()
}

/// `cargo-deny` in the cache, built when it is missing. Returns its path.
pub fn ensure_cargo_deny() -> Result<PathBuf> {
    let tools = cache_dir()?.join("tools");
    let program = tools.join("bin/cargo-deny");
    if runs(&program) {
        return Ok(program);
    }
    ui::line(format!(
        "building cargo-deny {CARGO_DENY} into {} (some minutes, once)",
        tools.display()
    ));
    ui::run(
        "building cargo-deny",
        cargo_install(&tools).args(["cargo-deny", "--version", CARGO_DENY]),
    )?;
    ensure!(
        runs(&program),
        "{} was built and does not run",
        program.display()
    );
    Ok(program)
}

fn ensure_rust_src() -> Result<()> {
    let library = sysroot()?.join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if library.is_file() {
        return Ok(());
    }
    ui::line("installing the Rust component rust-src");
    let added = ui::run(
        "rustup component add rust-src",
        Command::new("rustup").args(["component", "add", "rust-src"]),
    );
    if library.is_file() {
        return Ok(());
    }
    let reason = added.err().map_or_else(
        || "rustup reported success".to_owned(),
        |e| format!("{e:#}"),
    );
    bail!(
        "the sources of `core` are missing ({}) and rustup could not add them: {reason}\n\
         Run `rustup component add rust-src`, or on Debian install the matched pair \
         rustc-web and rust-web-src.",
        library.display()
    );
}

fn ensure_bpf_linker() -> Result<PathBuf> {
    let tools = cache_dir()?.join("tools");
    let program = tools.join("bin/bpf-linker");
    if runs(&program) {
        return Ok(program);
    }
    let sysroot = sysroot()?;
    let library_dir = sysroot.join("lib");
    let llvm = toolchain_llvm(&library_dir)?;
    // The build wants `<prefix>/lib/libLLVM.so`; the toolchain ships it under a longer name.
    let prefix = tools.join("llvm");
    let link = prefix.join("lib/libLLVM.so");
    std::fs::create_dir_all(prefix.join("lib"))?;
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(&llvm, &link)
        .with_context(|| format!("linking {} to {}", link.display(), llvm.display()))?;
    ui::line(format!(
        "building bpf-linker {BPF_LINKER} into {} (about a minute, once)",
        tools.display()
    ));
    ui::run(
        "building bpf-linker",
        cargo_install(&tools)
            .args(["bpf-linker", "--version", &format!("={BPF_LINKER}")])
            .args(["--no-default-features", "--features", "llvm-22"])
            .env("LLVM_PREFIX", &prefix)
            .env(
                "RUSTFLAGS",
                format!("-C link-arg=-Wl,-rpath,{0} -L {0}", library_dir.display()),
            ),
    )?;
    ensure!(
        runs(&program),
        "{} was built and does not run",
        program.display()
    );
    Ok(program)
}

fn cargo_install(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["install", "--locked", "--force", "--root"])
        .arg(root)
        // The installation is of its own; neither our flags nor our target folder apply.
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    command
}

fn toolchain_llvm(library_dir: &Path) -> Result<PathBuf> {
    std::fs::read_dir(library_dir)
        .with_context(|| format!("reading {}", library_dir.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("libLLVM.so."))
        })
        .with_context(|| {
            format!(
                "{} has no libLLVM.so.*: use the toolchain of rust-toolchain.toml from rustup",
                library_dir.display()
            )
        })
}

fn sysroot() -> Result<PathBuf> {
    let output = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .context("starting rustc: install the toolchain of rust-toolchain.toml with rustup")?;
    ensure!(
        output.status.success(),
        "rustc --print sysroot ended with {}",
        output.status
    );
    Ok(PathBuf::from(
        String::from_utf8_lossy(&output.stdout).trim(),
    ))
}

fn runs(program: &Path) -> bool {
    program.is_file()
        && Command::new(program)
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success())
}
