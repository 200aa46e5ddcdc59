//! Unmodified programs through the mesh: the bytes and the addresses they see.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use ring::digest::{SHA256, digest};
use ringfence_lab::mesh::TEST_PORT;
use ringfence_lab::probe::Outcome;
use ringfence_lab::process::wait_until;
use ringfence_lab::programs::redis_log;
use ringfence_lab::topology::{Family, WEB_VIP};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::{Server, echo};
use ringfence_security_tests::stage::{
    CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, is_answered, only_peer,
};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        the_agents_status_names_their_pods_and_certificates,
        curl_gets_through_the_mesh_what_it_gets_directly,
        redis_answers_through_the_mesh,
        eight_mebibytes_both_ways_at_once_arrive_unchanged,
        an_ipv4_mapped_connect_reaches_the_ipv4_service,
        both_sides_see_the_addresses_they_would_see_without_a_mesh,
    ]
}

fn the_agents_status_names_their_pods_and_certificates(stage: &mut Stage) -> Result<Verdict> {
    for (node, pods) in [
        (CLIENT_NODE, vec!["client", "intruder"]),
        (SERVER_NODE, vec!["web"]),
    ] {
        // The command itself: the other cases ask the socket.
        let status = stage.lab()?.status(node)?;
        let names: Vec<&str> = status.pods.iter().map(|pod| pod.name.as_str()).collect();
        ensure!(names == pods, "{node} has {names:?}");
        for pod in pods {
            let id = format!("spiffe://cluster.local/ns/demo/sa/{pod}");
            ensure!(
                status.svids.iter().any(|svid| svid.id == id),
                "{node} has no {id}: {:?}",
                status.svids
            );
        }
    }
    Ok(Verdict::Passed)
}

fn url(address: IpAddr, port: u16, path: &str) -> String {
    format!("http://{}{path}", SocketAddr::new(address, port))
}

fn curl(stage: &Stage, pod: &str, url: &str) -> Result<Vec<u8>> {
    let patience = PATIENCE.as_secs().to_string();
    let arguments = [
        "--silent",
        "--show-error",
        "--fail",
        "--globoff",
        "--max-time",
        &patience,
        url,
    ];
    Ok(stage.exec(pod, "curl", &arguments)?.stdout)
}

fn curl_gets_through_the_mesh_what_it_gets_directly(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        for path in ["/", "/blob"] {
            // Inside the pod there is no mesh between.
            let direct = curl(stage, "web", &url(family.loopback(), 8080, path))?;
            // By the service's name for port 8080, and by the workload's address.
            let service = curl(stage, "client", &url(family.of(WEB_VIP), 80, path))?;
            let workload = curl(
                stage,
                "client",
                &url(stage.address("web", family)?, 8080, path),
            )?;
            ensure!(!direct.is_empty(), "{path} is empty");
            ensure!(
                service == direct,
                "{} {path} differs by service address",
                family.name()
            );
            ensure!(
                workload == direct,
                "{} {path} differs by workload address",
                family.name()
            );
        }
    }
    Ok(Verdict::Passed)
}

fn redis_answers_through_the_mesh(stage: &mut Stage) -> Result<Verdict> {
    let web = stage.lab()?.pod("web")?.clone();
    for family in Family::BOTH {
        let service = family.of(WEB_VIP).to_string();
        let value = format!("value for {}", family.name());
        let redis = |words: &[&str]| -> Result<String> {
            let output = stage.exec("client", "redis-cli", &[&["-h", &service], words].concat())?;
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let set = redis(&["set", "key", &value])?;
        ensure!(set == "OK", "SET was answered with {set}");
        let got = redis(&["get", "key"])?;
        ensure!(got == value, "GET was answered with {got}");
        let client = stage.address("client", family)?;
        let log = redis_log(&stage.lab()?.pod_dir(&web));
        wait_until("redis to log the connection", PATIENCE, || {
            let text = std::fs::read_to_string(&log)?;
            let accepted: Vec<&str> = text
                .lines()
                .filter(|line| line.contains("Accepted"))
                .collect();
            ensure!(
                accepted
                    .iter()
                    .any(|line| line.contains(&format!("{client}:"))),
                "redis accepted no connection from {client}: {accepted:?}"
            );
            Ok(())
        })?;
    }
    Ok(Verdict::Passed)
}

fn eight_mebibytes_both_ways_at_once_arrive_unchanged(stage: &mut Stage) -> Result<Verdict> {
    let web = stage.lab()?.pod("web")?.clone();
    let sent = std::fs::read(stage.lab()?.pod_dir(&web).join("www/blob"))?;
    let server = Server::start(&web.netns(), TEST_PORT, PATIENCE, echo)?;
    for family in Family::BOTH {
        let stream = stage.connect("client", Stage::service(family))?;
        let mut back = stream.try_clone()?;
        let received = std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                (&stream).write_all(&sent)?;
                stream.shutdown(std::net::Shutdown::Write)
            });
            let mut received = Vec::new();
            back.read_to_end(&mut received)?;
            sender
                .join()
                .map_err(|_| anyhow::anyhow!("the sender panicked"))??;
            Ok::<_, anyhow::Error>(received)
        })
        .context(family.name())?;
        ensure!(
            server.next(PATIENCE)? == sent.len() as u64,
            "the server got another number of bytes"
        );
        let (there, back) = (digest(&SHA256, &sent), digest(&SHA256, &received));
        ensure!(
            there.as_ref() == back.as_ref(),
            "{}: sent {there:?}, got back {back:?}",
            family.name()
        );
    }
    Ok(Verdict::Passed)
}

fn an_ipv4_mapped_connect_reaches_the_ipv4_service(stage: &mut Stage) -> Result<Verdict> {
    let service = SocketAddr::new(WEB_VIP.0.to_ipv6_mapped().into(), TEST_PORT);
    let workload = stage.port("web", Family::V4, TEST_PORT)?;
    let IpAddr::V4(address) = workload.ip() else {
        anyhow::bail!("{workload} is not IPv4")
    };
    let workload = SocketAddr::new(address.to_ipv6_mapped().into(), TEST_PORT);
    let before = stage.counter(CLIENT_NODE, "outbound_accepted")?;
    for target in [service, workload] {
        let mut application = stage.application()?;
        let Outcome::Answered(answered) = stage.attempt("client", target)? else {
            anyhow::bail!("{target} did not answer");
        };
        ensure!(
            answered.peer == target,
            "getpeername says {} and not {target}",
            answered.peer
        );
        only_peer(&mut application, stage.address("client", Family::V4)?)?;
    }
    // The twin: the same family of socket may not slip past the mesh to do it.
    stage.wait_counter(CLIENT_NODE, "outbound_accepted", before + 2)?;
    let denied = stage.attempt("intruder", service)?;
    ensure!(denied.is_refusal(), "intruder: {denied:?}");
    Ok(Verdict::Passed)
}

fn both_sides_see_the_addresses_they_would_see_without_a_mesh(
    stage: &mut Stage,
) -> Result<Verdict> {
    for family in Family::BOTH {
        let client = stage.address("client", family)?;
        for target in [
            Stage::service(family),
            stage.port("web", family, TEST_PORT)?,
        ] {
            let mut application = stage.application()?;
            let outcome = stage.attempt("client", target)?;
            is_answered(&outcome)?;
            if let Outcome::Answered(answered) = outcome {
                ensure!(
                    answered.peer == target,
                    "getpeername says {} and not {target}",
                    answered.peer
                );
                ensure!(
                    answered.local.ip() == client,
                    "getsockname says {} and not {client}",
                    answered.local
                );
            }
            only_peer(&mut application, client)?;
        }
    }
    Ok(Verdict::Passed)
}
