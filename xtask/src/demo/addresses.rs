//! Who each side believes to be talking to.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use ringfence_lab::probe::{Acceptor, Outcome, connect};
use ringfence_lab::process::wait_until;
use ringfence_lab::programs::{nginx_log, redis_log};
use ringfence_lab::topology::{Family, WEB_VIP};

use super::Demo;
use super::report::{Rows, seen};
use super::traffic::{curl, redis};
use ringfence_lab::mesh::TEST_PORT;

impl Demo {
    pub fn addresses(&mut self, rows: &mut Rows) {
        for family in Family::BOTH {
            rows.add(
                &format!("the server sees the client's address, {}", family.name()),
                || {
                    let client = self.lab.pod("client")?.address(family);
                    self.nginx_saw(family, client)?;
                    self.redis_saw(family, client)?;
                    seen(format!("the logs of nginx and redis say {client}"))
                },
            );
        }
        for family in Family::BOTH {
            rows.add(
                &format!(
                    "the client's getpeername is what it asked for, {}",
                    family.name()
                ),
                || {
                    let asked = SocketAddr::new(family.of(WEB_VIP), 8080);
                    let format = "%{remote_ip} %{remote_port}";
                    let told = curl(
                        &self.lab,
                        "client",
                        asked.ip(),
                        asked.port(),
                        "/",
                        &["-o", "/dev/null", "-w", format],
                    )?;
                    let told = String::from_utf8_lossy(&told).trim().to_owned();
                    ensure!(
                        told == format!("{} {}", asked.ip(), asked.port()),
                        "curl was told {told}"
                    );
                    let peer = self.own_probe(family)?;
                    seen(format!("{asked} to curl, {peer} to a socket of our own"))
                },
            );
        }
    }

    fn nginx_saw(&self, family: Family, client: IpAddr) -> Result<()> {
        let path = format!("/echo/who-{}", family.name());
        self.curl("client", family.of(WEB_VIP), 8080, &path)?;
        let log = nginx_log(&self.lab.pod_dir(self.lab.pod("web")?));
        // nginx writes the line after it has sent the answer.
        wait_until("nginx to log the request", self.patience, || {
            let text = std::fs::read_to_string(&log)?;
            let line = text
                .lines()
                .rfind(|line| line.ends_with(&path))
                .context("no such line")?
                .to_owned();
            ensure!(
                line.starts_with(&format!("{client} ")),
                "nginx logged {line:?}"
            );
            Ok(())
        })
    }

    fn redis_saw(&self, family: Family, client: IpAddr) -> Result<()> {
        let log = redis_log(&self.lab.pod_dir(self.lab.pod("web")?));
        let accepted = format!("Accepted {client}:");
        let count = || -> Result<usize> {
            Ok(std::fs::read_to_string(&log)?
                .lines()
                .filter(|line| line.contains(&accepted))
                .count())
        };
        let before = count()?;
        redis(&self.lab, "client", family.of(WEB_VIP), &["ping"])?;
        wait_until("redis to log the connection", self.patience, || {
            ensure!(
                count()? > before,
                "redis's log has no new line `{accepted}…`"
            );
            Ok(())
        })
    }

    /// The same by sockets of our own, with the server's view of the same connection.
    fn own_probe(&self, family: Family) -> Result<SocketAddr> {
        let asked = SocketAddr::new(family.of(WEB_VIP), TEST_PORT);
        let client = self.lab.pod("client")?;
        let mut server = Acceptor::start(&self.lab.pod("web")?.netns(), TEST_PORT)?;
        let outcome = connect(&client.netns(), asked, b"hello\n", self.patience)?;
        let Outcome::Answered(answered) = outcome else {
            anyhow::bail!("the probe got {outcome:?}")
        };
        ensure!(
            answered.peer == asked,
            "getpeername said {}, asked for was {asked}",
            answered.peer
        );
        ensure!(
            answered.local.ip() == client.address(family),
            "getsockname said {}, the pod has {}",
            answered.local,
            client.address(family)
        );
        let seen = server
            .next(self.patience)
            .context("the server accepted nothing")?;
        ensure!(seen.ip() == client.address(family), "the server saw {seen}");
        Ok(answered.peer)
    }
}
