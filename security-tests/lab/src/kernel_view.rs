//! What the kernel says of the sockets of a namespace, in its own words: `ss`, which shows
//! the `TLS_INFO` attributes of sock_diag, and `/proc/net/tls_stat`.

use std::collections::BTreeMap;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};

use crate::netns::Netns;

/// A socket that the kernel reports as TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSocket {
    pub local: String,
    pub remote: String,
    pub version: String,
    pub cipher: String,
    /// `sw`, `hw` or `none`.
    pub receive: String,
    pub transmit: String,
}

impl TlsSocket {
    /// The kernel protects both directions.
    pub fn both_directions(&self) -> bool {
        ["sw", "hw"].contains(&self.receive.as_str())
            && ["sw", "hw"].contains(&self.transmit.as_str())
    }
}

/// The TLS sockets of a namespace.
pub fn tls_sockets(netns: &Netns) -> Result<Vec<TlsSocket>> {
    let output = netns
        .command("ss")?
        .args([
            "--tcp",
            "--no-header",
            "--numeric",
            "--info",
            "--extended",
            "--oneline",
            "state",
            "connected",
        ])
        .stdin(Stdio::null())
        .output()
        .context("starting ss: install iproute2")?;
    ensure!(
        output.status.success(),
        "ss ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(parse)
        .collect())
}

/// A line of `ss -tieO`; `None` when it is not about TLS.
fn parse(line: &str) -> Option<TlsSocket> {
    let (_, info) = line.split_once("tcp-ulp-tls")?;
    let value = |key: &str| -> Option<String> {
        let (_, after) = info.split_once(&format!("{key}: "))?;
        after.split_whitespace().next().map(str::to_owned)
    };
    let mut columns = line.split_whitespace().filter(|word| word.contains(':'));
    Some(TlsSocket {
        local: columns.next()?.to_owned(),
        remote: columns.next()?.to_owned(),
        version: value("version")?,
        cipher: value("cipher")?,
        receive: value("rxconf").unwrap_or_else(|| "none".into()),
        transmit: value("txconf").unwrap_or_else(|| "none".into()),
    })
}

/// Why this kernel cannot protect TLS records, or `None` when it can. Found out by trying:
/// the protocol is attached to a connection over loopback, which loads the module.
pub fn kernel_tls_missing() -> Option<String> {
    let attached = || -> std::io::Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        setsockopt(&stream, sockopt::TcpUlp::default(), b"tls").map_err(Into::into)
    };
    let error = attached().err()?;
    Some(match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => "it has no TLS protocol for TCP (CONFIG_TLS)".to_owned(),
        Some(Errno::ENOPROTOOPT) => "it has no upper layer protocols for TCP".to_owned(),
        _ => format!("attaching TLS to a socket failed: {error}"),
    })
}

/// Counters of `/proc/net/tls_stat`; `None` on a kernel without kTLS.
pub fn tls_counters(netns: &Netns) -> Option<BTreeMap<String, u64>> {
    let text = netns.proc_net("tls_stat").ok()?;
    Some(
        text.lines()
            .filter_map(|line| {
                let (name, value) = line.split_once(char::is_whitespace)?;
                Some((name.to_owned(), value.trim().parse().ok()?))
            })
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_kernel_tls_socket_is_recognised() {
        let line = "ESTAB 0 0 10.77.1.10:48062 10.77.2.10:15008 ino:1 sk:2 cgroup:/ <-> ts sack \
                    cubic tcp-ulp-tls version: 1.3 cipher: aes-gcm-128 rxconf: sw txconf: sw";
        let socket = parse(line).unwrap();
        assert!(socket.both_directions());
        assert_eq!(socket.remote, "10.77.2.10:15008");
        assert_eq!(
            (socket.version.as_str(), socket.cipher.as_str()),
            ("1.3", "aes-gcm-128")
        );
    }

    #[test]
    fn one_protected_direction_is_not_both() {
        let line = "ESTAB 0 0 a:1 b:2 tcp-ulp-tls version: 1.3 cipher: aes-gcm-128 txconf: sw";
        assert!(!parse(line).unwrap().both_directions());
    }

    #[test]
    fn a_plain_socket_is_not_tls() {
        assert_eq!(
            parse("ESTAB 0 0 10.77.1.10:48062 10.77.2.10:8080 ino:1 cubic"),
            None
        );
    }
}
