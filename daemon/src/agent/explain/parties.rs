//! Who connects to whom, as the operator wrote it.

use std::net::IpAddr;
use std::sync::Arc;

use ringfence_identity::SpiffeId;
use ringfence_policies::Peer;

use super::{Unanswered, question};
use crate::agent::Agent;
use crate::agent::mesh::{Mesh, Reach, Workload};
use crate::agent::pods::Pod;
use crate::authz::report::ExplainRequest;

/// Who connects.
pub struct From {
    /// The verified identity and its number; none is plaintext.
    pub peer: Option<(u32, Arc<Peer>)>,
    pub source: IpAddr,
    pub notes: Vec<String>,
}

/// `NAME:PORT`, with the brackets of an IPv6 address taken off.
pub fn split_port(to: &str) -> Result<(&str, u16), Unanswered> {
    let expected = "expected NAMESPACE/NAME:PORT, ADDRESS:PORT or [ADDRESS]:PORT";
    let Some((name, port)) = to.rsplit_once(':') else {
        return question(format!("--to {to}: {expected}"));
    };
    let Ok(port) = port.parse() else {
        return question(format!("--to {to}: `{port}` is not a port; {expected}"));
    };
    match name.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        Some(Some(address)) => Ok((address, port)),
        None if !name.contains(':') && !name.is_empty() => Ok((name, port)),
        _ => question(format!("--to {to}: {expected}")),
    }
}

fn split_name(name: &str) -> Option<(&str, &str)> {
    let (namespace, name) = name.split_once('/')?;
    (!namespace.is_empty() && !name.is_empty() && !name.contains('/')).then_some((namespace, name))
}

/// The pod of this node that is meant.
pub fn destination(agent: &Agent, name: &str) -> Result<Arc<Pod>, Unanswered> {
    let mut pods = agent.pods.list().into_iter();
    let found = if let Ok(address) = name.parse::<IpAddr>() {
        let address = address.to_canonical();
        pods.find(|pod| {
            pod.workload()
                .is_some_and(|w| w.addresses.contains(&address))
        })
    } else if let Some((namespace, name)) = split_name(name) {
        pods.find(|pod| pod.config.namespace == namespace && pod.config.name == name)
    } else {
        return question(format!(
            "`{name}` is neither NAMESPACE/NAME nor an IP address"
        ));
    };
    match found {
        Some(pod) => Ok(pod),
        None => question(format!(
            "no enrolled pod {name} on this node: ask the agent of the node where it runs"
        )),
    }
}

/// Who is meant by the question. `named`: the destination, when it was given as an address.
pub fn parse_from(
    agent: &Agent,
    request: &ExplainRequest,
    named: Option<IpAddr>,
) -> Result<From, Unanswered> {
    let from = request.from.as_str();
    let source = request.source.map(|ip| ip.to_canonical());
    let mesh = agent.mesh();
    if let Ok(address) = from.parse::<IpAddr>() {
        let address = address.to_canonical();
        if source.is_some_and(|source| source != address) {
            return question("--from is an address already: leave --source out");
        }
        return Ok(From {
            peer: None,
            source: address,
            notes: about_plaintext(&mesh, address),
        });
    }
    let family = source.or(named).map(|address| address.is_ipv4());
    if from.starts_with("spiffe:") {
        let id = match SpiffeId::parse(from) {
            Ok(id) => id,
            Err(error) => return question(format!("--from {from}: {error}")),
        };
        let aliases = agent.trust.aliases();
        let holders = mesh
            .workloads()
            .values()
            .filter(|w| aliases.same(w.identity.spiffe_id(), &id));
        let mut addresses: Vec<IpAddr> = holders.flat_map(|w| w.addresses.clone()).collect();
        addresses.sort_unstable();
        let mut notes = Vec::new();
        let source = match source {
            Some(source) => {
                if !addresses.contains(&source) {
                    notes.push(format!(
                        "no workload with this identity has the address {source}: a peer that \
                         claims it is refused before any policy is asked"
                    ));
                }
                source
            }
            None => {
                addresses.retain(|a| family.is_none_or(|v4| a.is_ipv4() == v4));
                match pick(&addresses) {
                    Ok(source) => source,
                    Err(why) => return question(format!("--from {from}: {why}: give --source IP")),
                }
            }
        };
        return Ok(From {
            peer: Some(numbered(agent, &id)?),
            source,
            notes,
        });
    }
    let Some((namespace, name)) = split_name(from) else {
        return question(format!(
            "--from {from}: expected a SPIFFE ID, NAMESPACE/NAME or an IP address"
        ));
    };
    let Some(workload) = mesh.by_name(namespace, name) else {
        return question(format!(
            "--from {from}: the control plane announced no such workload"
        ));
    };
    let source = match source {
        Some(source) if workload.addresses.contains(&source) => source,
        Some(source) => return question(format!("{source} is not an address of {from}")),
        None => {
            let mut addresses = workload.addresses.clone();
            addresses.retain(|a| family.is_none_or(|v4| a.is_ipv4() == v4));
            match pick(&addresses) {
                Ok(source) => source,
                Err(why) => return question(format!("--from {from}: {why}")),
            }
        }
    };
    let (peer, notes) = through_mesh(agent, workload)?;
    Ok(From {
        peer,
        source,
        notes,
    })
}

type Numbered = (u32, Arc<Peer>);

fn through_mesh(
    agent: &Agent,
    workload: &Workload,
) -> Result<(Option<Numbered>, Vec<String>), Unanswered> {
    match workload.reach {
        Reach::Mesh => Ok((
            Some(numbered(agent, workload.identity.spiffe_id())?),
            Vec::new(),
        )),
        Reach::Direct => {
            let note = "the workload is not in the mesh: it connects in plaintext";
            Ok((None, vec![note.into()]))
        }
        Reach::Refused(why) => {
            let note = format!("this node cannot tell how the workload connects ({why})");
            Ok((
                Some(numbered(agent, workload.identity.spiffe_id())?),
                vec![note],
            ))
        }
    }
}

/// One address, or of several the IPv4 one.
fn pick(addresses: &[IpAddr]) -> Result<IpAddr, String> {
    match addresses {
        [] => Err("no address of the wanted family is known for it".into()),
        [one] => Ok(*one),
        [a, b] if a.is_ipv4() != b.is_ipv4() => Ok(if a.is_ipv4() { *a } else { *b }),
        several => Err(format!("{} addresses have it", several.len())),
    }
}

fn numbered(agent: &Agent, id: &SpiffeId) -> Result<Numbered, Unanswered> {
    let number = match agent.identities.number(id, &agent.trust.aliases()) {
        Ok(number) => number,
        Err(error) => return question(format!("{id}: {error}")),
    };
    match agent.identities.peer(number) {
        Some(peer) => Ok((number, peer)),
        None => question(format!("{id} has no number")),
    }
}

fn about_plaintext(mesh: &Mesh, source: IpAddr) -> Vec<String> {
    match mesh.by_address(source) {
        Some(workload) if workload.reach == Reach::Mesh => vec![format!(
            "{source} is the address of {}/{}, which connects through a tunnel, as {}: for that \
             use --from {}/{}",
            workload.namespace,
            workload.name,
            workload.identity.spiffe_id(),
            workload.namespace,
            workload.name
        )],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn destinations_are_split_at_the_port() {
        for (text, name, port) in [
            ("demo/web:80", "demo/web", 80),
            ("10.0.0.1:65535", "10.0.0.1", 65535),
            ("[fd00::1]:80", "fd00::1", 80),
        ] {
            assert_eq!(split_port(text).unwrap(), (name, port));
        }
        for bad in [
            "",
            "demo/web",
            "demo/web:",
            "demo/web:65536",
            "demo/web:-1",
            ":80",
            "fd00::1:80",
            "[fd00::1:80",
            "[]80",
        ] {
            assert!(split_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_of_several_addresses_is_never_guessed() {
        let ips =
            |text: &[&str]| -> Vec<IpAddr> { text.iter().map(|t| t.parse().unwrap()).collect() };
        assert_eq!(pick(&ips(&["10.0.0.1"])).unwrap(), ips(&["10.0.0.1"])[0]);
        assert_eq!(
            pick(&ips(&["10.0.0.1", "fd00::1"])).unwrap(),
            ips(&["10.0.0.1"])[0]
        );
        assert!(pick(&[]).is_err());
        assert!(pick(&ips(&["10.0.0.1", "10.0.0.2"])).is_err());
    }
}
