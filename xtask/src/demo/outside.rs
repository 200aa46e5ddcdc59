//! Destinations outside the mesh, where the agent must not be in the path.

use anyhow::{Result, ensure};
use ringfence_lab::status::Status;
use ringfence_lab::topology::{Family, LEGACY_VIP};

use super::Demo;
use super::report::{Rows, seen};

/// Counters that move when the agent or its redirection has to do with a connection.
const AGENT_COUNTERS: [&str; 3] = ["outbound_accepted", "inbound_accepted", "kernel.redirected"];
const DIRECT: &str = "kernel.direct";

impl Demo {
    pub fn outside_destinations(&mut self, rows: &mut Rows) {
        rows.add("a destination outside the mesh is direct", || {
            let before = self.both_agents()?;
            let mut requests = 0;
            for family in Family::BOTH {
                let legacy = self.lab.pod("legacy")?.address(family);
                for address in [legacy, family.of(LEGACY_VIP)] {
                    let body = self.curl("client", address, 8080, "/")?;
                    ensure!(
                        String::from_utf8_lossy(&body).contains("This is legacy"),
                        "{address} answered {:?}",
                        String::from_utf8_lossy(&body)
                    );
                    requests += 1;
                }
            }
            let after = self.both_agents()?;
            for (old, new) in before.iter().zip(&after) {
                for name in AGENT_COUNTERS {
                    let moved = new.counter(name).saturating_sub(old.counter(name));
                    ensure!(
                        moved == 0,
                        "{name} of the agent on {} moved by {moved}",
                        new.node
                    );
                }
            }
            let direct: u64 = before
                .iter()
                .zip(&after)
                .map(|(old, new)| new.counter(DIRECT).saturating_sub(old.counter(DIRECT)))
                .sum();
            ensure!(
                direct >= requests,
                "{DIRECT} moved by {direct} for {requests} requests"
            );
            seen(format!(
                "{requests} requests to address and service answered; {} stood still on both nodes",
                AGENT_COUNTERS.join(", ")
            ))
        });
    }

    fn both_agents(&self) -> Result<Vec<Status>> {
        self.lab
            .topology()
            .nodes
            .iter()
            .map(|node| self.lab.status(&node.name))
            .collect()
    }
}
