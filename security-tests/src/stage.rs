//! The lab of a run, and what every case needs of it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use ringfence_lab::mesh::{Mesh, TEST_PORT};
use ringfence_lab::probe::{self, Acceptor, Outcome};
use ringfence_lab::process::{tail, wait_until};
use ringfence_lab::status::Status;
use ringfence_lab::topology::{Family, WEB_VIP};
use ringfence_lab::{Lab, LabConfig, LabId};

use crate::authority::Authority;
use crate::harness;
use crate::server::patient;

/// Longest wait for anything that must happen: enough for a guest without hardware
/// virtualization. Only a failing test waits that long.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// How long an agent or a control plane may take to end.
pub const GRACE: Duration = Duration::from_secs(20);

/// Where tunnels arrive in a pod.
pub const TUNNEL_PORT: u16 = 15008;
/// Where redirected connections arrive in a pod.
pub const OUTBOUND_PORT: u16 = 15001;

pub const CONTROL_PLANE: &str = "control-plane";
/// Node of `client`, `intruder` and `outside`.
pub const CLIENT_NODE: &str = "node-a";
/// Node of `web`, `legacy` and `outside-b`.
pub const SERVER_NODE: &str = "node-b";

/// Size of the file `/blob` of each nginx.
pub const BLOB_BYTES: u64 = 8 << 20;

/// A lab that is up, unless the last case took it down.
#[derive(Debug)]
pub struct Stage {
    lab: Option<Lab>,
    id: LabId,
    binary: PathBuf,
    baseline: Mesh,
    /// One run at a time.
    _alone: Flock<File>,
}

impl harness::Stage for Stage {
    fn set_up() -> Result<Result<Self, String>> {
        if !nix::unistd::geteuid().is_root() {
            return Ok(Err(
                "the lab makes network namespaces, which needs root".into()
            ));
        }
        let binary = match find_binary() {
            Ok(binary) => binary,
            Err(reason) => return Ok(Err(reason)),
        };
        Stage::up("e2e", binary, |config| config.blob_bytes = BLOB_BYTES).map(Ok)
    }

    fn after_case(&mut self) -> Result<()> {
        if self.lab.is_some() && self.restore_mesh()? {
            self.settle()?;
        }
        Ok(())
    }

    fn evidence(&self) -> String {
        let Some(lab) = &self.lab else {
            return "the lab is down".into();
        };
        [CONTROL_PLANE, CLIENT_NODE, SERVER_NODE]
            .map(|name| {
                format!(
                    "the end of the log of {name}:\n{}",
                    tail(&lab.log(name), 12)
                )
            })
            .join("\n")
    }

    fn tear_down(mut self) -> Result<()> {
        self.lab.take().map_or(Ok(()), Lab::down)
    }
}

impl Stage {
    fn up(purpose: &str, binary: PathBuf, change: impl FnOnce(&mut LabConfig)) -> Result<Self> {
        let id = LabId::for_run_of(purpose);
        let alone = alone(&id)?;
        // A run that was killed leaves its lab up.
        ringfence_lab::down(&id).context("removing the lab of an earlier run")?;
        let mut config = LabConfig::new(id.clone(), Some(binary.clone()));
        config.patience = PATIENCE;
        change(&mut config);
        let lab = Lab::up(&config)?;
        let baseline = lab.mesh()?.clone();
        let stage = Stage {
            lab: Some(lab),
            id,
            binary,
            baseline,
            _alone: alone,
        };
        match stage.settle() {
            Ok(()) => Ok(stage),
            Err(error) => {
                let evidence = harness::Stage::evidence(&stage);
                harness::Stage::tear_down(stage)?;
                Err(anyhow::anyhow!(
                    "the lab does not work as it should from the start: {error:#}\n{evidence}"
                ))
            }
        }
    }

    /// Runs `work` on a second lab beside this one, which is taken down afterwards. At most
    /// six letters name it.
    pub fn beside<T>(
        &self,
        purpose: &str,
        change: impl FnOnce(&mut LabConfig),
        work: impl FnOnce(&mut Stage) -> Result<T>,
    ) -> Result<T> {
        let mut second = Stage::up(purpose, self.binary.clone(), change)
            .with_context(|| format!("the lab {purpose}"))?;
        let done = work(&mut second).map_err(|error| {
            let evidence = harness::Stage::evidence(&second);
            anyhow::anyhow!("in the lab {purpose}: {error:#}\n{evidence}")
        });
        harness::Stage::tear_down(second)?;
        done
    }

    /// Runs `work` with changed configuration files of these agents, started anew, which need
    /// not be ready. Afterwards everything is as before.
    pub fn with_agents<T>(
        &mut self,
        nodes: &[&str],
        change: impl Fn(&str) -> String,
        work: impl FnOnce(&mut Stage) -> Result<T>,
    ) -> Result<T> {
        let mut before = Vec::new();
        for node in nodes {
            let file = self.lab()?.agent_config(node);
            before.push((*node, std::fs::read_to_string(&file)?, file));
        }
        let started = before.iter().try_for_each(|(node, text, file)| {
            self.restart_agent_with(node, || Ok(std::fs::write(file, change(text))?))
        });
        let done = started.and_then(|()| work(self)).map_err(|error| {
            // The logs of these agents, before others write to them.
            anyhow::anyhow!("{error:#}\n{}", harness::Stage::evidence(self))
        });
        for (node, text, file) in &before {
            self.restart_agent_with(node, || Ok(std::fs::write(file, text)?))?;
        }
        self.lab()?.wait_ready(PATIENCE)?;
        self.restore_mesh()?;
        self.settle()?;
        done
    }

    /// The mesh is as it was when the lab came up; says whether it was another one.
    fn restore_mesh(&mut self) -> Result<bool> {
        let baseline = self.baseline.clone();
        let lab = self.lab_mut()?;
        let mesh = Mesh {
            revision: lab.mesh()?.revision,
            ..baseline
        };
        let changed = mesh != *lab.mesh()?;
        if changed {
            lab.update_mesh(|current| *current = mesh)?;
        }
        Ok(changed)
    }

    /// Ends an agent, if it runs, and starts it; it need not be ready on return.
    pub fn restart_agent(&mut self, node: &str) -> Result<()> {
        self.restart_agent_with(node, || Ok(()))
    }

    fn restart_agent_with(
        &mut self,
        node: &str,
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let lab = self.lab_mut()?;
        if lab.process(node).is_ok() {
            lab.stop(node, GRACE)?;
        }
        meanwhile()?;
        lab.start_agent(node)
    }

    pub fn lab(&self) -> Result<&Lab> {
        self.lab
            .as_ref()
            .context("an earlier case took the lab down")
    }

    pub fn lab_mut(&mut self) -> Result<&mut Lab> {
        self.lab
            .as_mut()
            .context("an earlier case took the lab down")
    }

    /// For the case that takes it down itself.
    pub fn take_lab(&mut self) -> Result<Lab> {
        self.lab.take().context("an earlier case took the lab down")
    }

    pub fn id(&self) -> &LabId {
        &self.id
    }

    pub fn binary(&self) -> &Path {
        &self.binary
    }

    pub fn address(&self, pod: &str, family: Family) -> Result<IpAddr> {
        Ok(self.lab()?.pod(pod)?.address(family))
    }

    /// A port of a pod.
    pub fn port(&self, pod: &str, family: Family, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.address(pod, family)?, port))
    }

    /// The test port of the service `web`.
    pub fn service(family: Family) -> SocketAddr {
        SocketAddr::new(family.of(WEB_VIP), TEST_PORT)
    }

    /// The application that must, or must not, be reached: the test port of `web`.
    pub fn application(&self) -> Result<Acceptor> {
        Acceptor::start(&self.lab()?.pod("web")?.netns(), TEST_PORT)
    }

    /// One line from a pod to an address, and what became of it.
    pub fn attempt(&self, pod: &str, target: SocketAddr) -> Result<Outcome> {
        probe::connect(&self.lab()?.pod(pod)?.netns(), target, b"hello\n", PATIENCE)
    }

    /// A connection from a pod.
    pub fn connect(&self, pod: &str, target: SocketAddr) -> Result<TcpStream> {
        let netns = self.lab()?.pod(pod)?.netns();
        let stream = netns
            .run(|| TcpStream::connect_timeout(&target, PATIENCE))?
            .with_context(|| format!("connecting from {pod} to {target}"))?;
        patient(&stream, PATIENCE)?;
        Ok(stream)
    }

    /// Runs a program in a pod to its end.
    pub fn exec(&self, pod: &str, program: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = self.lab()?.command(pod, program)?;
        let output = command
            .args(arguments)
            .output()
            .with_context(|| format!("starting {program}"))?;
        ensure!(
            output.status.success(),
            "`{program} {}` in {pod} ended with {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(output)
    }

    /// What an agent says of itself, asked on its socket.
    pub fn status(&self, node: &str) -> Result<Status> {
        let path = self.lab()?.agent_socket(node);
        let mut socket = UnixStream::connect(&path)
            .with_context(|| format!("no agent on {}", path.display()))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.write_all(b"GET /status HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer)?;
        let body = answer
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .and_then(|end| answer.get(end + 4..))
            .context("an answer without a body")?;
        serde_json::from_slice(body).context("reading the agent's status")
    }

    pub fn counter(&self, node: &str, name: &str) -> Result<u64> {
        Ok(self.status(node)?.counter(name))
    }

    /// Returns when the counter is what it should be.
    pub fn wait_counter(&self, node: &str, name: &str, value: u64) -> Result<()> {
        wait_until(&format!("{name} of {node} to be {value}"), PATIENCE, || {
            let status = self.status(node)?;
            let moved: Vec<_> = status
                .counters
                .iter()
                .filter(|(name, n)| **n > 0 && name.contains('{'))
                .collect();
            ensure!(
                status.counter(name) == value,
                "it is {}; others: {moved:?}",
                status.counter(name)
            );
            Ok(())
        })
    }

    /// Changes the mesh and returns when `arrived` says that the change is in force: agents
    /// acknowledge a change a moment before the kernel decides by it.
    pub fn change_mesh(
        &mut self,
        change: impl FnOnce(&mut Mesh),
        what: &str,
        mut arrived: impl FnMut(&Stage) -> Result<()>,
    ) -> Result<()> {
        self.lab_mut()?.update_mesh(change)?;
        wait_until(what, PATIENCE, || arrived(self))
    }

    /// Returns when the lab does what a fresh one does: `client` reaches the application,
    /// plaintext from outside does not.
    pub fn settle(&self) -> Result<()> {
        wait_until("the lab to be as it was", PATIENCE, || {
            let _application = self.application()?;
            let client = self.attempt("client", Self::service(Family::V4))?;
            ensure!(matches!(client, Outcome::Answered(_)), "client: {client:?}");
            let outside = self.attempt("outside", self.port("web", Family::V4, TEST_PORT)?)?;
            ensure!(outside.is_refusal(), "outside: {outside:?}");
            Ok(())
        })
    }

    pub fn authority(&self) -> Result<Authority> {
        Authority::of_lab(&self.lab()?.root_certificate())
    }
}

/// The application accepted exactly one connection, from that address. The one that must be
/// there came last, so that one that must not be there would be there, too.
pub fn only_peer(application: &mut Acceptor, address: IpAddr) -> Result<()> {
    application
        .next(PATIENCE)
        .context("the application accepted nothing")?;
    let peers = application.accepted();
    ensure!(peers.len() == 1, "the application accepted {peers:?}");
    ensure!(
        peers.iter().all(|peer| peer.ip() == address),
        "the application saw {peers:?}, not {address}"
    );
    Ok(())
}

pub fn is_answered(outcome: &Outcome) -> Result<()> {
    ensure!(matches!(outcome, Outcome::Answered(_)), "{outcome:?}");
    Ok(())
}

pub fn is_refused(outcome: &Outcome) -> Result<()> {
    ensure!(outcome.is_refusal(), "{outcome:?}");
    Ok(())
}

/// Taken over by the agent, and then reset: the agent's listener has accepted before the
/// agent knows that it cannot serve, so that the reset may reach the application inside
/// `connect`, or after it.
pub fn is_reset(outcome: &Outcome) -> Result<()> {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    let reset = matches!(
        outcome,
        Outcome::NotConnected(ConnectionReset)
            | Outcome::Closed(Some(ConnectionReset | BrokenPipe))
    );
    ensure!(reset, "{outcome:?} instead of a reset");
    Ok(())
}

/// `$RINGFENCE_BIN`, else the release build.
fn find_binary() -> Result<PathBuf, String> {
    let given = std::env::var_os("RINGFENCE_BIN");
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/ringfence");
    let path = given.map_or(built, PathBuf::from);
    path.canonicalize().map_err(|error| {
        format!(
            "there is no ringfence program at {} ({error}): `cargo build --release -p ringfence`, or set RINGFENCE_BIN",
            path.display()
        )
    })
}

/// Waits for another run to end.
fn alone(id: &LabId) -> Result<Flock<File>> {
    let path = Path::new("/run").join(format!("{}.run", id.folder));
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("locking {}", path.display()))
}
