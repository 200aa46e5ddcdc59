//! SVIDs from files, as cert-manager's CSI driver and others leave them.

mod read;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinHandle;

use crate::bundles::TrustBundles;
use crate::source::{FetchFuture, FetchProblem, Issued, SourceUpdate, SvidSource};
use crate::spiffe_id::WorkloadIdentity;
use crate::template::IdentityTemplate;

/// Where the files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSourceConfig {
    /// Watched with everything below it.
    pub directory: PathBuf,
    /// How identities are spread over it.
    pub layout: FileLayout,
}

/// How identities are spread over a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileLayout {
    /// The directory itself holds the files of the one identity there is.
    Single,
    /// A folder for each identity, relative to the directory, such as
    /// `{namespace}/{service_account}`.
    PerIdentity(IdentityTemplate),
}

/// SVIDs from three PEM files: [`CERTIFICATE_FILE`], [`KEY_FILE`] and
/// [`BUNDLE_FILE`].
///
/// A fetch reads all three and checks that they belong together; a change in the
/// directory announces an update. While a writer is half done the pair does not
/// match: that fetch fails, naming file and reason, and what was read before
/// stays in use.
///
/// The roots of each identity's bundle file are added to the trust bundle of
/// its trust domain until the identity is no longer needed: files of several
/// identities are never replaced all at once.
pub struct FileSource {
    name: String,
    config: FileSourceConfig,
    bundles: Arc<TrustBundles>,
    updates: broadcast::Sender<SourceUpdate>,
    announcer: JoinHandle<()>,
    _watcher: RecommendedWatcher,
}

/// Certificates, leaf first.
pub const CERTIFICATE_FILE: &str = "tls.crt";
/// One private key that is not encrypted: PKCS#8, SEC 1 or PKCS#1.
pub const KEY_FILE: &str = "tls.key";
/// Roots of the identity's trust domain.
pub const BUNDLE_FILE: &str = "ca.crt";

impl FileSource {
    /// Starts to watch, on the current tokio runtime; like `tokio::spawn` this
    /// panics outside of one. The directory must exist, the files need not.
    pub fn start(
        config: FileSourceConfig,
        bundles: Arc<TrustBundles>,
    ) -> Result<Self, FileSourceError> {
        let problem = |error: notify::Error| FileSourceError {
            directory: config.directory.clone(),
            problem: error.to_string(),
        };
        let changed = Arc::new(Notify::new());
        let told = Arc::clone(&changed);
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                // An error may stand for events that were lost.
                if event.map_or(true, |event| is_change(&event.kind)) {
                    told.notify_one();
                }
            })
            .map_err(problem)?;
        watcher
            .watch(&config.directory, RecursiveMode::Recursive)
            .map_err(problem)?;
        let updates = broadcast::Sender::new(16);
        let announcer = tokio::spawn(announce(changed, updates.clone()));
        Ok(Self {
            name: format!("files in {}", config.directory.display()),
            config,
            bundles,
            updates,
            announcer,
            _watcher: watcher,
        })
    }

    fn folder(&self, identity: &WorkloadIdentity) -> PathBuf {
        match &self.config.layout {
            FileLayout::Single => self.config.directory.clone(),
            FileLayout::PerIdentity(template) => {
                self.config.directory.join(template.fill_in(identity))
            }
        }
    }

    /// The key under which an identity's roots are in the trust bundles.
    fn bundle_source(folder: &Path) -> String {
        format!("file {}", folder.join(BUNDLE_FILE).display())
    }

    async fn try_fetch(&self, identity: &WorkloadIdentity) -> Result<Issued, FetchProblem> {
        let folder = self.folder(identity);
        let certificates = read::certificates(&folder.join(CERTIFICATE_FILE)).await?;
        let key = read::key(&folder.join(KEY_FILE)).await?;
        let roots = read::certificates(&folder.join(BUNDLE_FILE)).await?;
        let issued = Issued::checked(identity, certificates, roots, key, SystemTime::now())
            .map_err(|problem| blame(problem, &folder))?;
        let source = Self::bundle_source(&folder);
        self.bundles
            .replace(&source, identity.trust_domain(), &issued.roots)?;
        Ok(issued)
    }
}

impl SvidSource for FileSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch<'a>(&'a self, identity: &'a WorkloadIdentity, _ttl: Duration) -> FetchFuture<'a> {
        Box::pin(async move {
            let fetched = self.try_fetch(identity).await;
            fetched.map_err(|problem| problem.of(identity, &self.name))
        })
    }

    fn updates(&self) -> Option<broadcast::Receiver<SourceUpdate>> {
        Some(self.updates.subscribe())
    }

    fn keeps_bundles(&self) -> bool {
        true
    }

    fn forget(&self, identity: &WorkloadIdentity) {
        let source = Self::bundle_source(&self.folder(identity));
        self.bundles.remove(&source, identity.trust_domain());
    }
}

impl Drop for FileSource {
    fn drop(&mut self) {
        self.announcer.abort();
    }
}

impl std::fmt::Debug for FileSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileSource")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// A directory that cannot be watched: the operator is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("certificate directory {} cannot be watched: {problem}", .directory.display())]
pub struct FileSourceError {
    /// The directory.
    pub directory: PathBuf,
    /// Why.
    pub problem: String,
}

/// Our own reading is no change.
fn is_change(kind: &EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if *access != AccessKind::Close(AccessMode::Write))
}

/// One announcement for the burst of events that one update makes.
async fn announce(changed: Arc<Notify>, updates: broadcast::Sender<SourceUpdate>) {
    loop {
        changed.notified().await;
        while tokio::time::timeout(QUIET, changed.notified())
            .await
            .is_ok()
        {}
        // Nobody needs to listen.
        let _ = updates.send(SourceUpdate::All);
    }
}

/// Names the file that a problem of their combination is about.
fn blame(problem: FetchProblem, folder: &Path) -> FetchProblem {
    let (what, file) = match &problem {
        FetchProblem::BadSvid(crate::svid::SvidError::OtherKey) => {
            return FetchProblem::File {
                what: "key file",
                path: folder.join(KEY_FILE).display().to_string(),
                problem: format!("does not match the first certificate of {CERTIFICATE_FILE}"),
            };
        }
        FetchProblem::BadSvid(_) => ("certificate file", CERTIFICATE_FILE),
        FetchProblem::BadBundle(_) => ("bundle file", BUNDLE_FILE),
        FetchProblem::BadChain(_) => ("certificate file", CERTIFICATE_FILE),
        _ => return problem,
    };
    let detail = match problem {
        FetchProblem::BadSvid(error) => error.to_string(),
        FetchProblem::BadBundle(error) => error.to_string(),
        FetchProblem::BadChain(refusal) => format!(
            "the chain does not hold against the roots of {BUNDLE_FILE} ({})",
            refusal.as_str()
        ),
        other => other.to_string(),
    };
    FetchProblem::File {
        what,
        path: folder.join(file).display().to_string(),
        problem: detail,
    }
}

/// No event for this long ends a burst.
const QUIET: Duration = Duration::from_millis(50);
