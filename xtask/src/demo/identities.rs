//! The certificates, as the peer saw them on the handshake.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use ringfence_lab::mesh::{TRUST_DOMAIN, principal};
use ringfence_lab::status::Handshake;
use ringfence_lab::topology::Family;

use super::Demo;
use super::report::{Rows, seen};
use super::traffic::text;
use super::wire::TUNNEL_PORT;

impl Demo {
    pub fn identities(&mut self, rows: &mut Rows) {
        for (pod, own, other) in [("client", "node-a", "node-b"), ("web", "node-b", "node-a")] {
            rows.add(&format!("the SVID of {pod}, as its peer saw it"), || {
                let shown = self.handshake_of(pod, own, other)?;
                // A server shows its certificate before it asks for ours.
                if pod == "web" {
                    self.openssl_saw(&shown)?;
                }
                let now = std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)?
                    .as_secs();
                let left = shown.not_after.checked_sub(now).context("it has expired")?;
                seen(format!(
                    "{}, issuer {}, serial {}, expires in {} min; {} with {}",
                    shown.peer,
                    shown.issuer,
                    shown.serial,
                    left / 60,
                    shown.cipher,
                    shown.key_exchange
                ))
            });
        }
    }

    /// A stranger's view of the server's certificate, by openssl.
    fn openssl_saw(&self, shown: &Handshake) -> Result<()> {
        let target = SocketAddr::new(self.lab.pod("web")?.address(Family::V4), TUNNEL_PORT);
        let script = format!(
            "openssl s_client -connect {target} -alpn ringfence/1 </dev/null 2>/dev/null | \
             openssl x509 -noout -serial -ext subjectAltName"
        );
        let mut shell = self.lab.command("outside", "sh")?;
        shell.args(["-c", &script]);
        let told = text(shell)?;
        let serial = format!("serial={}", shown.serial.to_uppercase());
        let name = format!("URI:{}", shown.peer);
        ensure!(
            told.lines().any(|line| line.trim() == serial)
                && told.lines().any(|line| line.trim() == name),
            "openssl saw {told:?}, not {serial} and {name}"
        );
        Ok(())
    }

    /// What the agent on `other` recorded of the peer `pod`; it must be the certificate that
    /// the agent on `own` holds for it.
    fn handshake_of(&self, pod: &str, own: &str, other: &str) -> Result<Handshake> {
        let id = format!("spiffe://{}", principal(pod));
        ensure!(id.starts_with(&format!("spiffe://{TRUST_DOMAIN}/")), "{id}");
        let status = self.lab.status(other)?;
        let shown = status
            .handshakes
            .iter()
            .find(|handshake| handshake.peer == id)
            .with_context(|| {
                format!(
                    "the agent on {other} has seen no handshake of {id}: {:?}",
                    status.handshakes
                )
            })?;
        let held = self.lab.status(own)?.svids;
        let svid = held
            .iter()
            .find(|svid| svid.id == id)
            .with_context(|| format!("the agent on {own} holds no SVID {id}"))?;
        ensure!(
            svid.serial == shown.serial,
            "the peer saw serial {}, the agent on {own} holds {}",
            shown.serial,
            svid.serial
        );
        Ok(shown.clone())
    }
}
