//! Who lives where: nodes, pods, and the addresses that follow from their numbers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::netns::Netns;

/// Namespace of every pod of the lab.
pub const NAMESPACE: &str = "demo";
/// Virtual addresses of the service `web`.
pub const WEB_VIP: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(10, 96, 0, 10),
    Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x10),
);
/// Virtual addresses of the service `legacy`, whose backend is outside the mesh.
pub const LEGACY_VIP: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(10, 96, 0, 20),
    Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x20),
);

/// What a pod is to the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Enrolled, with an identity.
    Mesh,
    /// Known to the control plane, and reached without the mesh.
    Legacy,
    /// Unknown to the control plane.
    Outside,
}

/// A pod to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    pub name: String,
    /// Index of its node, from 0.
    pub node: usize,
    pub role: Role,
    /// nginx on 8080, redis on 6379 and iperf3 on 5201 (`legacy`: nginx and iperf3).
    pub serves: bool,
    /// The label `app`, by which services and policies select.
    pub app: String,
}

/// A node of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    pub addresses: (Ipv4Addr, Ipv6Addr),
    pub netns_name: String,
}

/// A pod of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    #[serde(flatten)]
    pub spec: PodSpec,
    pub addresses: (Ipv4Addr, Ipv6Addr),
    pub netns_name: String,
}

/// Nodes and pods with their addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    pub nodes: Vec<Node>,
    pub pods: Vec<Pod>,
}

impl Node {
    pub fn netns(&self) -> Netns {
        Netns::named(&self.netns_name)
    }

    /// The letter of a node's name, as in `node-a`.
    pub fn letter(&self) -> &str {
        self.name.rsplit('-').next().unwrap_or(&self.name)
    }
}

impl Pod {
    pub fn netns(&self) -> Netns {
        Netns::named(&self.netns_name)
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    pub fn address(&self, family: Family) -> IpAddr {
        family.of(self.addresses)
    }
}

/// An address family, for tests that run once with each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    pub fn of(self, addresses: (Ipv4Addr, Ipv6Addr)) -> IpAddr {
        match self {
            Family::V4 => addresses.0.into(),
            Family::V6 => addresses.1.into(),
        }
    }

    pub fn loopback(self) -> IpAddr {
        match self {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }

    /// `IPv4` or `IPv6`.
    pub fn name(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }
}

impl PodSpec {
    /// The pods of a lab when none are named: clients on the first node, servers on the
    /// second, one more server on each further node, and one outsider on each node.
    pub fn defaults(nodes: usize) -> Vec<PodSpec> {
        let mut pods = vec![
            Self::of_name("client", 0),
            Self::of_name("intruder", 0),
            Self::of_name("outside", 0),
            Self::of_name("web", 1),
            Self::of_name("legacy", 1),
            Self::of_name("outside-b", 1),
        ];
        for (node, letter) in (2..nodes).zip(["c", "d"]) {
            pods.push(Self::of_name(&format!("web-{letter}"), node));
            pods.push(Self::of_name(&format!("outside-{letter}"), node));
        }
        pods
    }

    /// Parses `name[@node],…`; a node is a letter or a full name. The names `web…`,
    /// `legacy…` and `outside…` have their roles, every other name is a client.
    pub fn parse_list(text: &str, nodes: usize) -> Result<Vec<PodSpec>> {
        let pods: Vec<PodSpec> = text
            .split(',')
            .map(|item| Self::parse(item.trim(), nodes))
            .collect::<Result<_>>()?;
        for (index, pod) in pods.iter().enumerate() {
            ensure!(
                !pods.iter().take(index).any(|other| other.name == pod.name),
                "pod {} is named twice",
                pod.name
            );
        }
        Ok(pods)
    }

    fn parse(item: &str, nodes: usize) -> Result<PodSpec> {
        let (name, node) = item.split_once('@').unwrap_or((item, ""));
        ensure!(
            !name.is_empty()
                && name.len() <= 10
                && name
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'),
            "`{name}` cannot be a pod's name: one to ten of a-z, 0-9 and `-`"
        );
        let serves = name.starts_with("web") || name.starts_with("legacy");
        let node = match node.strip_prefix("node-").unwrap_or(node) {
            "" => usize::from(serves),
            letter => ["a", "b", "c", "d"]
                .iter()
                .take(nodes)
                .position(|known| *known == letter)
                .with_context(|| {
                    format!("`{item}`: there is no node {letter} among {nodes} nodes")
                })?,
        };
        Ok(Self::of_name(name, node))
    }

    fn of_name(name: &str, node: usize) -> PodSpec {
        let role = match name {
            _ if name.starts_with("legacy") => Role::Legacy,
            _ if name.starts_with("outside") => Role::Outside,
            _ => Role::Mesh,
        };
        let web = name == "web" || name.starts_with("web-");
        PodSpec {
            name: name.to_owned(),
            node,
            role,
            serves: web || role == Role::Legacy,
            app: if web {
                "web".to_owned()
            } else {
                name.to_owned()
            },
        }
    }
}

impl Topology {
    /// Gives each node and pod its addresses. `prefix` begins every namespace's name.
    pub fn new(prefix: &str, nodes: usize, pods: Vec<PodSpec>) -> Result<Self> {
        ensure!(
            (2..=4).contains(&nodes),
            "a lab has 2 to 4 nodes, not {nodes}"
        );
        let made = ["a", "b", "c", "d"]
            .iter()
            .take(nodes)
            .zip(1u8..)
            .map(|(letter, number)| Node {
                name: format!("node-{letter}"),
                addresses: (
                    Ipv4Addr::new(10, 77, 0, number),
                    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into()),
                ),
                netns_name: format!("{prefix}node-{letter}"),
            })
            .collect();
        let mut used = vec![0u8; nodes];
        let mut placed = Vec::new();
        for spec in pods {
            let Some(used) = used.get_mut(spec.node) else {
                bail!("pod {} is on a node that does not exist", spec.name);
            };
            ensure!(*used < 200, "too many pods on one node");
            *used += 1;
            let (node, host) = (u8::try_from(spec.node)? + 1, *used + 9);
            placed.push(Pod {
                addresses: (
                    Ipv4Addr::new(10, 77, node, host),
                    Ipv6Addr::new(0xfd77, node.into(), 0, 0, 0, 0, 0, host.into()),
                ),
                netns_name: format!("{prefix}{}", spec.name),
                spec,
            });
        }
        Ok(Topology {
            nodes: made,
            pods: placed,
        })
    }

    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods
            .iter()
            .find(|pod| pod.name() == name)
            .with_context(|| {
                let names: Vec<&str> = self.pods.iter().map(Pod::name).collect();
                format!("there is no pod {name}: the lab has {}", names.join(", "))
            })
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| format!("there is no node {name}"))
    }

    pub fn node_of(&self, pod: &Pod) -> Result<&Node> {
        self.nodes
            .get(pod.spec.node)
            .with_context(|| format!("pod {} has no node", pod.name()))
    }

    /// Makes the namespaces, the links and the routes.
    pub fn build(&self) -> Result<()> {
        for node in &self.nodes {
            let netns = Netns::create(&node.netns_name)?;
            netns.sysctl("net/ipv4/ip_forward", "1")?;
            netns.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        }
        for (index, node) in self.nodes.iter().enumerate() {
            for other in self.nodes.iter().skip(index + 1) {
                self.join(node, other)?;
            }
        }
        self.pods.iter().try_for_each(|pod| self.attach(pod))
    }

    /// The interface of a node towards another.
    pub fn wire(&self, towards: &Node) -> String {
        format!("to-{}", towards.letter())
    }

    fn join(&self, one: &Node, two: &Node) -> Result<()> {
        one.netns().ip(&[format!(
            "link add {} type veth peer name {} netns {}",
            self.wire(two),
            self.wire(one),
            two.netns_name
        )])?;
        for (node, other) in [(one, two), (two, one)] {
            let wire = self.wire(other);
            let index = self
                .nodes
                .iter()
                .position(|n| n == other)
                .unwrap_or_default()
                + 1;
            let (own4, own6) = node.addresses;
            let (far4, far6) = other.addresses;
            node.netns().ip(&[
                format!("link set {wire} up"),
                format!("address add {own4} peer {far4} dev {wire}"),
                format!("address add {own6} peer {far6} dev {wire} nodad"),
                format!("route add 10.77.{index}.0/24 via {far4} dev {wire} src {own4}"),
                format!("route add fd77:{index}::/64 via {far6} dev {wire} src {own6} onlink"),
            ])?;
        }
        Ok(())
    }

    fn attach(&self, pod: &Pod) -> Result<()> {
        let node = self.node_of(pod)?;
        let netns = Netns::create(&pod.netns_name)?;
        let host_end = format!("pod-{}", pod.name());
        let (pod4, pod6) = pod.addresses;
        let (node4, _) = node.addresses;
        node.netns().ip(&[
            format!(
                "link add {host_end} type veth peer name eth0 netns {}",
                pod.netns_name
            ),
            format!("link set {host_end} up"),
            // One gateway address for all pods; the IPv4 one is the node's own.
            format!("address add fe80::1/64 dev {host_end} nodad"),
            format!("route add {pod4}/32 dev {host_end} src {node4}"),
            format!("route add {pod6}/128 dev {host_end}"),
        ])?;
        netns.ip(&[
            "link set eth0 up".to_owned(),
            format!("address add {pod4}/32 dev eth0"),
            format!("address add {pod6}/128 dev eth0 nodad"),
            format!("route add {node4}/32 dev eth0 src {pod4}"),
            format!("route add default via {node4} dev eth0 src {pod4}"),
            format!("route add default via fe80::1 dev eth0 src {pod6}"),
        ])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses_follow_from_node_and_position() {
        let topology = Topology::new("rf-", 2, PodSpec::defaults(2)).unwrap();
        let web = topology.pod("web").unwrap();
        assert_eq!(web.addresses.0, Ipv4Addr::new(10, 77, 2, 10));
        assert_eq!(web.addresses.1, "fd77:2::a".parse::<Ipv6Addr>().unwrap());
        assert_eq!(topology.node_of(web).unwrap().name, "node-b");
    }

    #[test]
    fn a_list_of_pods_names_nodes_by_letter_or_name() {
        let pods = PodSpec::parse_list("alice@b, web@node-a,outside", 2).unwrap();
        let nodes: Vec<usize> = pods.iter().map(|pod| pod.node).collect();
        assert_eq!(nodes, [1, 0, 0]);
        assert_eq!(pods.last().unwrap().role, Role::Outside);
    }

    #[test]
    fn a_pod_on_an_unknown_node_is_refused() {
        assert!(PodSpec::parse_list("web@c", 2).is_err());
    }

    #[test]
    fn a_pod_named_twice_is_refused() {
        assert!(PodSpec::parse_list("web,web", 2).is_err());
    }

    #[test]
    fn five_nodes_are_refused() {
        assert!(Topology::new("rf-", 5, Vec::new()).is_err());
    }
}
