//! Notices that the mesh file, or a token file, has changed.
//!
//! Folders are watched, not files: editors and Kubernetes replace a file by
//! renaming another one over it, after which a watch on the file sees nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use crate::auth::TokenHasher;
use crate::config::{ConfigError, MeshConfig};
use crate::state::MeshState;

/// How the last look at the mesh file ended.
#[derive(Debug, Clone)]
pub struct ReloadStatus {
    /// Counts the states that were put in force; the first is 1.
    pub generation: u64,
    /// When the state in force was read.
    pub loaded: SystemTime,
    /// Why a newer file is not in force.
    pub rejected: Option<Arc<str>>,
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
    hasher: TokenHasher,
    state: watch::Sender<Arc<MeshState>>,
    status: watch::Sender<ReloadStatus>,
    watcher: RecommendedWatcher,
    watched: BTreeSet<PathBuf>,
    events: mpsc::Receiver<()>,
}

impl Reloader {
    pub(crate) fn new(
        path: PathBuf,
        hasher: TokenHasher,
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
            hasher,
            state,
            status,
            watcher,
            watched: BTreeSet::new(),
            events,
        };
        reloader.watch_folders()?;
        Ok(reloader)
    }

    pub(crate) async fn run(mut self) {
        // The file may have changed between the first load and the watch.
        self.look();
        while self.events.recv().await.is_some() {
            self.settle().await;
            self.look();
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

    fn look(&mut self) {
        match self.load() {
            Ok(None) => self.clear_rejection(),
            Ok(Some(next)) => {
                let workloads = next.config().workloads.len();
                tracing::info!(path = %self.path.display(), workloads, "mesh file changed; new state in force");
                self.state.send_replace(Arc::new(next));
                self.status.send_modify(|status| {
                    *status = ReloadStatus {
                        generation: status.generation + 1,
                        loaded: SystemTime::now(),
                        rejected: None,
                    };
                });
                if let Err(error) = self.watch_folders() {
                    tracing::error!(%error, "cannot watch a folder of a token file: its changes go unseen");
                }
            }
            Err(error) => self.reject(&error.to_string()),
        }
    }

    /// `None`: nothing changed.
    fn load(&self) -> Result<Option<MeshState>, ReloadError> {
        let loaded = MeshConfig::load(&self.path)?;
        let current = self.state.borrow().clone();
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
                    path: self.path.clone(),
                    field,
                });
            }
        }
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        Ok(Some(MeshState::new(loaded.config, &self.hasher)))
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

    fn watch_folders(&mut self) -> notify::Result<()> {
        let state = self.state.borrow().clone();
        let files = std::iter::once(self.path.as_path()).chain(state.config().token_files());
        for folder in files.map(folder_of).collect::<BTreeSet<_>>() {
            if !self.watched.contains(&folder) {
                self.watcher.watch(&folder, RecursiveMode::NonRecursive)?;
                self.watched.insert(folder);
            }
        }
        Ok(())
    }
}

fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

const QUIET: Duration = Duration::from_millis(50);
const LONGEST_SETTLE: Duration = Duration::from_secs(1);
