//! The agent's configuration file.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

/// `ringfence agent --config`: one YAML file. Unknown fields are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// This node.
    pub node: Node,
    /// Where certificates and policies come from.
    pub control_plane: ControlPlane,
    /// The namespace whose policies are global, and whose name the static strict policy has.
    #[serde(default = "default_root_namespace")]
    pub root_namespace: String,
    /// The pods to enrol.
    #[serde(default)]
    pub pods: Vec<PodConfig>,
    /// Where certificates come from and how peers are verified.
    #[serde(default)]
    pub identity: Identity,
    /// How long new connections wait for a policy that their workload names and that has
    /// not arrived, in seconds; then they are refused. 0: they do not wait.
    #[serde(default = "default_policy_hold")]
    pub policy_hold_seconds: u64,
    /// Where pods may connect to. Followed while the agent runs.
    #[serde(default)]
    pub egress: Egress,
    /// What becomes of a pod whose packets cannot be guarded at the host side.
    #[serde(default)]
    pub packet_guard: PacketGuard,
    /// Which record layer protects tunnels.
    #[serde(default)]
    pub record_layer: RecordLayerChoice,
    /// Which of the kernel's verdicts are written down, and where.
    #[serde(default)]
    pub audit: Audit,
    /// Unix socket of `ringfence status`.
    #[serde(default = "default_admin_socket")]
    pub admin_socket: PathBuf,
    /// Folder in bpffs for links and maps.
    #[serde(default = "default_pin_dir")]
    pub pin_dir: PathBuf,
    /// Root of the cgroup v2 hierarchy; found in the mount table when absent.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
}

/// Identification of this node towards the control plane.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Name, as the control plane knows it.
    pub name: String,
    /// The agent's own address, for the xDS node id.
    pub address: IpAddr,
    /// Network of this node's workloads; empty is the default network.
    #[serde(default)]
    pub network: String,
    /// Cluster id (`clusterid` header).
    #[serde(default = "default_cluster")]
    pub cluster: String,
    /// The agent's own pod.
    #[serde(default = "default_agent_name")]
    pub pod_name: String,
    /// Namespace of the agent's own pod; must match the token.
    #[serde(default = "default_root_namespace")]
    pub pod_namespace: String,
}

/// Istiod, or `ringfence control-plane`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlPlane {
    /// `https://host:port` of xDS.
    pub address: String,
    /// `https://host:port` of the CA when it is another one.
    #[serde(default)]
    pub ca_address: Option<String>,
    /// PEM file with the roots that its server certificate chains to.
    pub root_ca: PathBuf,
    /// File with this node's bearer token; read again for each request.
    pub token: PathBuf,
    /// Life time asked for certificates, in seconds.
    #[serde(default = "default_ttl")]
    pub svid_ttl_seconds: u64,
}

impl ControlPlane {
    /// Where certificates are signed.
    pub fn ca(&self) -> &str {
        self.ca_address.as_deref().unwrap_or(&self.address)
    }

    /// Life time asked for certificates.
    pub fn svid_ttl(&self) -> Duration {
        Duration::from_secs(self.svid_ttl_seconds)
    }
}

/// Certificates: their source, and what peers must show.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Where SVIDs come from.
    #[serde(default)]
    pub source: Source,
    /// Alias of a trust domain → the domain it stands for. Policies name the latter.
    #[serde(default)]
    pub trust_domain_aliases: BTreeMap<String, String>,
    /// Revocation lists. A trust domain with one here is closed while none is valid.
    #[serde(default)]
    pub revocation_lists: Vec<RevocationList>,
    /// Which key exchanges are acceptable.
    #[serde(default)]
    pub key_exchange: KeyExchange,
    /// Unix socket on which enrolled pods get SVIDs of their own (SPIFFE Workload API).
    #[serde(default)]
    pub workload_api_socket: Option<PathBuf>,
}

/// Where SVIDs come from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The CA of `control_plane`: Istiod's, or the embedded one.
    #[default]
    Ca,
    /// PEM files on disk, watched.
    Files(Files),
    /// A SPIRE agent that lets us act for the node's workloads (Delegated Identity API).
    Spire(Spire),
    /// The SVID that a SPIFFE Workload API gives to this process: a host with one workload.
    WorkloadApi(WorkloadApi),
}

/// `tls.crt`, `tls.key` and `ca.crt` in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The folder.
    pub directory: PathBuf,
    /// Folder of an identity below it, for example `{namespace}/{service_account}`; without
    /// it the directory holds the files of the one identity there is.
    #[serde(default)]
    pub folder: Option<String>,
}

/// SPIRE's Delegated Identity API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spire {
    /// The SPIRE agent's admin socket.
    pub socket: PathBuf,
    /// Selectors of a workload; by namespace and service account when absent.
    #[serde(default)]
    pub selectors: Option<Vec<String>>,
}

/// A SPIFFE Workload API to ask.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadApi {
    /// Its socket.
    pub socket: PathBuf,
}

/// One file of revocation lists.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevocationList {
    /// Whose peers it concerns.
    pub trust_domain: String,
    /// PEM (any number of lists) or DER (one). Read again when it changes.
    pub file: PathBuf,
}

/// Which key exchanges are acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyExchange {
    /// X25519MLKEM768 first, classical ones with a peer that lacks it.
    #[default]
    PreferPostQuantum,
    /// X25519MLKEM768 or no connection.
    RequirePostQuantum,
}

/// Outbound modes: one for the node, and others for namespaces and workloads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Egress {
    /// For whatever `overrides` does not name.
    #[serde(default)]
    pub mode: OutboundMode,
    /// The most specific one counts.
    #[serde(default)]
    pub overrides: Vec<EgressOverride>,
}

/// The outbound mode of a namespace, or of one workload in it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressOverride {
    /// The namespace.
    pub namespace: String,
    /// The workload; all of the namespace when absent.
    #[serde(default)]
    pub name: Option<String>,
    /// Its mode.
    pub mode: OutboundMode,
}

/// What a pod may connect to besides the workloads and services of the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutboundMode {
    /// Anything; in plaintext.
    #[default]
    AllowAny,
    /// Nothing: an address, or a port of a service, that the control plane has not
    /// announced is refused.
    RegistryOnly,
}

impl Egress {
    /// The mode of a workload.
    pub fn mode(&self, namespace: &str, name: &str) -> OutboundMode {
        let of = |wanted: Option<&str>| {
            self.overrides
                .iter()
                .find(|o| o.namespace == namespace && o.name.as_deref() == wanted)
        };
        of(Some(name))
            .or_else(|| of(None))
            .map_or(self.mode, |found| found.mode)
    }
}

/// What becomes of a pod that has a device without a host side on this node (macvlan,
/// ipvlan, SR-IOV, host network).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PacketGuard {
    /// It is served; `ringfence status` says that its guard is off, and why.
    #[default]
    Auto,
    /// It is held: it connects to nothing and nothing is admitted.
    Require,
}

/// The audit log: one JSON object a line.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// Which verdicts.
    #[serde(default)]
    pub verdicts: AuditedVerdicts,
    /// The file; standard output when absent.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Size at which a file is put aside as `path.1`, which becomes `path.2`, and so on.
    #[serde(default = "default_audit_megabytes")]
    pub max_megabytes: u64,
    /// Files kept, the current one included.
    #[serde(default = "default_audit_files")]
    pub files: u32,
}

impl Default for Audit {
    fn default() -> Self {
        Audit {
            verdicts: AuditedVerdicts::default(),
            path: None,
            max_megabytes: default_audit_megabytes(),
            files: default_audit_files(),
        }
    }
}

impl Audit {
    /// Where it goes, for messages.
    pub fn name(&self) -> String {
        match &self.path {
            Some(path) => path.display().to_string(),
            None => "on standard output".into(),
        }
    }
}

/// Which verdicts the audit log has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuditedVerdicts {
    /// None. `ringfence authz log` and the metrics have them all the same.
    #[default]
    Off,
    /// Refusals.
    Denied,
    /// All.
    All,
}

/// A pod to enrol, known by its network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodConfig {
    /// Path of the network namespace, for example `/run/netns/web`.
    pub netns: PathBuf,
    /// Namespace of the workload.
    pub namespace: String,
    /// Name of the workload.
    pub name: String,
}

/// Operator's choice of the record layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecordLayerChoice {
    /// The kernel when it can, software otherwise (status says why).
    #[default]
    Auto,
    /// The kernel, or the agent does not start.
    Kernel,
    /// Software, also where the kernel could.
    Software,
}

fn default_root_namespace() -> String {
    "ringfence-system".into()
}
fn default_policy_hold() -> u64 {
    5
}
fn default_audit_megabytes() -> u64 {
    64
}
fn default_audit_files() -> u32 {
    5
}
fn default_cluster() -> String {
    "Kubernetes".into()
}
fn default_agent_name() -> String {
    "ringfence".into()
}
fn default_admin_socket() -> PathBuf {
    "/run/ringfence/agent.sock".into()
}
fn default_pin_dir() -> PathBuf {
    "/sys/fs/bpf/ringfence".into()
}
fn default_ttl() -> u64 {
    24 * 3600
}

/// A configuration that cannot be used: file, line, field, what was expected.
#[derive(Debug)]
pub enum ConfigError {
    /// The file cannot be read.
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// YAML that is malformed or has an unknown, missing or ill-typed field.
    Parse {
        /// The file.
        file: PathBuf,
        /// 1-based, when known.
        line: Option<u64>,
        /// The parser's words.
        message: String,
    },
    /// A value that is well-formed and makes no sense.
    Value {
        /// The file.
        file: PathBuf,
        /// Dotted path of the field.
        field: String,
        /// What was expected.
        expected: String,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { file, source } => {
                write!(f, "{}: cannot be read: {source}", file.display())
            }
            Self::Parse {
                file,
                line: Some(line),
                message,
            } => {
                write!(f, "{}:{line}: {message}", file.display())
            }
            Self::Parse {
                file,
                line: None,
                message,
            } => write!(f, "{}: {message}", file.display()),
            Self::Value {
                file,
                field,
                expected,
            } => {
                write!(f, "{}: {field}: {expected}", file.display())
            }
        }
    }
}

impl std::error::Error for ConfigError {}

impl AgentConfig {
    /// How long new connections wait for a policy that has not arrived.
    pub fn policy_hold(&self) -> Duration {
        Duration::from_secs(self.policy_hold_seconds)
    }

    /// Reads and checks a file; nothing of a bad file is used.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Read {
            file: file.into(),
            source,
        })?;
        Self::parse(file, &text)
    }

    fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: AgentConfig = serde_saphyr::from_str(text).map_err(|e| ConfigError::Parse {
            file: file.into(),
            line: e.location().map(|l| l.line()),
            message: first_line(&e.to_string()),
        })?;
        config.check(file)?;
        Ok(config)
    }

    fn check(&self, file: &Path) -> Result<(), ConfigError> {
        let bad = |field: String, expected: String| {
            Err(ConfigError::Value {
                file: file.into(),
                field,
                expected,
            })
        };
        for (field, address) in [
            ("control_plane.address", Some(&self.control_plane.address)),
            (
                "control_plane.ca_address",
                self.control_plane.ca_address.as_ref(),
            ),
        ] {
            let Some(address) = address else { continue };
            let uri = address.parse::<http::Uri>();
            if !uri.is_ok_and(|u| u.scheme_str() == Some("https") && u.port().is_some()) {
                return bad(
                    field.into(),
                    format!("`{address}` is not https://host:port"),
                );
            }
        }
        if self.node.name.is_empty() {
            return bad("node.name".into(), "must not be empty".into());
        }
        if self.identity.workload_api_socket.is_some() && self.identity.source != Source::Ca {
            let expected = "needs `identity.source: ca`: other sources give no second key";
            return bad("identity.workload_api_socket".into(), expected.into());
        }
        if self.audit.max_megabytes == 0 || self.audit.files == 0 {
            return bad(
                "audit".into(),
                "`max_megabytes` and `files` must not be 0".into(),
            );
        }
        if self
            .audit
            .path
            .as_ref()
            .is_some_and(|path| !path.is_absolute())
        {
            return bad("audit.path".into(), "must be an absolute path".into());
        }
        for (i, egress) in self.egress.overrides.iter().enumerate() {
            let same = |other: &&EgressOverride| {
                (&other.namespace, &other.name) == (&egress.namespace, &egress.name)
            };
            if self.egress.overrides.iter().take(i).any(|o| same(&o)) {
                let name = egress.name.as_deref().unwrap_or("*");
                let expected = format!("{}/{name} is listed twice", egress.namespace);
                return bad(format!("egress.overrides[{i}]"), expected);
            }
        }
        for (i, pod) in self.pods.iter().enumerate() {
            for (name, value) in [("namespace", &pod.namespace), ("name", &pod.name)] {
                if value.is_empty() {
                    return bad(format!("pods[{i}].{name}"), "must not be empty".into());
                }
            }
            if self
                .pods
                .iter()
                .take(i)
                .any(|other| other.netns == pod.netns)
            {
                let expected = format!("{} is listed twice", pod.netns.display());
                return bad(format!("pods[{i}].netns"), expected);
            }
        }
        Ok(())
    }
}

/// The parser's message goes on with an excerpt of the file; the first line is what
/// fits a log line.
fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or(message).trim().to_owned()
}

#[cfg(test)]
mod tests;
