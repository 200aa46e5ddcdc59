//! Notices that a file changed.

use std::path::{Path, PathBuf};

use anyhow::Context;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// Changes of one file. The folder is watched, because editors and atomic writers replace
/// the file by another one. In the folder of a ConfigMap the file is a link that never
/// changes, to a folder whose link does.
#[derive(Debug)]
pub struct FileChanges {
    _watcher: RecommendedWatcher,
    changes: mpsc::Receiver<()>,
}

impl FileChanges {
    /// Watches `file`.
    pub fn of(file: &Path) -> anyhow::Result<Self> {
        let file = std::path::absolute(file)?;
        let folder = file.parent().context("a file has a folder")?.to_owned();
        // One pending change is as good as many: the file is read as a whole.
        let (sender, changes) = mpsc::channel(1);
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                let named = |path: &PathBuf| *path == file || path.ends_with(CONFIG_MAP_LINK);
                // An error may stand for events that were lost.
                let concerns = event.map_or(true, |event| {
                    event.need_rescan() || !event.kind.is_access() && event.paths.iter().any(named)
                });
                if concerns {
                    // A full channel already says so.
                    let _ = sender.try_send(());
                }
            })?;
        watcher
            .watch(&folder, RecursiveMode::NonRecursive)
            .with_context(|| format!("cannot watch {}", folder.display()))?;
        Ok(FileChanges {
            _watcher: watcher,
            changes,
        })
    }

    /// Completes at the next change.
    pub async fn next(&mut self) {
        if self.changes.recv().await.is_none() {
            // The watcher is gone: there is nothing to report any more.
            std::future::pending().await
        }
    }
}

/// What the kubelet renames when a ConfigMap or Secret changes.
const CONFIG_MAP_LINK: &str = "..data";
