//! `cargo xtask bench identity`: runs the benchmark of the crate `ringfence-identity` in a
//! release build and shows what it found.

use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{build, ui};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Fewer rounds and identities: to see that it works, not for figures
    #[arg(long)]
    quick: bool,
    /// The result as JSON on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut command = build::cargo()?;
    command
        .args(["bench", "--locked", "--package", "ringfence-identity"])
        .args(["--features", "testing", "--bench", "identity", "--"])
        .args(arguments.quick.then_some("--quick"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    ui::line("building and running the benchmark (about two minutes, --quick some seconds)");
    let output = command
        .spawn()
        .context("starting cargo")?
        .wait_with_output()?;
    ensure!(
        output.status.success(),
        "`{}` ended with {}",
        ui::command_line(&command),
        output.status
    );
    let report = Report {
        kernel: nix::sys::utsname::uname()?
            .release()
            .to_string_lossy()
            .into_owned(),
        cores: std::thread::available_parallelism()?.get(),
        figures: figures(&output.stdout)?,
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text());
    }
    Ok(ExitCode::SUCCESS)
}

fn figures(output: &[u8]) -> Result<Figures> {
    serde_json::from_slice(output).with_context(|| {
        let output = String::from_utf8_lossy(output);
        format!(
            "the benchmark printed no result:\n{}",
            ui::last_lines(&output, 10)
        )
    })
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    cores: usize,
    #[serde(flatten)]
    figures: Figures,
}

/// What `identity/benches/identity` prints.
#[derive(Debug, Serialize, Deserialize)]
struct Figures {
    rounds: usize,
    /// Serial numbers in each revocation list.
    listed_serials: usize,
    handshakes: Vec<Handshakes>,
    verifier: Vec<Verification>,
    memory: Vec<Memory>,
}

/// Mutual TLS 1.3, both ends on one thread; medians.
#[derive(Debug, Serialize, Deserialize)]
struct Handshakes {
    key: String,
    key_exchange: String,
    revocation_lists: bool,
    per_second: f64,
    /// User and system time of both ends together, microseconds a handshake.
    cpu_us: f64,
}

/// One judgement of a certificate chain.
#[derive(Debug, Serialize, Deserialize)]
struct Verification {
    chain: String,
    revocation_lists: bool,
    cpu_us: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Memory {
    identities: usize,
    /// Growth of anonymous memory, bytes an SVID.
    bytes_each: u64,
    per_mib: f64,
    issued_in_seconds: f64,
}

impl Report {
    fn text(&self) -> String {
        let Figures {
            rounds,
            listed_serials,
            handshakes,
            verifier,
            memory,
        } = &self.figures;
        let mut lines = vec![
            String::new(),
            format!(
                "kernel {}, {} cores, medians of {rounds} rounds; client and server on one thread",
                self.kernel, self.cores
            ),
            String::new(),
            format!(
                "{:<12} {:<15} {:>13} {:>10} {:>26}",
                "key", "key exchange", "handshakes/s", "CPU each", "with revocation lists"
            ),
        ];
        for plain in handshakes.iter().filter(|h| !h.revocation_lists) {
            let listed = handshakes.iter().find(|other| {
                other.revocation_lists
                    && other.key == plain.key
                    && other.key_exchange == plain.key_exchange
            });
            let listed = listed.map_or_else(
                || "–".to_owned(),
                |h| format!("{:.0}/s {:>7.0} µs", h.per_second, h.cpu_us),
            );
            lines.push(format!(
                "{:<12} {:<15} {:>13.0} {:>7.0} µs {listed:>26}",
                plain.key, plain.key_exchange, plain.per_second, plain.cpu_us
            ));
        }
        lines.extend([String::new(), "one peer's chain judged, CPU:".to_owned()]);
        for judged in verifier {
            let lists = if judged.revocation_lists {
                format!("with lists of {listed_serials}")
            } else {
                "no revocation lists".to_owned()
            };
            lines.push(format!(
                "{:<30} {lists:<24} {:>8.1} µs",
                judged.chain, judged.cpu_us
            ));
        }
        lines.extend([String::new(), "SVIDs under management:".to_owned()]);
        for of in memory {
            lines.push(format!(
                "{:>6} identities: {:>6} bytes each, {:>5.0} a MiB (issued in {:.1} s)",
                of.identities, of.bytes_each, of.per_mib, of.issued_in_seconds
            ));
        }
        lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = r#"{"rounds":3,"listed_serials":1000,
        "handshakes":[
          {"key":"Ed25519","key_exchange":"X25519","revocation_lists":false,"per_second":1500.4,"cpu_us":660.0},
          {"key":"Ed25519","key_exchange":"X25519","revocation_lists":true,"per_second":1400.0,"cpu_us":700.2},
          {"key":"RSA-2048","key_exchange":"X25519","revocation_lists":false,"per_second":500.0,"cpu_us":2000.0}],
        "verifier":[{"chain":"P-256 root","revocation_lists":true,"cpu_us":61.25}],
        "memory":[{"identities":1000,"bytes_each":4096,"per_mib":256.0,"issued_in_seconds":0.5}]}"#;

    #[test]
    fn each_key_and_exchange_is_a_line_with_and_without_lists() -> Result<()> {
        let report = Report {
            kernel: "6.18".into(),
            cores: 2,
            figures: figures(PRINTED.as_bytes())?,
        };
        let text = report.text();
        let line = |start: &str| {
            text.lines()
                .find(|l| l.starts_with(start))
                .unwrap_or_default()
        };
        assert!(line("Ed25519").contains("660 µs"), "{text}");
        assert!(line("Ed25519").ends_with("1400/s     700 µs"), "{text}");
        assert!(line("RSA-2048").ends_with('–'), "{text}");
        assert!(line("P-256 root").ends_with("61.2 µs"), "{text}");
        assert!(line("  1000 identities").contains("256 a MiB"), "{text}");
        Ok(())
    }

    #[test]
    fn what_is_no_result_is_shown() {
        let error = figures(b"thread main panicked").map(|_| ());
        let text = error.map_or_else(|error| format!("{error:#}"), |()| String::new());
        assert!(text.contains("thread main panicked"), "{text}");
    }
}
