//! The agent, its pods, and a place outside them to connect from.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

/// Pods of the agent, each in a namespace of its own.
pub const PODS: usize = 10;
/// Where the pods' application listens.
pub const PORT: u16 = 8080;

pub fn pod_address(k: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 199, k as u8, 2)
}

/// Everything that is to be removed in the end.
pub struct Site {
    pub certificate: String,
    pub key: String,
    folder: PathBuf,
    pin_dir: PathBuf,
    /// How the names of the network namespaces begin.
    prefix: String,
}

/// Ends with its value.
pub struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Site {
    pub fn new(control_plane: SocketAddr) -> Self {
        let id = std::process::id();
        let folder = std::env::temp_dir().join(format!("ringfence-push-{id}"));
        fs::create_dir_all(&folder).unwrap();
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let site = Site {
            certificate: made.cert.pem(),
            key: made.signing_key.serialize_pem(),
            folder,
            pin_dir: format!("/sys/fs/bpf/ringfence-push-{id}").into(),
            prefix: format!("rfpush{id}-"),
        };
        site.build_network();
        site.write_config(control_plane);
        site
    }

    fn build_network(&self) {
        let wire = format!("{}wire", self.prefix);
        ip(&format!("netns add {wire}"));
        for k in 0..PODS {
            let (pod, device) = (self.pod(k), format!("pod{k}"));
            ip(&format!("netns add {pod}"));
            ip(&format!("-n {pod} link set lo up"));
            ip(&format!(
                "-n {wire} link add {device} type veth peer name eth0 netns {pod}"
            ));
            let outside = Ipv4Addr::new(10, 199, k as u8, 1);
            for (netns, device, address) in
                [(&wire, &*device, outside), (&pod, "eth0", pod_address(k))]
            {
                ip(&format!("-n {netns} addr add {address}/24 dev {device}"));
                ip(&format!("-n {netns} link set {device} up"));
            }
        }
        let listener = self.inside(&self.pod(0), || TcpListener::bind(("0.0.0.0", PORT)));
        thread::spawn(move || {
            let listener = listener.unwrap();
            // Ends with the process.
            while listener.accept().is_ok() {}
        });
    }

    fn write_config(&self, control_plane: SocketAddr) {
        let (folder, pin_dir) = (self.folder.display(), self.pin_dir.display());
        let pods = (0..PODS).map(|k| {
            let netns = self.pod(k);
            format!("  - {{netns: /run/netns/{netns}, namespace: ns{k}, name: pod-{k}}}\n")
        });
        let config = format!(
            "node: {{name: bench, address: 127.0.0.1}}\n\
             control_plane:\n  address: https://{control_plane}\n  root_ca: {folder}/root.pem\n  \
             token: {folder}/token\n\
             identity: {{source: {{workload-api: {{socket: {folder}/none.sock}}}}}}\n\
             record_layer: software\nadmin_socket: {folder}/admin.sock\npin_dir: {pin_dir}\n\
             pods:\n{}",
            pods.collect::<String>()
        );
        fs::write(self.folder.join("agent.yaml"), config).unwrap();
        fs::write(self.folder.join("root.pem"), &self.certificate).unwrap();
        fs::write(self.folder.join("token"), "token").unwrap();
    }

    pub fn start_agent(&self) -> Agent {
        let binary = std::env::var_os("RINGFENCE_BIN").expect("RINGFENCE_BIN names the agent");
        let log = File::create(self.folder.join("agent.log")).unwrap();
        let agent = Command::new(binary)
            .args(["--log", "warn", "agent", "--config"])
            .arg(self.folder.join("agent.yaml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Agent(agent)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("agent.log")).unwrap_or_default()
    }

    /// Connects to the first pod from outside; the connection ends with a reset, so that
    /// its port is free again.
    pub fn connect(&self) -> io::Result<()> {
        self.inside(&format!("{}wire", self.prefix), || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_linger(Some(Duration::ZERO))?;
            let to = SocketAddr::from((pod_address(0), PORT));
            socket.connect_timeout(&to.into(), Duration::from_secs(5))
        })
    }

    fn pod(&self, k: usize) -> String {
        format!("{}{k}", self.prefix)
    }

    /// Runs `work` on a thread inside a network namespace.
    fn inside<T: Send>(&self, netns: &str, work: impl FnOnce() -> T + Send) -> T {
        let netns = File::open(format!("/run/netns/{netns}")).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside.join().unwrap()
        })
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let binary = std::env::var_os("RINGFENCE_BIN").unwrap_or_default();
        let removed = Command::new(binary)
            .args(["uninstall", "--pin-dir"])
            .arg(&self.pin_dir)
            .stdout(Stdio::null())
            .status();
        if !removed.is_ok_and(|status| status.success()) {
            eprintln!("{} is left", self.pin_dir.display());
        }
        for k in 0..PODS {
            ip(&format!("netns delete {}", self.pod(k)));
        }
        ip(&format!("netns delete {}wire", self.prefix));
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        // The rest is removed all the same.
        if thread::panicking() {
            eprintln!("ip {arguments}: {error}");
        } else {
            panic!("ip {arguments}: {error}");
        }
    }
}
