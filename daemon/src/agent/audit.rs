//! The kernel's verdicts as they are read: counted, kept for a while, written to the audit
//! log. A verdict that the ring buffer had no room for is enforced, and missing here.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringfence_bpf_common::{
    Endpoint, Event, HOOK_CONNECT, HOOK_GUARD_FROM, HOOK_GUARD_TO, HOOK_SK_LOOKUP, Reason, Verdict,
};
use ringfence_policies::{Connection, evaluate_with_dry_run};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use super::Agent;
use super::applied::name_of;
use super::audit_file::{AuditFile, Target};
use super::policy::{InstalledSet, Judged};
use super::policy_metrics::PolicyMetrics;
use crate::authz::report::{self, Decision, Log, LogRequest, Record};
use crate::config::{self, AuditedVerdicts};

/// Verdicts that are kept.
const KEPT: usize = 4096;
/// How long a reader waits for a verdict before it is told that there was none.
const LONGEST_WAIT: Duration = Duration::from_secs(20);

/// The last verdicts, and where they are written.
#[derive(Debug)]
pub struct Audit {
    kept: Mutex<VecDeque<Seen>>,
    /// Number of the last one.
    last: watch::Sender<u64>,
    verdicts: AuditedVerdicts,
    file: Option<AuditFile>,
}

#[derive(Debug)]
struct Seen {
    record: Record,
    netns: u64,
    /// When policy had to do with it.
    judged: Option<Judged>,
}

impl Audit {
    /// Opens what the configuration names.
    pub fn new(config: &config::Audit, metrics: &PolicyMetrics) -> std::io::Result<Self> {
        let file = match config.verdicts {
            AuditedVerdicts::Off => None,
            AuditedVerdicts::Denied | AuditedVerdicts::All => {
                let target = Target {
                    path: config.path.clone(),
                    max_bytes: config.max_megabytes.saturating_mul(1 << 20),
                    files: config.files,
                };
                let (lost, errors) = (metrics.audit_lost.clone(), metrics.audit_errors.clone());
                Some(AuditFile::open(target, lost, errors)?)
            }
        };
        Ok(Audit {
            kept: Mutex::default(),
            last: watch::Sender::new(0),
            verdicts: config.verdicts,
            file,
        })
    }

    /// What was asked for, waiting for it if that was asked for too.
    pub async fn log(&self, request: &LogRequest) -> Log {
        if request.wait {
            let mut last = self.last.subscribe();
            let newer = last.wait_for(|last| *last > request.after);
            // Nothing new is an answer as well.
            let _ = tokio::time::timeout(LONGEST_WAIT, newer).await;
        }
        let kept = self.lock();
        let new = kept.iter().map(|seen| &seen.record).filter(|record| {
            record.number > request.after && !(request.denied && record.decision.allows())
        });
        Log {
            verdicts: new.cloned().collect(),
            last: kept.back().map_or(request.after, |seen| seen.record.number),
        }
    }

    /// Which connections to a pod policy judged lately, and how often.
    pub fn recent(&self, netns: u64) -> Vec<(Judged, usize)> {
        let mut found: HashMap<(u32, IpAddr, SocketAddr), (Judged, usize)> = HashMap::new();
        for judged in self
            .lock()
            .iter()
            .filter(|seen| seen.netns == netns)
            .filter_map(|seen| seen.judged)
        {
            let key = (judged.identity, judged.source, judged.destination);
            found.entry(key).or_insert((judged, 0)).1 += 1;
        }
        found.into_values().collect()
    }

    fn keep(&self, mut seen: Seen) {
        let mut kept = self.lock();
        let number = kept.back().map_or(0, |seen| seen.record.number) + 1;
        seen.record.number = number;
        let wanted = match self.verdicts {
            AuditedVerdicts::Off => false,
            AuditedVerdicts::Denied => !seen.record.decision.allows(),
            AuditedVerdicts::All => true,
        };
        if let (true, Some(file)) = (wanted, &self.file) {
            match serde_json::to_string(&seen.record) {
                Ok(line) => file.write(line),
                Err(error) => tracing::error!(%error, "an audit line cannot be made"),
            }
        }
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back(seen);
        drop(kept);
        self.last.send_replace(number);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Seen>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the kernel's verdicts for ever.
pub async fn serve(agent: Arc<Agent>) {
    let mut events = match agent.datapath.events() {
        Ok(events) => events,
        Err(error) => {
            tracing::error!(%error, "verdicts cannot be logged; they are enforced all the same");
            return;
        }
    };
    loop {
        match events.next().await {
            Ok(event) => note(&agent, &event),
            Err(error) => {
                tracing::error!(%error, "verdicts are no longer logged; they are enforced all the same");
                return;
            }
        }
    }
}

fn note(agent: &Agent, event: &Event) {
    let pod = agent.pods.by_cookie(event.netns);
    let set = match event.set {
        0 => None,
        number => pod
            .as_ref()
            .and_then(|pod| pod.policy.installed())
            .filter(|set| set.number() == number)
            .or_else(|| agent.sets.find(number)),
    };
    let peer = agent.identities.peer(event.identity);
    let (source, destination) = (socket(&event.source), socket(&event.destination));
    // A last hop to another address, or to the agent's ports, is refused before any policy
    // is asked.
    let by_policy = !matches!(
        Reason::from_number(event.reason),
        None | Some(Reason::NotThisPod | Reason::AgentPort | Reason::EgressRefused)
    ) && matches!(event.hook, HOOK_CONNECT | HOOK_SK_LOOKUP);
    let connection = Connection {
        peer: peer.as_deref(),
        source: source.ip(),
        destination: destination.ip(),
        port: destination.port(),
    };
    let dry_run = set
        .as_ref()
        .filter(|_| by_policy)
        .and_then(|set| evaluate_with_dry_run(set.policies(), &connection));
    let dry_run = dry_run.as_ref().map(Decision::from);
    let decision = decide(event, set.as_deref());
    if let Some(pod) = pod.as_ref().filter(|_| !is_guard(event.hook)) {
        let metrics = &agent.metrics.policy;
        metrics.verdict(&name_of(pod), &decision, dry_run.as_ref());
    }
    let identity = peer.as_ref().map(ToString::to_string);
    if decision.allows() {
        tracing::debug!(%source, %destination, identity, reason = decision.reason, "admitted by the kernel");
    } else {
        tracing::info!(
            %source, %destination, identity, reason = decision.reason, policy = decision.policy,
            "denied by the kernel"
        );
    }
    let inbound = is_inbound(event);
    let own = pod
        .as_ref()
        .map(|pod| (pod.config.namespace.clone(), pod.config.name.clone()));
    let named = |address: IpAddr| {
        let mesh = agent.mesh();
        let workload = mesh.by_address(address)?;
        Some((workload.namespace.clone(), workload.name.clone()))
    };
    let (from, to) = if inbound {
        (named(source.ip()), own)
    } else {
        (own, named(destination.ip()))
    };
    let (source_namespace, source_workload) = from.unzip();
    let (destination_namespace, destination_workload) = to.unzip();
    agent.audit.keep(Seen {
        netns: event.netns,
        judged: by_policy.then(|| Judged {
            set: event.set,
            identity: event.identity,
            source: source.ip(),
            destination,
        }),
        record: Record {
            time: now(),
            number: 0,
            decision,
            direction: if inbound { "inbound" } else { "outbound" }.into(),
            hook: hook(event).into(),
            connection_security_policy: match peer {
                Some(_) => "mutual_tls",
                None => "none",
            }
            .into(),
            source: text(source),
            source_workload,
            source_namespace,
            source_identity: identity,
            destination: text(destination),
            destination_workload,
            destination_namespace,
            dry_run,
        },
    });
}

/// The verdict in the words of the set that was asked. One that is long gone leaves the
/// reason alone.
fn decide(event: &Event, set: Option<&InstalledSet>) -> Decision {
    match (Reason::from_number(event.reason), set) {
        (Some(reason), Some(set)) => {
            let verdict = Verdict {
                reason,
                term: event.term,
            };
            Decision::from(&set.compiled().decision(verdict))
        }
        (reason, _) => Decision {
            verdict: report::verdict(event.reason < Reason::Denied as u16).into(),
            reason: reason.map_or("unknown", Reason::as_str).into(),
            policy: None,
            rule: None,
        },
    }
}

fn is_guard(hook: u32) -> bool {
    matches!(hook, HOOK_GUARD_FROM | HOOK_GUARD_TO)
}

fn is_inbound(event: &Event) -> bool {
    match event.hook {
        HOOK_GUARD_FROM => false,
        HOOK_CONNECT => event.reason != Reason::EgressRefused as u16,
        _ => true,
    }
}

fn hook(event: &Event) -> &'static str {
    match event.hook {
        HOOK_CONNECT if is_inbound(event) => "last-hop",
        HOOK_CONNECT => "egress",
        HOOK_SK_LOOKUP => "plaintext",
        HOOK_GUARD_FROM | HOOK_GUARD_TO => "guard",
        _ => "unknown",
    }
}

fn socket(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.addr.into(), endpoint.port)
}

/// A port of 0 is one that the kernel did not know.
fn text(address: SocketAddr) -> String {
    match address.port() {
        0 => address.ip().to_string(),
        _ => address.to_string(),
    }
}

fn now() -> String {
    let now = OffsetDateTime::now_utc();
    // Whatever the clock says can be written but for years beyond 9999.
    now.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use ringfence_bpf_common::Addr;

    use super::*;

    fn seen(audit: &Audit, verdict: &str, port: u16) {
        let destination = SocketAddr::new("10.0.0.2".parse().unwrap(), port);
        let source = "10.0.0.1".parse().unwrap();
        audit.keep(Seen {
            netns: 7,
            judged: Some(Judged {
                set: 1,
                identity: 0,
                source,
                destination,
            }),
            record: Record {
                time: now(),
                number: 0,
                decision: Decision {
                    verdict: verdict.into(),
                    reason: "allowed".into(),
                    policy: None,
                    rule: None,
                },
                direction: "inbound".into(),
                hook: "plaintext".into(),
                connection_security_policy: "none".into(),
                source: "10.0.0.1".into(),
                source_workload: None,
                source_namespace: None,
                source_identity: None,
                destination: text(destination),
                destination_workload: None,
                destination_namespace: None,
                dry_run: None,
            },
        });
    }

    fn audit(config: &config::Audit) -> Audit {
        let mut registry = prometheus_client::registry::Registry::default();
        Audit::new(config, &PolicyMetrics::register(&mut registry)).unwrap()
    }

    #[tokio::test]
    async fn log_is_bounded_and_goes_on_after_a_number() {
        let audit = audit(&config::Audit::default());
        for _ in 0..KEPT + 10 {
            seen(&audit, "allow", 80);
        }
        seen(&audit, "deny", 81);
        let all = audit.log(&LogRequest::default()).await;
        assert_eq!((all.verdicts.len(), all.last), (KEPT, KEPT as u64 + 11));
        let denied = LogRequest {
            denied: true,
            ..LogRequest::default()
        };
        assert_eq!(audit.log(&denied).await.verdicts.len(), 1);
        let rest = LogRequest {
            after: all.last - 1,
            wait: true,
            ..LogRequest::default()
        };
        assert_eq!(audit.log(&rest).await.verdicts.len(), 1);
        assert_eq!(audit.recent(7).len(), 2);
        assert_eq!(audit.recent(8).len(), 0);
        assert_eq!(
            audit
                .recent(7)
                .iter()
                .map(|(_, count)| count)
                .sum::<usize>(),
            KEPT
        );
    }

    #[tokio::test]
    async fn waiting_reader_is_woken_by_the_next_verdict() {
        let audit = Arc::new(audit(&config::Audit::default()));
        let reader = audit.clone();
        let waiting = tokio::spawn(async move {
            let wait = LogRequest {
                wait: true,
                ..LogRequest::default()
            };
            reader.log(&wait).await.verdicts.len()
        });
        tokio::task::yield_now().await;
        seen(&audit, "deny", 80);
        assert_eq!(waiting.await.unwrap(), 1);
    }

    #[test]
    fn direction_and_hook_are_told_apart() {
        let event = |hook, reason: Reason| Event {
            hook,
            reason: reason as u16,
            ..Event::default()
        };
        for (hook_number, reason, inbound, name) in [
            (HOOK_CONNECT, Reason::Allowed, true, "last-hop"),
            (HOOK_CONNECT, Reason::EgressRefused, false, "egress"),
            (HOOK_SK_LOOKUP, Reason::PlaintextRefused, true, "plaintext"),
            (HOOK_GUARD_FROM, Reason::PlaintextToMesh, false, "guard"),
            (HOOK_GUARD_TO, Reason::Fragment, true, "guard"),
        ] {
            let event = event(hook_number, reason);
            assert_eq!((is_inbound(&event), hook(&event)), (inbound, name));
        }
    }

    #[test]
    fn verdict_of_a_set_that_is_gone_keeps_its_reason() {
        let event = Event {
            reason: Reason::Denied as u16,
            set: 9,
            ..Event::default()
        };
        let decision = decide(&event, None);
        assert_eq!(
            (decision.verdict.as_str(), decision.reason.as_str()),
            ("deny", "denied-by-policy")
        );
        let unknown = Event {
            reason: 999,
            ..event
        };
        assert_eq!(decide(&unknown, None).verdict, "deny");
        let v6 = Endpoint::new(Addr::from("fd00::1".parse::<IpAddr>().unwrap()), 0);
        assert_eq!(text(socket(&v6)), "fd00::1");
    }
}
