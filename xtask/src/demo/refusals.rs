//! What must not get through, and its twin that must.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use ringfence_lab::mesh::{Mesh, Policy, Rule, TEST_PORT};
use ringfence_lab::probe::{Acceptor, Outcome, connect};
use ringfence_lab::topology::{Family, WEB_VIP};

use super::Demo;
use super::report::{Rows, seen};

impl Demo {
    /// An identity that the policy denies.
    pub fn policy_refusal(&mut self, rows: &mut Rows) {
        for family in Family::BOTH {
            rows.add(
                &format!(
                    "an identity the policy denies is refused, {}",
                    family.name()
                ),
                || {
                    let service = SocketAddr::new(family.of(WEB_VIP), TEST_PORT);
                    let mut server = Acceptor::start(&self.lab.pod("web")?.netns(), TEST_PORT)?;
                    let denied = self.attempt("intruder", service)?;
                    ensure!(denied.is_refusal(), "intruder got {denied:?}");
                    let allowed = self.attempt("client", service)?;
                    ensure!(
                        matches!(allowed, Outcome::Answered(_)),
                        "client got {allowed:?}"
                    );
                    let client = self.lab.pod("client")?.address(family);
                    only_peer(&mut server, client, self.patience)?;
                    seen(format!(
                        "intruder: {}; the server accepted 1 connection, client's",
                        describe(&denied)
                    ))
                },
            );
        }
    }

    /// Plaintext from outside the mesh, which the policy would admit: refused by STRICT,
    /// admitted by PERMISSIVE, and refused again.
    pub fn plaintext(&mut self, rows: &mut Rows) {
        rows.add("plaintext from outside is refused (STRICT)", || {
            self.lab.update_mesh(admit_outsiders)?;
            self.plaintext_is_refused()
        });
        rows.add("the same is accepted (PERMISSIVE)", || {
            self.lab.update_mesh(|mesh| set_mode(mesh, "PERMISSIVE"))?;
            for family in Family::BOTH {
                let mut server = Acceptor::start(&self.lab.pod("web")?.netns(), TEST_PORT)?;
                let target = SocketAddr::new(self.lab.pod("web")?.address(family), TEST_PORT);
                let outcome = self.attempt("outside", target)?;
                ensure!(
                    matches!(outcome, Outcome::Answered(_)),
                    "{}: {outcome:?}",
                    family.name()
                );
                let outside = self.lab.pod("outside")?.address(family);
                only_peer(&mut server, outside, self.patience)?;
            }
            seen("answered on IPv4 and IPv6; the server saw the outsider's address")
        });
        rows.add("and refused again (STRICT)", || {
            self.lab.update_mesh(|mesh| set_mode(mesh, "STRICT"))?;
            self.plaintext_is_refused()
        });
    }

    fn plaintext_is_refused(&self) -> Result<super::report::Observed> {
        let mut how = Vec::new();
        for family in Family::BOTH {
            let mut server = Acceptor::start(&self.lab.pod("web")?.netns(), TEST_PORT)?;
            let target = SocketAddr::new(self.lab.pod("web")?.address(family), TEST_PORT);
            let outcome = self.attempt("outside", target)?;
            ensure!(outcome.is_refusal(), "{}: {outcome:?}", family.name());
            ensure!(
                server.accepted().is_empty(),
                "the server accepted {:?}",
                server.accepted()
            );
            how.push(format!("{}: {}", family.name(), describe(&outcome)));
        }
        seen(format!("{}; the server accepted none", how.join(", ")))
    }

    fn attempt(&self, pod: &str, target: SocketAddr) -> Result<Outcome> {
        connect(
            &self.lab.pod(pod)?.netns(),
            target,
            b"hello\n",
            self.patience,
        )
    }
}

/// The server accepted exactly one connection, from that address. The one that must be
/// there came last, so that one that must not be there would be there, too.
fn only_peer(
    server: &mut Acceptor,
    address: std::net::IpAddr,
    patience: std::time::Duration,
) -> Result<()> {
    server
        .next(patience)
        .context("the server accepted nothing")?;
    let peers = server.accepted();
    ensure!(peers.len() == 1, "the server accepted {peers:?}");
    ensure!(
        peers.iter().all(|peer| peer.ip() == address),
        "the server saw {peers:?}, not {address}"
    );
    Ok(())
}

/// Any address may use the test port: what remains is the question of plaintext.
fn admit_outsiders(mesh: &mut Mesh) {
    let ip_blocks = vec!["10.77.0.0/16".to_owned(), "fd77::/16".to_owned()];
    mesh.policies.push(Policy {
        name: "anyone-may-use-the-test-port".into(),
        rules: vec![Rule {
            ip_blocks,
            ports: vec![TEST_PORT],
            ..Rule::default()
        }],
        ..Policy::clients_may_use_web()
    });
}

fn set_mode(mesh: &mut Mesh, mode: &str) {
    for entry in &mut mesh.peer_authentication {
        entry.mode = mode.to_owned();
    }
}

fn describe(outcome: &Outcome) -> String {
    match outcome {
        Outcome::NotConnected(kind) => format!("connect failed ({kind})"),
        Outcome::Closed(Some(kind)) => format!("closed without a byte ({kind})"),
        Outcome::Closed(None) => "closed without a byte".into(),
        Outcome::Silent => "no answer".into(),
        Outcome::Answered(_) => "answered".into(),
    }
}
