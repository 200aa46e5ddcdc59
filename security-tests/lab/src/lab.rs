//! Bringing a lab up, finding it again, changing its mesh, taking it down.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::mesh::Mesh;
use crate::netns::Netns;
use crate::process::{Ended, end, spawn_daemon, tail, wait_until};
use crate::programs;
use crate::status::Status;
use crate::topology::{NAMESPACE, Node, Pod, PodSpec, Role, Topology};

/// Which lab: several can be up at once, each with names of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabId {
    /// Folder below `/run` and below `/sys/fs/bpf`.
    pub folder: String,
    /// How the names of its network namespaces begin.
    pub prefix: String,
}

impl LabId {
    /// The lab of `cargo xtask lab`.
    pub fn hands_on() -> Self {
        LabId {
            folder: "ringfence-lab".into(),
            prefix: "rf-".into(),
        }
    }

    /// A lab for one run of `purpose`, beside the hands-on one. At most six letters.
    pub fn for_run_of(purpose: &str) -> Self {
        LabId {
            folder: format!("ringfence-lab-{purpose}"),
            prefix: format!("rf{purpose}-"),
        }
    }

    pub fn dir(&self) -> PathBuf {
        Path::new("/run").join(&self.folder)
    }

    pub fn pin_dir(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.folder)
    }
}

/// The agents' choice of record layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecordLayer {
    Auto,
    Kernel,
    Software,
}

/// What to bring up.
#[derive(Clone, Debug)]
pub struct LabConfig {
    pub id: LabId,
    pub nodes: usize,
    pub pods: Vec<PodSpec>,
    /// The `ringfence` program; `None` is a network without a mesh.
    pub binary: Option<PathBuf>,
    pub record_layer: RecordLayer,
    /// Size of the file `/blob` that each nginx serves.
    pub blob_bytes: u64,
    /// How long the agents may take to become ready.
    pub patience: Duration,
    /// The agents' and control plane's log filter.
    pub log: String,
    /// Life time of the certificates that the CA issues, as in the mesh file.
    pub svid_ttl: String,
}

impl LabConfig {
    pub fn new(id: LabId, binary: Option<PathBuf>) -> Self {
        LabConfig {
            id,
            nodes: 2,
            pods: PodSpec::defaults(2),
            binary,
            record_layer: RecordLayer::Auto,
            blob_bytes: 1 << 20,
            patience: Duration::from_secs(60),
            log: "info".into(),
            svid_ttl: "24h".into(),
        }
    }
}

/// A lab that is up. Dropping the value leaves it up: see [`down`].
#[derive(Debug)]
pub struct Lab {
    record: Record,
    /// Processes that this value started, kept so that they are reaped.
    children: Vec<Child>,
}

/// What is remembered in `lab.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    id: LabId,
    topology: Topology,
    binary: Option<PathBuf>,
    record_layer: RecordLayer,
    log: String,
    mesh: Option<Mesh>,
    /// Process ids of `control-plane` and of each node's agent, by name.
    processes: Vec<(String, i32)>,
}

const CONTROL_PLANE: &str = "control-plane";

impl Lab {
    /// Brings a lab up and returns when every agent is ready. What an earlier, crashed lab
    /// of the same name left is removed first; a lab that is up is an error.
    pub fn up(config: &LabConfig) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces: run it as root"
        );
        let id = &config.id;
        let _lock = lock(id)?;
        if let Ok(lab) = Self::open(id)
            && lab.is_running()
        {
            bail!(
                "this lab is up already: `cargo xtask lab status`, or `cargo xtask lab down` first"
            );
        }
        remove(id)?;
        match Self::build(config) {
            Ok(lab) => Ok(lab),
            Err(error) => {
                // The logs go with the folder; the error has their ends.
                remove(id).context("cleaning up after a failed start")?;
                Err(error)
            }
        }
    }

    /// The lab that is up under that name.
    pub fn open(id: &LabId) -> Result<Self> {
        let path = id.dir().join("lab.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("no lab is up ({}): `cargo xtask lab up`", path.display()))?;
        let record = serde_json::from_str(&text).with_context(|| {
            format!(
                "{} is not of this version: `cargo xtask lab down`",
                path.display()
            )
        })?;
        Ok(Lab {
            record,
            children: Vec::new(),
        })
    }

    fn build(config: &LabConfig) -> Result<Self> {
        let dir = config.id.dir();
        std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let topology = Topology::new(&config.id.prefix, config.nodes, config.pods.clone())?;
        topology.build()?;
        let mut lab = Lab {
            record: Record {
                id: config.id.clone(),
                topology,
                binary: config.binary.clone(),
                record_layer: config.record_layer,
                log: config.log.clone(),
                mesh: None,
                processes: Vec::new(),
            },
            children: Vec::new(),
        };
        for pod in lab.topology().pods.clone() {
            let started = programs::start(&pod, &lab.pod_dir(&pod), config.blob_bytes)?;
            lab.children.extend(started);
        }
        if lab.record.binary.is_some() {
            lab.write_mesh_files(&config.svid_ttl)?;
            lab.start_control_plane(config.patience)?;
            for node in lab.topology().nodes.clone() {
                lab.start_agent(&node.name)?;
            }
            lab.wait_ready(config.patience)?;
        }
        lab.save()?;
        Ok(lab)
    }

    pub fn id(&self) -> &LabId {
        &self.record.id
    }

    pub fn dir(&self) -> PathBuf {
        self.record.id.dir()
    }

    pub fn topology(&self) -> &Topology {
        &self.record.topology
    }

    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.topology().pod(name)
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        self.topology().node(name)
    }

    /// Where the pod's programs have their files and logs.
    pub fn pod_dir(&self, pod: &Pod) -> PathBuf {
        self.dir().join("pods").join(pod.name())
    }

    pub fn mesh_file(&self) -> PathBuf {
        self.dir().join("mesh.yaml")
    }

    pub fn agent_config(&self, node: &str) -> PathBuf {
        self.dir().join(format!("{node}.yaml"))
    }

    /// The kernel's verdicts on a node, as its agent writes them down.
    pub fn audit_log(&self, node: &str) -> PathBuf {
        self.dir().join(format!("{node}.audit.jsonl"))
    }

    pub fn agent_socket(&self, node: &str) -> PathBuf {
        self.dir().join(format!("{node}.sock"))
    }

    /// Log of `control-plane` or of a node's agent.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{name}.log"))
    }

    /// A command that will run in a pod.
    pub fn command(&self, pod: &str, program: &str) -> Result<Command> {
        self.pod(pod)?.netns().command(program)
    }

    /// What the agent of a node says of itself.
    pub fn status(&self, node: &str) -> Result<Status> {
        Status::of(self.binary()?, &self.agent_socket(node))
    }

    /// Process id of `control-plane` or of a node's agent.
    pub fn process(&self, name: &str) -> Result<i32> {
        let found = self
            .record
            .processes
            .iter()
            .find(|(known, _)| known == name);
        found
            .map(|(_, pid)| *pid)
            .with_context(|| format!("{name} is not running"))
    }

    pub fn mesh(&self) -> Result<&Mesh> {
        self.record.mesh.as_ref().context("this lab has no mesh")
    }

    /// Changes the mesh file and returns when every agent has what is in it.
    pub fn update_mesh(&mut self, change: impl FnOnce(&mut Mesh)) -> Result<()> {
        let mut mesh = self.mesh()?.clone();
        change(&mut mesh);
        mesh.revision += 1;
        mesh.write(&self.mesh_file())?;
        let marker = mesh.revision_marker();
        self.record.mesh = Some(mesh);
        self.save()?;
        for node in &self.topology().nodes {
            wait_until(
                &format!("{} to have the changed mesh", node.name),
                Duration::from_secs(30),
                || {
                    let status = self.status(&node.name)?;
                    ensure!(
                        status.policies.iter().any(|policy| policy.name == marker),
                        "it has {:?}, without {marker}; control plane log:\n{}",
                        status.policies,
                        tail(&self.log(CONTROL_PLANE), 5)
                    );
                    Ok(())
                },
            )?;
        }
        Ok(())
    }

    /// Starts the control plane and waits for its CA.
    pub fn start_control_plane(&mut self, patience: Duration) -> Result<()> {
        let node = self.control_plane_node()?.clone();
        let mut command = node.netns().command(self.binary()?)?;
        command
            .args(["--log", &self.record.log, "control-plane", "--config"])
            .arg(self.mesh_file());
        self.start(CONTROL_PLANE, command)?;
        let root = self.root_certificate();
        wait_until("the control plane's root certificate", patience, || {
            self.ensure_alive(CONTROL_PLANE)?;
            ensure!(root.is_file(), "{} is not there", root.display());
            Ok(())
        })
    }

    /// Starts the agent of a node, which need not be ready on return.
    pub fn start_agent(&mut self, node: &str) -> Result<()> {
        let netns = self.node(node)?.netns();
        let mut command = netns.command(self.binary()?)?;
        command
            .args(["--log", &self.record.log, "agent", "--config"])
            .arg(self.agent_config(node));
        self.start(node, command)
    }

    /// Ends `control-plane` or a node's agent.
    pub fn stop(&mut self, name: &str, grace: Duration) -> Result<()> {
        let pid = self.process(name)?;
        end(&[pid], grace)?;
        self.record.processes.retain(|(known, _)| known != name);
        self.save()
    }

    /// Returns when every agent is ready.
    pub fn wait_ready(&self, patience: Duration) -> Result<()> {
        for node in &self.topology().nodes {
            wait_until(&format!("the agent of {}", node.name), patience, || {
                self.ensure_alive(&node.name)?;
                let status = self.status(&node.name)?;
                ensure!(status.ready, "{}", status.why_not_ready());
                Ok(())
            })
            .map_err(|error| {
                if error.is::<Ended>() {
                    return error;
                }
                let log = self.log(&node.name);
                error.context(format!("the end of {}:\n{}", log.display(), tail(&log, 20)))
            })?;
        }
        Ok(())
    }

    /// Whether the control plane and every agent run.
    pub fn is_running(&self) -> bool {
        !self.record.processes.is_empty()
            && self
                .record
                .processes
                .iter()
                .all(|(name, _)| self.ensure_alive(name).is_ok())
    }

    /// Where the CA puts its root certificate.
    pub fn root_certificate(&self) -> PathBuf {
        self.dir().join("ca/root-cert.pem")
    }

    /// Takes the lab down.
    pub fn down(self) -> Result<()> {
        down(&self.record.id)
    }

    fn binary(&self) -> Result<&Path> {
        self.record
            .binary
            .as_deref()
            .context("this lab has no mesh")
    }

    fn control_plane_node(&self) -> Result<&Node> {
        self.topology().nodes.first().context("a lab without nodes")
    }

    fn start(&mut self, name: &str, command: Command) -> Result<()> {
        let child = spawn_daemon(command, &self.log(name))?;
        let pid = i32::try_from(child.id())?;
        self.record.processes.retain(|(known, _)| known != name);
        self.record.processes.push((name.to_owned(), pid));
        self.children.push(child);
        self.save()
    }

    fn ensure_alive(&self, name: &str) -> Result<()> {
        let pid = self.process(name)?;
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // An ended process has no command line; a stranger with the number has another.
        let ours = command.split(|byte| *byte == 0).next()
            == Some(self.binary()?.as_os_str().as_encoded_bytes());
        if ours {
            return Ok(());
        }
        let log = self.log(name);
        Err(Ended(format!(
            "{name} has ended; the end of {}:\n{}",
            log.display(),
            tail(&log, 20)
        ))
        .into())
    }

    fn write_mesh_files(&mut self, svid_ttl: &str) -> Result<()> {
        let dir = self.dir();
        for node in &self.topology().nodes {
            write_secret(&dir.join(format!("{}.token", node.name)), &random_token()?)?;
            std::fs::write(self.agent_config(&node.name), self.agent_yaml(node)?)?;
        }
        let listen = IpAddr::from(self.control_plane_node()?.addresses.0);
        let mesh = Mesh {
            svid_ttl: svid_ttl.to_owned(),
            ..Mesh::of(self.topology(), listen, &dir)
        };
        mesh.write(&self.mesh_file())?;
        self.record.mesh = Some(mesh);
        Ok(())
    }

    fn agent_yaml(&self, node: &Node) -> Result<String> {
        let dir = self.dir();
        let control_plane = self.control_plane_node()?.addresses.0;
        let record_layer = match self.record.record_layer {
            RecordLayer::Auto => "auto",
            RecordLayer::Kernel => "kernel",
            RecordLayer::Software => "software",
        };
        let mut pods = String::new();
        for pod in &self.topology().pods {
            if pod.spec.role == Role::Mesh && self.topology().node_of(pod)? == node {
                pods.push_str(&format!(
                    "  - {{netns: {}, namespace: {NAMESPACE}, name: {}}}\n",
                    pod.netns().path().display(),
                    pod.name()
                ));
            }
        }
        let pods = if pods.is_empty() {
            "pods: []\n".to_owned()
        } else {
            format!("pods:\n{pods}")
        };
        Ok(format!(
            "node: {{name: {name}, address: {address}}}
control_plane:
  address: \"https://{control_plane}:15012\"
  root_ca: {root}
  token: {token}
{pods}record_layer: {record_layer}
audit: {{verdicts: all, path: {audit}}}
admin_socket: {socket}
pin_dir: {pin}
",
            name = node.name,
            address = node.addresses.0,
            root = self.root_certificate().display(),
            token = dir.join(format!("{}.token", node.name)).display(),
            audit = self.audit_log(&node.name).display(),
            socket = self.agent_socket(&node.name).display(),
            pin = self.record.id.pin_dir().join(&node.name).display(),
        ))
    }

    fn save(&self) -> Result<()> {
        let path = self.dir().join("lab.json");
        let fresh = self.dir().join("lab.json.new");
        std::fs::write(&fresh, serde_json::to_vec_pretty(&self.record)?)?;
        std::fs::rename(&fresh, &path).with_context(|| format!("writing {}", path.display()))
    }
}

/// Removes a lab, or what a crashed one left: its processes, namespaces, pinned BPF objects
/// and files. Nothing to remove is no error.
pub fn down(id: &LabId) -> Result<()> {
    let _lock = lock(id)?;
    remove(id)
}

/// The lab's own namespaces, by what its record says or, without one, by name.
fn remove(id: &LabId) -> Result<()> {
    let namespaces: Vec<Netns> = Netns::names_with_prefix(&id.prefix)
        .iter()
        .map(|name| Netns::named(name))
        .collect();
    let processes: Vec<i32> = namespaces.iter().flat_map(Netns::processes).collect();
    end(&processes, Duration::from_secs(5))?;
    for netns in &namespaces {
        netns.delete()?;
    }
    for dir in [id.pin_dir(), id.dir()] {
        match std::fs::remove_dir_all(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("removing {}", dir.display())),
        }
    }
    Ok(())
}

/// One command at a time works on a lab.
fn lock(id: &LabId) -> Result<Flock<File>> {
    let path = Path::new("/run").join(format!("{}.lock", id.folder));
    let file = File::create(&path)
        .with_context(|| format!("creating {}: are you root?", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("locking {}", path.display()))
}

fn random_token() -> Result<String> {
    let mut bytes = [0u8; 24];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("writing {}", path.display()))
}
