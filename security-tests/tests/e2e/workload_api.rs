//! The SPIFFE Workload API that an agent offers: each enrolled pod gets its own identity from
//! it, and nobody else anything.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use ringfence_lab::mesh::TRUST_DOMAIN;
use ringfence_lab::netns::Netns;
use ringfence_lab::process::{output_within, wait_until};
use ringfence_security_tests::authority::spiffe_id;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::stage::{CLIENT_NODE, PATIENCE, Stage};
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use spiffe::{TrustDomain, WorkloadApiClient};

use crate::rotation::chains_to;

pub fn cases() -> Vec<Case<Stage>> {
    cases![a_process_of_an_enrolled_pod_gets_the_pods_svid_and_others_get_nothing]
}

/// Makes a process of this program a client of the socket that is named next.
pub const CLIENT_FLAG: &str = "--workload-api-client";

/// Runs in a process of its own, because the kernel tells the agent of processes and not of
/// threads: prints what the API gives, as JSON, or why it gives nothing.
pub fn client(socket: &str) -> ExitCode {
    match fetch(socket) {
        Ok(given) => {
            println!("{given}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error:?}");
            ExitCode::FAILURE
        }
    }
}

fn fetch(socket: &str) -> Result<Value> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let client = WorkloadApiClient::connect_to(format!("unix:{socket}")).await?;
        // The client checks that key and certificate belong together.
        let svid = client.fetch_x509_svid().await?;
        let bundles = client.fetch_x509_bundles().await?;
        let bundle = bundles
            .get(&TrustDomain::new(TRUST_DOMAIN)?)
            .context("no bundle of our own trust domain")?;
        let chain: Vec<&[u8]> = svid.cert_chain().iter().map(|c| c.as_bytes()).collect();
        let roots: Vec<&[u8]> = bundle.authorities().iter().map(|c| c.as_bytes()).collect();
        Ok(json!({"id": svid.spiffe_id().to_string(), "chain": chain, "roots": roots}))
    })
}

/// A process in that namespace asks, and this is what it gets.
fn ask(netns: &Netns, socket: &Path) -> Result<Result<Given, String>> {
    let mut command = netns.command(std::env::current_exe()?)?;
    command.arg(CLIENT_FLAG).arg(socket);
    let output = output_within(command, PATIENCE)?;
    if output.status.success() {
        Ok(Ok(
            serde_json::from_slice::<Value>(&output.stdout)?.try_into()?
        ))
    } else {
        Ok(Err(String::from_utf8_lossy(&output.stderr).into_owned()))
    }
}

struct Given {
    id: String,
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
}

impl TryFrom<Value> for Given {
    type Error = anyhow::Error;

    fn try_from(value: Value) -> Result<Self> {
        let certificates = |name: &str| -> Result<Vec<CertificateDer<'static>>> {
            let field = value.get(name).cloned().unwrap_or_default();
            let ders: Vec<Vec<u8>> = serde_json::from_value(field)?;
            Ok(ders.into_iter().map(CertificateDer::from).collect())
        };
        Ok(Given {
            id: value
                .get("id")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
            chain: certificates("chain")?,
            roots: certificates("roots")?,
        })
    }
}

/// `SO_PEERPIDFD` is of Linux 6.5; without it the agent knows nobody.
fn kernel_names_callers() -> Result<bool> {
    let (socket, _other) = UnixStream::pair()?;
    Ok(ringfence_workload_api::Caller::of(&socket).is_ok())
}

fn a_process_of_an_enrolled_pod_gets_the_pods_svid_and_others_get_nothing(
    stage: &mut Stage,
) -> Result<Verdict> {
    let socket = stage.lab()?.dir().join("workload-api.sock");
    let named = kernel_names_callers()?;
    stage.with_agents(
        &[CLIENT_NODE],
        |text| {
            format!(
                "{text}identity: {{workload_api_socket: {}}}\n",
                socket.display()
            )
        },
        |stage| {
            stage.lab()?.wait_ready(PATIENCE)?;
            let root = stage.lab()?.root_certificate();
            if named {
                for pod in ["client", "intruder"] {
                    let netns = stage.lab()?.pod(pod)?.netns();
                    let given = wait_until(&format!("an SVID for {pod}"), PATIENCE, || {
                        ask(&netns, &socket)?.map_err(anyhow::Error::msg)
                    })?;
                    ensure!(given.id == spiffe_id(pod), "{pod} got {}", given.id);
                    chains_to(&given.chain, &root).with_context(|| format!("SVID of {pod}"))?;
                    ensure!(given.roots.len() == 1, "{} roots", given.roots.len());
                    crate::rotation::chains_to_roots(&given.chain, given.roots)
                        .context("against the bundle that came with it")?;
                }
            }
            // The node's own programs, a pod of another node, a pod of no agent.
            let strangers = [
                stage.lab()?.node(CLIENT_NODE)?.netns(),
                stage.lab()?.pod("web")?.netns(),
                stage.lab()?.pod("outside")?.netns(),
            ];
            for netns in strangers {
                match ask(&netns, &socket)? {
                    Ok(given) => anyhow::bail!("{} got {}", netns.name(), given.id),
                    // The client's name for PERMISSION_DENIED.
                    Err(error) => ensure!(
                        error.contains("NoIdentityIssued") || error.contains("no identity"),
                        "{}: {error}",
                        netns.name()
                    ),
                }
            }
            Ok(())
        },
    )?;
    if named {
        Ok(Verdict::Passed)
    } else {
        Ok(Verdict::Skipped(
            "this kernel has no SO_PEERPIDFD (Linux 6.5): shown only that nobody gets anything"
                .into(),
        ))
    }
}
