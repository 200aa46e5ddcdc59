//! Whom we trust and where our own certificates come from, as configured.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use ktls_offload::ResetReason;
use ringfence_identity::tls::KeyExchangePolicy;
use ringfence_identity::{
    CaClient, CaClientConfig, DelegatedIdentity, DelegatedIdentityConfig, FileLayout, FileSource,
    FileSourceConfig, IdentityTemplate, RevocationLists, SvidSource, TrustBundles, TrustChange,
    TrustDomain, TrustDomainAliases, TrustStore, WorkloadApi, WorkloadApiConfig,
};
use tokio::task::JoinSet;

use super::Agent;
use super::watch::FileChanges;
use crate::config::{AgentConfig, KeyExchange, Source};
use crate::status;

/// How long a source may take to answer.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(10);

/// The trust store, with the configured aliases; revocation lists are read by [`watch`].
pub fn store(config: &AgentConfig) -> anyhow::Result<TrustStore> {
    let domain = |name: &str| {
        TrustDomain::parse(name)
            .with_context(|| format!("identity: `{name}` is not a trust domain"))
    };
    let mut pairs = Vec::new();
    for (alias, of) in &config.identity.trust_domain_aliases {
        pairs.push((domain(alias)?, domain(of)?));
    }
    let aliases = TrustDomainAliases::new(pairs).context("identity.trust_domain_aliases")?;
    let revocation = Arc::new(RevocationLists::new());
    for list in &config.identity.revocation_lists {
        // Closed until the file has been read.
        revocation.require(&source_name(&list.file), &domain(&list.trust_domain)?);
    }
    Ok(TrustStore::new(
        Arc::new(TrustBundles::new()),
        revocation,
        aliases,
    ))
}

/// The source of SVIDs.
pub fn source(config: &AgentConfig, trust: &TrustStore) -> anyhow::Result<Arc<dyn SvidSource>> {
    let bundles = trust.bundles().clone();
    Ok(match &config.identity.source {
        Source::Ca => Arc::new(ca(config)?),
        Source::Files(files) => {
            let layout = match &files.folder {
                Some(folder) => FileLayout::PerIdentity(IdentityTemplate::parse(folder)?),
                None => FileLayout::Single,
            };
            let directory = files.directory.clone();
            Arc::new(FileSource::start(
                FileSourceConfig { directory, layout },
                bundles,
            )?)
        }
        Source::Spire(spire) => {
            let mut delegated = DelegatedIdentityConfig::new(&spire.socket)?;
            if let Some(selectors) = &spire.selectors {
                let parsed = selectors.iter().map(|s| IdentityTemplate::parse(s));
                delegated.selectors = parsed.collect::<Result<_, _>>()?;
            }
            Arc::new(DelegatedIdentity::start(delegated, bundles)?)
        }
        Source::WorkloadApi(api) => {
            let socket = api.socket.clone();
            let config = WorkloadApiConfig {
                socket,
                timeout: SOURCE_TIMEOUT,
            };
            Arc::new(WorkloadApi::start(config, trust.clone())?)
        }
    })
}

/// A client of the configured CA.
pub fn ca(config: &AgentConfig) -> anyhow::Result<CaClient> {
    Ok(CaClient::new(CaClientConfig {
        address: config.control_plane.ca().into(),
        server_name: None,
        root_file: config.control_plane.root_ca.clone(),
        token_file: config.control_plane.token.clone(),
        cluster_id: config.node.cluster.clone(),
        timeout: SOURCE_TIMEOUT,
    })?)
}

/// The configured key exchanges.
pub fn key_exchange(config: &AgentConfig) -> KeyExchangePolicy {
    match config.identity.key_exchange {
        KeyExchange::PreferPostQuantum => KeyExchangePolicy::PreferPostQuantum,
        KeyExchange::RequirePostQuantum => KeyExchangePolicy::RequirePostQuantum,
    }
}

/// Reads the revocation lists, again whenever they change, and ends the live streams of
/// peers whose certificate was taken back.
pub fn watch(agent: &Arc<Agent>, tasks: &mut JoinSet<()>) -> anyhow::Result<()> {
    for list in &agent.config.identity.revocation_lists {
        let domain = TrustDomain::parse(&list.trust_domain)?;
        let mut changes = FileChanges::of(&list.file)?;
        let (agent, file) = (agent.clone(), list.file.clone());
        tasks.spawn(async move {
            loop {
                read_list(&agent, &domain, &file);
                changes.next().await;
            }
        });
    }
    let agent = agent.clone();
    let mut changes = agent.trust.changes();
    tasks.spawn(async move {
        loop {
            // A list also ends by itself, at its `nextUpdate`.
            let waited = tokio::time::timeout(Duration::from_secs(5), changes.changed()).await;
            if matches!(waited, Err(_) | Ok(TrustChange::Revocation)) {
                cut_revoked(&agent);
            }
        }
    });
    Ok(())
}

/// Why a file of revocation lists, as it is now, is not in use; by file.
#[derive(Debug, Default)]
pub struct ListProblems(Mutex<BTreeMap<PathBuf, String>>);

impl ListProblems {
    fn set(&self, file: &Path, problem: Option<String>) {
        let mut problems = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match problem {
            Some(problem) => problems.insert(file.to_owned(), problem),
            None => problems.remove(file),
        };
    }

    fn of(&self, file: &Path) -> Option<String> {
        let problems = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        problems.get(file).cloned()
    }
}

/// The configured files of revocation lists, for the status page.
pub fn describe_lists(agent: &Agent) -> Vec<status::RevocationList> {
    let (held, now) = (agent.trust.revocation().snapshot(), status::now());
    let configured = agent.config.identity.revocation_lists.iter();
    configured
        .map(|list| {
            let source = source_name(&list.file);
            let lists = held
                .iter()
                .filter(|h| h.source == source && h.trust_domain.as_str() == list.trust_domain);
            let next_update = lists.clone().map(|h| h.next_update).min();
            let state = match next_update {
                None => "missing",
                Some(at) if at <= now.cast_signed() => "expired",
                Some(_) => "in-force",
            };
            status::RevocationList {
                trust_domain: list.trust_domain.clone(),
                file: source.clone(),
                state: state.into(),
                revoked: lists.map(|h| h.revoked).sum(),
                next_update,
                error: agent.list_problems.of(&list.file),
            }
        })
        .collect()
}

fn read_list(agent: &Agent, domain: &TrustDomain, file: &Path) {
    let source = source_name(file);
    let read = std::fs::read(file)
        .map_err(|error| error.to_string())
        .and_then(|content| {
            let replaced = agent.trust.revocation().replace(&source, domain, &content);
            replaced.map_err(|error| error.to_string())
        });
    agent.list_problems.set(file, read.as_ref().err().cloned());
    match read {
        Ok(true) => {
            tracing::info!(%domain, file = %file.display(), "revocation lists are in force")
        }
        Ok(false) => {}
        // The lists before stay in force until their own end; without any the domain is closed.
        Err(error) => {
            tracing::error!(%domain, file = %file.display(), error, "revocation lists cannot be used");
        }
    }
}

fn cut_revoked(agent: &Agent) {
    let now = SystemTime::now();
    let number = agent.activity.cut(|stream| {
        let refused = agent.trust.revoked(stream.session.peer(), now).is_err();
        refused.then_some(ResetReason::Revoked)
    });
    if number > 0 {
        tracing::info!(number, "live streams of revoked certificates: ended");
    }
}

fn source_name(file: &Path) -> String {
    file.display().to_string()
}
