//! `ringfence status`: what the agent says of itself, as JSON and as a page.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The answer of `GET /status` on the admin socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Layout version of the pinned BPF maps.
    pub map_layout: u32,
    pub node: String,
    /// Every enrolled pod is ready and the control plane's first answer has arrived.
    pub ready: bool,
    pub control_plane: ControlPlane,
    pub record_layer: RecordLayer,
    pub pods: Vec<Pod>,
    pub svids: Vec<Svid>,
    pub revocation_lists: Vec<RevocationList>,
    pub streams: Vec<Stream>,
    /// The last handshakes, newest first.
    pub handshakes: Vec<Handshake>,
    pub policies: Vec<Policy>,
    pub counters: BTreeMap<String, u64>,
    /// What this node cannot do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ControlPlane {
    pub address: String,
    /// `connecting`, `connected` or `failed`.
    pub state: String,
    /// The last error, when failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub synced: bool,
    pub workloads: usize,
    pub services: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RecordLayer {
    /// `kernel` or `software`.
    pub mode: String,
    /// Why it is software, or the cipher suites that the kernel takes.
    pub reason: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub netns: String,
    pub netns_cookie: u64,
    pub addresses: Vec<IpAddr>,
    pub identity: String,
    pub policy_set: u32,
    /// Whether the guard at the host side of its devices is `on`, or why not.
    pub guard: String,
    pub ready: bool,
    /// Why it is not ready, or a restriction that holds although it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Svid {
    pub id: String,
    /// Handshakes can use it now.
    pub valid: bool,
    pub state: String,
    pub serial: String,
    pub issuer: String,
    /// Seconds since the epoch.
    pub not_before: i64,
    /// Seconds since the epoch.
    pub not_after: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// One configured file of revocation lists.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RevocationList {
    pub trust_domain: String,
    pub file: String,
    /// `in-force`, `expired` or `missing`. In the latter two, and without another file for
    /// it, nobody of the trust domain is accepted.
    pub state: String,
    /// Serial numbers on the lists.
    pub revoked: usize,
    /// When the first of the lists ends; seconds since the epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_update: Option<i64>,
    /// Why the file as it is now is not in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stream {
    /// 16 bytes in hex; the same on both nodes.
    pub id: String,
    /// `outbound` (we dialled) or `inbound`.
    pub direction: String,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub peer: String,
    /// Application bytes sent into the tunnel.
    pub tx: u64,
    /// Application bytes received from the tunnel.
    pub rx: u64,
    pub age_seconds: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Handshake {
    pub direction: String,
    /// The peer's SPIFFE ID, as its certificate says.
    pub peer: String,
    pub issuer: String,
    pub serial: String,
    /// Seconds since the epoch.
    pub not_after: i64,
    pub cipher: String,
    pub key_exchange: String,
    pub record_layer: String,
    pub at: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Policy {
    pub name: String,
    pub summary: String,
}

impl Status {
    /// The page that people read.
    pub fn page(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "ringfence {} on {} (map layout {})",
            self.version, self.node, self.map_layout
        )?;
        writeln!(
            out,
            "  ready          {}",
            if self.ready { "yes" } else { "NO" }
        )?;
        let cp = &self.control_plane;
        writeln!(
            out,
            "  control plane  {} {}{}, {} workloads, {} services",
            cp.address,
            cp.state,
            cp.error
                .as_deref()
                .map(|e| format!(" ({e})"))
                .unwrap_or_default(),
            cp.workloads,
            cp.services
        )?;
        writeln!(
            out,
            "  record layer   {} ({})",
            self.record_layer.mode, self.record_layer.reason
        )?;

        for warning in &self.warnings {
            writeln!(out, "  WARNING        {warning}")?;
        }

        let rows = |p: &Pod| {
            let addresses: Vec<_> = p.addresses.iter().map(ToString::to_string).collect();
            vec![
                format!("{}/{}", p.namespace, p.name),
                addresses.join(","),
                p.identity.clone(),
                if p.ready {
                    "ready".into()
                } else {
                    "NOT READY".into()
                },
                p.guard.clone(),
                p.reason.clone().unwrap_or_default(),
            ]
        };
        table(
            out,
            "pods",
            &["pod", "addresses", "identity", "state", "guard", "reason"],
            self.pods.iter().map(rows),
        )?;
        out.push_str(&certificates(&self.svids));
        if !self.revocation_lists.is_empty() {
            let now = now().cast_signed();
            let head = ["trust domain", "state", "revoked", "expires in", "file"];
            let rows = self.revocation_lists.iter().map(|list| {
                vec![
                    list.trust_domain.clone(),
                    with_error(&list.state, list.error.as_deref()),
                    list.revoked.to_string(),
                    list.next_update
                        .map(|at| left(at.saturating_sub(now)))
                        .unwrap_or_default(),
                    list.file.clone(),
                ]
            });
            table(out, "revocation lists", &head, rows)?;
        }
        table(
            out,
            "streams",
            &[
                "direction",
                "source",
                "destination",
                "peer",
                "sent",
                "received",
                "age",
            ],
            self.streams.iter().map(|s| {
                vec![
                    s.direction.clone(),
                    s.source.to_string(),
                    s.destination.to_string(),
                    s.peer.clone(),
                    s.tx.to_string(),
                    s.rx.to_string(),
                    format!("{} s", s.age_seconds),
                ]
            }),
        )?;
        table(
            out,
            "last handshakes",
            &[
                "direction",
                "peer",
                "key exchange",
                "cipher",
                "records",
                "serial",
            ],
            self.handshakes.iter().take(10).map(|h| {
                vec![
                    h.direction.clone(),
                    h.peer.clone(),
                    h.key_exchange.clone(),
                    h.cipher.clone(),
                    h.record_layer.clone(),
                    h.serial.clone(),
                ]
            }),
        )?;
        table(
            out,
            "policies",
            &["policy", "what"],
            self.policies
                .iter()
                .map(|p| vec![p.name.clone(), p.summary.clone()]),
        )?;
        table(
            out,
            "counters",
            &["counter", "value"],
            self.counters
                .iter()
                .filter(|(_, v)| **v > 0)
                .map(|(k, v)| vec![k.clone(), v.to_string()]),
        )
    }
}

/// The table of `ringfence certs`.
pub fn certificates(svids: &[Svid]) -> String {
    let now = now().cast_signed();
    let rows = svids.iter().map(|s| {
        vec![
            s.id.clone(),
            with_error(&s.state, s.error.as_deref()),
            left(s.not_after.saturating_sub(now)),
            s.serial.clone(),
            s.issuer.clone(),
        ]
    });
    let mut out = String::new();
    // Writing to a String cannot fail.
    let head = ["identity", "state", "expires in", "serial", "issuer"];
    let _ = table(&mut out, "svids", &head, rows);
    out
}

fn with_error(state: &str, error: Option<&str>) -> String {
    match error {
        Some(error) => format!("{state}: {error}"),
        None => state.to_owned(),
    }
}

/// A span of time as people read it.
fn left(seconds: i64) -> String {
    match seconds {
        ..=0 => "EXPIRED".into(),
        s if s < 120 => format!("{s} s"),
        s if s < 7200 => format!("{} min", s / 60),
        s if s < 172_800 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

fn table(
    out: &mut String,
    title: &str,
    head: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
) -> std::fmt::Result {
    let rows: Vec<Vec<String>> = rows.collect();
    if rows.is_empty() {
        return writeln!(out, "\n{title}: none");
    }
    writeln!(out, "\n{title}")?;
    let width = |column: usize| {
        let cells = rows
            .iter()
            .filter_map(|r| r.get(column))
            .map(|c| c.chars().count());
        cells
            .chain(head.get(column).map(|h| h.len()))
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let text: Vec<String> = cells
            .zip(&widths)
            .map(|(c, w)| format!("{c:<w$}"))
            .collect();
        writeln!(out, "  {}", text.join("  ").trim_end())
    };
    line(&mut head.iter().copied())?;
    for row in &rows {
        line(&mut row.iter().map(String::as_str))?;
    }
    Ok(())
}

/// Seconds since the epoch.
pub fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map(|d| d.as_secs())
        .unwrap_or_default()
}
