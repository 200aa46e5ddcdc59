//! One round of load on one lab.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ringfence_lab::Lab;
use ringfence_lab::process::{cpu_time, output_within};
use ringfence_lab::topology::{Family, WEB_VIP};
use serde::Serialize;

use crate::demo::traffic::{iperf3, rate};

/// Figures of a lab, or medians of several.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// iperf3, one stream, as received.
    pub bits_per_second: f64,
    /// CPU time of both agents for that stream; without a mesh there are none.
    pub agent_cpu_seconds_per_gib: Option<f64>,
    /// wrk, 16 connections that are kept.
    pub requests_per_second: f64,
    pub request_p50_seconds: f64,
    pub request_p99_seconds: f64,
    /// wrk, 16 at a time, each request on a connection of its own.
    pub connections_per_second: f64,
    pub connection_p50_seconds: f64,
    pub connection_p99_seconds: f64,
    /// Requests that failed, of both kinds.
    pub errors: f64,
}

/// Name, value, and how the value is shown.
pub type ShownRow = (&'static str, Option<f64>, fn(f64) -> String);

impl Figures {
    pub fn measure(lab: &Lab, seconds: u32) -> Result<Self> {
        // Without a mesh nobody translates the service's address.
        let target = match lab.mesh() {
            Ok(_) => Family::V4.of(WEB_VIP),
            Err(_) => lab.pod("web")?.address(Family::V4),
        };
        let before = agents_cpu(lab)?;
        let stream = iperf3(lab, "client", target, seconds)?;
        let used = agents_cpu(lab)?
            .zip(before)
            .map(|(after, before)| after.saturating_sub(before));
        let kept = wrk(lab, target, seconds, false)?;
        let closed = wrk(lab, target, seconds, true)?;
        Ok(Figures {
            bits_per_second: stream.bits_per_second,
            agent_cpu_seconds_per_gib: used
                .map(|used| used.as_secs_f64() / (stream.bytes as f64 / f64::from(1u32 << 30))),
            requests_per_second: kept.per_second,
            request_p50_seconds: kept.p50,
            request_p99_seconds: kept.p99,
            connections_per_second: closed.per_second,
            connection_p50_seconds: closed.p50,
            connection_p99_seconds: closed.p99,
            errors: kept.errors + closed.errors,
        })
    }

    pub fn medians(rounds: &[Figures]) -> Self {
        let of = |value: fn(&Figures) -> f64| {
            median(rounds.iter().map(value).collect()).unwrap_or_default()
        };
        Figures {
            bits_per_second: of(|f| f.bits_per_second),
            agent_cpu_seconds_per_gib: median(
                rounds
                    .iter()
                    .filter_map(|f| f.agent_cpu_seconds_per_gib)
                    .collect(),
            ),
            requests_per_second: of(|f| f.requests_per_second),
            request_p50_seconds: of(|f| f.request_p50_seconds),
            request_p99_seconds: of(|f| f.request_p99_seconds),
            connections_per_second: of(|f| f.connections_per_second),
            connection_p50_seconds: of(|f| f.connection_p50_seconds),
            connection_p99_seconds: of(|f| f.connection_p99_seconds),
            errors: rounds.iter().map(|f| f.errors).sum(),
        }
    }

    pub fn rows(&self) -> Vec<ShownRow> {
        vec![
            ("iperf3, one stream", Some(self.bits_per_second), rate),
            (
                "CPU of both agents per GiB",
                self.agent_cpu_seconds_per_gib,
                |v| format!("{v:.2} s"),
            ),
            (
                "HTTP keep-alive, 16 connections",
                Some(self.requests_per_second),
                per_second,
            ),
            ("  p50", Some(self.request_p50_seconds), duration),
            ("  p99", Some(self.request_p99_seconds), duration),
            (
                "HTTP, a connection a request, 16 at once",
                Some(self.connections_per_second),
                per_second,
            ),
            ("  p50", Some(self.connection_p50_seconds), duration),
            ("  p99", Some(self.connection_p99_seconds), duration),
            ("failed requests, all rounds", Some(self.errors), |v| {
                format!("{v:.0}")
            }),
        ]
    }

    /// The figures in one line.
    pub fn line(&self) -> String {
        format!(
            "{}, {} keep-alive, {} with connections, {:.0} errors",
            rate(self.bits_per_second),
            per_second(self.requests_per_second),
            per_second(self.connections_per_second),
            self.errors
        )
    }
}

fn agents_cpu(lab: &Lab) -> Result<Option<Duration>> {
    if lab.mesh().is_err() {
        return Ok(None);
    }
    let mut total = Duration::ZERO;
    for node in &lab.topology().nodes {
        total += cpu_time(lab.process(&node.name)?)?;
    }
    Ok(Some(total))
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Wrk {
    per_second: f64,
    p50: f64,
    p99: f64,
    errors: f64,
}

fn wrk(lab: &Lab, target: IpAddr, seconds: u32, close: bool) -> Result<Wrk> {
    let mut command = lab.command("client", "wrk")?;
    command.args(["--threads", "2", "--connections", "16", "--latency"]);
    command.args(["--duration", &format!("{seconds}s")]);
    if close {
        command.args(["--header", "Connection: close"]);
    }
    command.arg(format!("http://{target}:8080/bench"));
    let output = output_within(command, Duration::from_secs(60 + u64::from(seconds)))?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "wrk ended with {}: {text}",
        output.status
    );
    parse(&text).with_context(|| format!("reading what wrk printed:\n{text}"))
}

fn parse(text: &str) -> Option<Wrk> {
    let after = |key: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(key))
            .map(str::trim)
    };
    let numbers = |line: &str| -> f64 {
        line.split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse::<f64>().ok())
            .sum()
    };
    Some(Wrk {
        per_second: after("Requests/sec:")?.parse().ok()?,
        p50: seconds(after("50%")?)?,
        p99: seconds(after("99%")?)?,
        errors: after("Socket errors:").map_or(0.0, numbers)
            + after("Non-2xx or 3xx responses:").map_or(0.0, numbers),
    })
}

/// wrk's durations: `81.00us`, `1.53ms`, `2.01s`, `1.20m`.
fn seconds(text: &str) -> Option<f64> {
    for (unit, factor) in [("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Some(number.parse::<f64>().ok()? * factor);
        }
    }
    None
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().checked_sub(1)? / 2, values.len() / 2);
    Some((values.get(low)? + values.get(high)?) / 2.0)
}

fn per_second(value: f64) -> String {
    format!("{value:.0} /s")
}

fn duration(seconds: f64) -> String {
    if seconds < 1e-3 {
        format!("{:.0} µs", seconds * 1e6)
    } else {
        format!("{:.2} ms", seconds * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Running 5s test @ http://10.96.0.10:8080/bench
  Latency Distribution
     50%   81.00us
     75%   90.00us
     90%    0.10ms
     99%    1.53ms
  100 requests in 5.00s, 1MB read
  Socket errors: connect 0, read 3, write 0, timeout 1
Requests/sec:  48700.25
";

    #[test]
    fn the_output_of_wrk_is_read() {
        let wrk = parse(OUTPUT);
        assert_eq!(
            wrk,
            Some(Wrk {
                per_second: 48700.25,
                p50: 81.0 * 1e-6,
                p99: 1.53 * 1e-3,
                errors: 4.0
            })
        );
    }

    #[test]
    fn output_without_a_rate_is_not_taken_for_a_result() {
        assert_eq!(parse("unable to connect"), None);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![1.0, 3.0]), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }
}
