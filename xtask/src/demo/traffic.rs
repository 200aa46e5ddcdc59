//! Unmodified programs through the mesh.

use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ringfence_lab::Lab;
use ringfence_lab::kernel_view;
use ringfence_lab::process::output_within;
use ringfence_lab::topology::{Family, WEB_VIP};
use serde::Deserialize;

use super::Demo;
use super::report::{Observed, Rows, seen};

/// What the requests of the captured phase carry.
pub const MARKER: &str = "ringfence-demo-marker-5f1c";

impl Demo {
    /// Requests small enough to be captured whole; each carries [`MARKER`].
    pub fn small_traffic(&mut self, rows: &mut Rows) {
        for family in Family::BOTH {
            let vip = family.of(WEB_VIP);
            rows.add(
                &format!("curl → service → nginx, {}", family.name()),
                || {
                    let path = format!("/echo/{MARKER}");
                    let through = self.curl("client", vip, 80, &path)?;
                    let direct = self.curl("web", family.loopback(), 8080, &path)?;
                    same(&through, &direct)?;
                    seen(format!(
                        "http://{}/ answers the {} bytes of the direct answer",
                        host(vip),
                        direct.len()
                    ))
                },
            );
        }
        for family in Family::BOTH {
            let vip = family.of(WEB_VIP);
            rows.add(
                &format!("redis-cli → service → redis, {}", family.name()),
                || {
                    let key = format!("key-{}", family.name());
                    let value = format!("{MARKER}-{}", family.name());
                    let stored = self.redis("client", vip, &["set", &key, &value])?;
                    ensure!(stored.trim() == "OK", "SET answered {stored:?}");
                    let through = self.redis("client", vip, &["get", &key])?;
                    let direct = self.redis("web", family.loopback(), &["get", &key])?;
                    ensure!(
                        direct.trim() == value,
                        "redis holds {direct:?}, not {value:?}"
                    );
                    same(through.as_bytes(), direct.as_bytes())?;
                    seen("SET, and the GET of both ways gives the same bytes")
                },
            );
        }
    }

    pub fn bulk_traffic(&mut self, rows: &mut Rows) {
        for family in Family::BOTH {
            rows.add(
                &format!("iperf3 → service → iperf3, {}", family.name()),
                || {
                    let seconds = 2;
                    let result = iperf3(&self.lab, "client", family.of(WEB_VIP), seconds)?;
                    ensure!(
                        result.bytes > 1 << 20,
                        "only {} bytes in {seconds} s",
                        result.bytes
                    );
                    seen(format!(
                        "{} in {seconds} s, {}",
                        megabytes(result.bytes),
                        rate(result.bits_per_second)
                    ))
                },
            );
        }
        rows.add(
            &format!("{} MB by curl, equal SHA-256", self.megabytes),
            || {
                let vip = WEB_VIP.0;
                let fetch =
                    format!("curl -sS --fail --max-time 100 http://{vip}:8080/blob | sha256sum");
                let mut shell = self.lab.command("client", "sh")?;
                shell.args(["-c", &fetch]);
                let through = text(shell)?;
                let file = self.lab.pod_dir(self.lab.pod("web")?).join("www/blob");
                let size = file.metadata()?.len();
                ensure!(
                    size == self.megabytes << 20,
                    "the file on the server has {size} bytes"
                );
                let mut sum_of_file = Command::new("sha256sum");
                sum_of_file.arg(&file);
                let direct = text(sum_of_file)?;
                let sum = |text: &str| text.split_whitespace().next().map(str::to_owned);
                let (through, direct) = (
                    sum(&through).context("no sum")?,
                    sum(&direct).context("no sum")?,
                );
                ensure!(
                    through == direct,
                    "the client got {through}, the server's file has {direct}"
                );
                seen(format!("{}…", direct.get(..16).unwrap_or(&direct)))
            },
        );
    }

    /// The kernel's own view of a tunnel while a slow transfer keeps it open.
    pub fn kernel_sockets(&mut self, rows: &mut Rows, mode: &str) {
        rows.add("the kernel reports TLS, both directions", || {
            if mode != "kernel" {
                let reason = kernel_view::kernel_tls_missing()
                    .unwrap_or_else(|| "the agent's choice".into());
                return Ok(Observed::NotHere(format!(
                    "records are protected in software: {reason}"
                )));
            }
            let vip = WEB_VIP.0;
            let mut transfer = self
                .lab
                .command("client", "curl")?
                .args(["-sS", "--limit-rate", "200k", "-o", "/dev/null"])
                .arg(format!("http://{vip}:8080/blob"))
                .stdin(Stdio::null())
                .spawn()
                .context("starting curl")?;
            let observed = self.kernel_view_of_both_ends();
            transfer.kill()?;
            transfer.wait()?;
            seen(observed?)
        });
    }

    fn kernel_view_of_both_ends(&self) -> Result<String> {
        let mut parts = Vec::new();
        for name in ["client", "web"] {
            let netns = self.lab.pod(name)?.netns();
            let socket =
                ringfence_lab::process::wait_until("a TLS socket in `ss`", self.patience, || {
                    let sockets = kernel_view::tls_sockets(&netns)?;
                    sockets
                        .iter()
                        .find(|socket| socket.both_directions() && socket.version == "1.3")
                        .cloned()
                        .with_context(|| format!("ss in {name} shows no such socket: {sockets:?}"))
                })?;
            let counters = kernel_view::tls_counters(&netns).context("no /proc/net/tls_stat")?;
            let count = |key: &str| counters.get(key).copied().unwrap_or_default();
            let device = |key: &str| count(&format!("{key}Sw")) + count(&format!("{key}Device"));
            let (transmit, receive) = (device("TlsTx"), device("TlsRx"));
            ensure!(
                transmit > 0 && receive > 0,
                "/proc/net/tls_stat of {name} counts tx {transmit}, rx {receive}"
            );
            ensure!(
                count("TlsDecryptError") == 0,
                "{name}: {} decrypt errors",
                count("TlsDecryptError")
            );
            parts.push(format!(
                "{name}: ss says {} {} rx {} tx {}, tls_stat tx {transmit} rx {receive}",
                socket.version, socket.cipher, socket.receive, socket.transmit
            ));
        }
        Ok(parts.join("; "))
    }

    pub fn curl(&self, pod: &str, address: IpAddr, port: u16, path: &str) -> Result<Vec<u8>> {
        curl(&self.lab, pod, address, port, path, &[])
    }

    fn redis(&self, pod: &str, address: IpAddr, command: &[&str]) -> Result<String> {
        redis(&self.lab, pod, address, command)
    }
}

/// How long any of the programs may take. Emulation is slow; a stall is longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// One request by curl from a pod; the answer's body.
pub fn curl(
    lab: &Lab,
    pod: &str,
    address: IpAddr,
    port: u16,
    path: &str,
    options: &[&str],
) -> Result<Vec<u8>> {
    let url = format!("http://{}:{port}{path}", host(address));
    let mut command = lab.command(pod, "curl")?;
    command
        .args(["-sS", "--fail", "--max-time", "60", "-g"])
        .args(options)
        .arg(url);
    output(command)
}

pub fn redis(lab: &Lab, pod: &str, address: IpAddr, command: &[&str]) -> Result<String> {
    let mut client = lab.command(pod, "redis-cli")?;
    client.args(["-h", &address.to_string()]).args(command);
    text(client)
}

/// The client's result of one iperf3 run.
#[derive(Clone, Copy, Debug)]
pub struct Iperf3 {
    pub bytes: u64,
    pub bits_per_second: f64,
}

/// Sends for `seconds` over one stream. The figures are those of the receiving side.
pub fn iperf3(lab: &Lab, pod: &str, address: IpAddr, seconds: u32) -> Result<Iperf3> {
    #[derive(Deserialize)]
    struct Sum {
        bytes: u64,
        bits_per_second: f64,
    }
    #[derive(Deserialize)]
    struct End {
        sum_received: Option<Sum>,
    }
    #[derive(Deserialize)]
    struct Answer {
        end: End,
        error: Option<String>,
    }
    let mut command = lab.command(pod, "iperf3")?;
    command.args([
        "--json",
        "--client",
        &address.to_string(),
        "--time",
        &seconds.to_string(),
    ]);
    let output = output_within(command, PATIENCE + Duration::from_secs(seconds.into()))?;
    let answer: Answer = serde_json::from_slice(&output.stdout).with_context(|| {
        format!(
            "iperf3 ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )
    })?;
    ensure!(
        answer.error.is_none(),
        "iperf3: {}",
        answer.error.unwrap_or_default()
    );
    let sum = answer
        .end
        .sum_received
        .context("iperf3 reports no bytes received")?;
    Ok(Iperf3 {
        bytes: sum.bytes,
        bits_per_second: sum.bits_per_second,
    })
}

/// Standard output of a command that must succeed.
pub fn output(command: Command) -> Result<Vec<u8>> {
    let line = crate::ui::command_line(&command);
    let output = output_within(command, PATIENCE)?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "`{line}` ended with {}: {}",
        output.status,
        complaint.trim()
    );
    Ok(output.stdout)
}

pub fn text(command: Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command)?).into_owned())
}

/// An address as a URL has it.
pub fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

fn same(through: &[u8], direct: &[u8]) -> Result<()> {
    ensure!(!direct.is_empty(), "the direct answer is empty");
    ensure!(
        through == direct,
        "{:?} through the mesh, {:?} directly",
        String::from_utf8_lossy(through),
        String::from_utf8_lossy(direct)
    );
    Ok(())
}

fn megabytes(bytes: u64) -> String {
    format!("{:.0} MB", bytes as f64 / 1e6)
}

pub fn rate(bits_per_second: f64) -> String {
    if bits_per_second >= 1e9 {
        format!("{:.2} Gbit/s", bits_per_second / 1e9)
    } else {
        format!("{:.0} Mbit/s", bits_per_second / 1e6)
    }
}
