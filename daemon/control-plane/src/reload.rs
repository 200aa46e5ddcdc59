//! Notices that the mesh file, a token file, a manifest or the CA's roots have changed.
//!
//! Folders are watched, not files: editors and Kubernetes replace a file by
//! renaming another one over it, after which a watch on the file sees nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use crate::auth::TokenHasher;
use crate::ca::{Ca, CaError};
use crate::config::{ConfigError, MeshConfig};
use crate::state::MeshState;

/// How the last look at the mesh file and at the roots ended.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ReloadStatus {
    /// Counts the states that were put in force; the first is 1.
    pub generation: u64,
    /// When the state in force was read.
    pub loaded: SystemTime,
    /// Why a newer file is not in force.
    pub rejected: Option<Arc<str>>,
    /// Counts the sets of roots that were put in force; the first is 1.
    pub root_generation: u64,
    /// Why newer roots are not in force.
    pub roots_rejected: Option<Arc<str>>,
}

/// Why a changed mesh file was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReloadError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{}: {field}: cannot be changed while the control plane runs: restart it", path.display())]
    NeedsRestart { path: PathBuf, field: &'static str },
}

pub(crate) struct Reloader {
    path: PathBuf,
    hasher: Arc<TokenHasher>,
    ca: Arc<Ca>,
    state: watch::Sender<Arc<MeshState>>,
    status: watch::Sender<ReloadStatus>,
    watcher: RecommendedWatcher,
    /// Device and inode tell a folder from another one that took its place.
    watched: BTreeMap<PathBuf, (u64, u64)>,
    events: mpsc::Receiver<()>,
}

impl Reloader {
    pub(crate) fn new(
        path: PathBuf,
        hasher: TokenHasher,
        ca: Arc<Ca>,
        state: watch::Sender<Arc<MeshState>>,
        status: watch::Sender<ReloadStatus>,
    ) -> notify::Result<Self> {
        let (sender, events) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the file is an event too; an error may have lost others.
            if event.map_or(true, |event| !event.kind.is_access()) {
                // Full: a look is due anyway.
                let _ = sender.try_send(());
            }
        })?;
        let mut reloader = Self {
            path,
            hasher: Arc::new(hasher),
            ca,
            state,
            status,
            watcher,
            watched: BTreeMap::new(),
            events,
        };
        reloader.watch_folders(BTreeSet::new())?;
        Ok(reloader)
    }

    pub(crate) async fn run(mut self) {
        // The file may have changed between the first load and the watch.
        self.look().await;
        while self.events.recv().await.is_some() {
            self.settle().await;
            self.look().await;
        }
    }

    /// Waits until the writer is done: an editor causes several events.
    async fn settle(&mut self) {
        let latest = Instant::now() + LONGEST_SETTLE;
        loop {
            let quiet = (Instant::now() + QUIET).min(latest);
            match timeout_at(quiet, self.events.recv()).await {
                Ok(Some(())) if Instant::now() < latest => {}
                _ => return,
            }
        }
    }

    async fn look(&mut self) {
        // What changed in a folder before it was watched was not seen.
        while self.look_once().await {}
    }

    /// Whether a folder is watched now that was not before.
    async fn look_once(&mut self) -> bool {
        let (path, hasher, ca) = (self.path.clone(), self.hasher.clone(), self.ca.clone());
        let current = self.state.borrow().clone();
        // Files are read and written, and keys parsed.
        let looked = tokio::task::spawn_blocking(move || look(&path, &hasher, &ca, &current));
        match looked.await {
            Ok(Look { roots, mesh }) => {
                self.take_roots(roots);
                // They may be named by a mesh file that is not in force because of them.
                let wrong = match &mesh {
                    Err(ReloadError::Config(error)) => error.files().map(folder_of).collect(),
                    _ => BTreeSet::new(),
                };
                self.take_mesh(mesh);
                self.watch_folders(wrong).unwrap_or_else(|error| {
                    tracing::error!(%error, "cannot watch a folder of the configuration: its changes go unseen");
                    false
                })
            }
            Err(error) => {
                tracing::error!(%error, "a look at the files failed");
                false
            }
        }
    }

    fn take_roots(&self, roots: Result<bool, CaError>) {
        let rejected = match roots {
            Ok(changed) => {
                if changed {
                    let phase = self.ca.roots().phase;
                    tracing::info!(rotation = %phase, "roots changed; new ones in force");
                }
                self.status.send_if_modified(|status| {
                    status.root_generation += u64::from(changed);
                    status.roots_rejected.take().is_some() || changed
                });
                return;
            }
            Err(error) => error.to_string(),
        };
        let known = self.status.borrow().roots_rejected.as_deref() == Some(rejected.as_str());
        if !known {
            tracing::error!("changed roots not taken, the previous ones stay in force: {rejected}");
            self.status
                .send_modify(|status| status.roots_rejected = Some(rejected.into()));
        }
    }

    fn take_mesh(&self, mesh: Result<Option<MeshState>, ReloadError>) {
        match mesh {
            Ok(None) => self.clear_rejection(),
            Ok(Some(next)) => {
                let workloads = next.config().workloads.len();
                tracing::info!(path = %self.path.display(), workloads, "mesh file changed; new state in force");
                self.state.send_replace(Arc::new(next));
                self.status.send_modify(|status| {
                    status.generation += 1;
                    status.loaded = SystemTime::now();
                    status.rejected = None;
                });
            }
            Err(error) => self.reject(&error.to_string()),
        }
    }

    fn reject(&self, reason: &str) {
        let known = self.status.borrow().rejected.as_deref() == Some(reason);
        if known {
            return;
        }
        tracing::error!("mesh file not taken, the previous state stays in force:\n{reason}");
        self.status
            .send_modify(|status| status.rejected = Some(reason.into()));
    }

    fn clear_rejection(&self) {
        self.status
            .send_if_modified(|status| status.rejected.take().is_some());
    }

    /// The folders of the state in force, and `more`. Whether one is new.
    fn watch_folders(&mut self, more: BTreeSet<PathBuf>) -> notify::Result<bool> {
        let state = self.state.borrow().clone();
        let config = state.config();
        let files = std::iter::once(self.path.as_path()).chain(config.token_files());
        let mut folders = more;
        folders.extend(files.map(folder_of));
        folders.extend(config.manifest_folders.iter().cloned());
        folders.insert(self.ca.state_dir().to_owned());
        let mut new = false;
        for folder in folders {
            // A folder that is gone has a parent that is watched.
            let Ok(metadata) = folder.metadata() else {
                self.watched.remove(&folder);
                continue;
            };
            let identity = (metadata.dev(), metadata.ino());
            if self.watched.get(&folder) != Some(&identity) {
                self.watcher.watch(&folder, RecursiveMode::NonRecursive)?;
                self.watched.insert(folder, identity);
                new = true;
            }
        }
        Ok(new)
    }
}

/// What a look at the files found.
struct Look {
    /// Changed? They are in force already.
    roots: Result<bool, CaError>,
    /// `None`: nothing changed.
    mesh: Result<Option<MeshState>, ReloadError>,
}

fn look(path: &Path, hasher: &TokenHasher, ca: &Ca, current: &MeshState) -> Look {
    let roots = ca.reload();
    let mesh = load(path, hasher, current);
    // Before anything is issued under a longer lifetime.
    let svid_ttl = match &mesh {
        Ok(Some(next)) => next.svid_ttl().max(current.svid_ttl()),
        _ => current.svid_ttl(),
    };
    if let Err(error) = ca.record_served(svid_ttl) {
        tracing::error!(%error, "cannot record what is served: rotations of the root will be refused");
    }
    Look { roots, mesh }
}

fn load(
    path: &Path,
    hasher: &TokenHasher,
    current: &MeshState,
) -> Result<Option<MeshState>, ReloadError> {
    let loaded = MeshConfig::load(path)?;
    let (old, new) = (current.config(), &loaded.config);
    if *old == *new {
        return Ok(None);
    }
    for (field, same) in [
        ("listen", old.listen == new.listen),
        ("state_dir", old.state_dir == new.state_dir),
        ("trust_domain", old.trust_domain == new.trust_domain),
    ] {
        if !same {
            return Err(ReloadError::NeedsRestart {
                path: path.to_owned(),
                field,
            });
        }
    }
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    Ok(Some(MeshState::new(loaded.config, hasher)))
}

fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

const QUIET: Duration = Duration::from_millis(50);
const LONGEST_SETTLE: Duration = Duration::from_secs(1);
