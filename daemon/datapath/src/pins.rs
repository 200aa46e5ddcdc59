//! The pin folder: where it is, and how it goes away.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use ringfence_bpf_common::LAYOUT_VERSION;

use crate::{DatapathError, guard::remove_filters, sys};

/// Where distributions mount the BPF file system.
const USUAL_BPFFS: &str = "/sys/fs/bpf";

/// Detaches and removes everything that was pinned below `pin_dir`, whatever its
/// version. The pods are not protected afterwards. A missing folder is no error.
///
/// Guards that are filters are looked for in the calling thread's network namespace; those
/// of another one stay, and let everything pass.
pub fn remove(pin_dir: &Path) -> Result<(), DatapathError> {
    let entries = match fs::read_dir(pin_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(path_error("read", pin_dir, source)),
    };
    // A slip in a path must not delete files of another kind.
    require_bpffs(pin_dir)?;
    for entry in entries {
        let entry = entry.map_err(|source| path_error("read", pin_dir, source))?;
        let path = entry.path();
        if is_layout(&entry.file_name().to_string_lossy()) {
            forget_pods(&path.join(POD_TABLE))?;
            for folder in [LINKS, PODS, GUARDS] {
                remove_links(&path.join(folder))?;
            }
            remove_filters(&path.join(FILTERS))?;
            fs::remove_dir_all(&path).map_err(|source| path_error("remove", &path, source))?;
        }
    }
    match fs::remove_dir(pin_dir) {
        // Something that is not ours is pinned there too.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(()),
        other => other.map_err(|source| path_error("remove", pin_dir, source)),
    }
}

/// Detaches a pinned link and removes its pin. A missing one is no error.
pub(crate) fn remove_link(pin: &Path) -> Result<(), DatapathError> {
    let link = match sys::open_pin(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(path_error("open the pinned link", pin, source)),
    };
    // A dead link has nothing to detach; what it hung on is gone.
    match sys::detach_link(link.as_fd()) {
        Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => {
            return Err(path_error("detach the pinned link", pin, error));
        }
        _ => {}
    }
    fs::remove_file(pin).map_err(|source| path_error("remove", pin, source))
}

/// Without an entry of its pod, a program that stays somewhere decides nothing.
fn forget_pods(table: &Path) -> Result<(), DatapathError> {
    let map = match sys::open_pin(table) {
        Ok(map) => map,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(path_error("open the pinned map", table, source)),
    };
    while let Some(cookie) = sys::first_key::<u64>(map.as_fd())
        .map_err(|source| path_error("read the pinned map", table, source))?
    {
        sys::delete_batch(map.as_fd(), &[cookie])
            .map_err(|source| path_error("empty the pinned map", table, source))?;
    }
    Ok(())
}

fn remove_links(folder: &Path) -> Result<(), DatapathError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(path_error("read", folder, source)),
    };
    for entry in entries {
        remove_link(
            &entry
                .map_err(|source| path_error("read", folder, source))?
                .path(),
        )?;
    }
    Ok(())
}

/// The map of enrolled pods; its key is 8 bytes long in every layout.
const POD_TABLE: &str = "PODS";
const LINKS: &str = "links";
const PODS: &str = "pods";
const GUARDS: &str = "guards";
const FILTERS: &str = "filters";

/// The pin folder of this version.
#[derive(Debug, Clone)]
pub(crate) struct Pins {
    root: PathBuf,
}

impl Pins {
    /// Makes the folders, mounting the BPF file system if its usual place is bare.
    pub(crate) fn prepare(pin_dir: &Path) -> Result<Pins, DatapathError> {
        if !is_bpffs(existing_part(pin_dir))? {
            let usual = Path::new(USUAL_BPFFS);
            if !pin_dir.starts_with(usual) || !usual.is_dir() {
                return Err(DatapathError::NoBpfFs {
                    path: pin_dir.into(),
                });
            }
            mount(
                Some("bpf"),
                usual,
                Some("bpf"),
                MsFlags::empty(),
                None::<&str>,
            )
            .map_err(|errno| path_error("mount a BPF file system on", usual, errno.into()))?;
        }
        let pins = Pins {
            root: pin_dir.join(format!("v{LAYOUT_VERSION}")),
        };
        for folder in [
            pins.root.clone(),
            pins.links(),
            pins.pods(),
            pins.guards(),
            pins.filters(),
        ] {
            fs::create_dir_all(&folder).map_err(|source| path_error("create", &folder, source))?;
        }
        pins.refuse_other_layouts(pin_dir)?;
        Ok(pins)
    }

    /// Where the maps are.
    pub(crate) fn maps(&self) -> &Path {
        &self.root
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn links(&self) -> PathBuf {
        self.root.join(LINKS)
    }

    pub(crate) fn link(&self, hook: &str) -> PathBuf {
        self.links().join(hook)
    }

    pub(crate) fn pods(&self) -> PathBuf {
        self.root.join(PODS)
    }

    /// One link per enrolled pod, device and direction.
    pub(crate) fn guards(&self) -> PathBuf {
        self.root.join(GUARDS)
    }

    /// The same where there are filters instead of links: the programs are pinned.
    pub(crate) fn filters(&self) -> PathBuf {
        self.root.join(FILTERS)
    }

    pub(crate) fn pod(&self, cookie: u64) -> PathBuf {
        self.pods().join(cookie.to_string())
    }

    /// Two versions of the programs one after the other would refuse what the first
    /// one redirected.
    fn refuse_other_layouts(&self, pin_dir: &Path) -> Result<(), DatapathError> {
        for entry in fs::read_dir(pin_dir).map_err(|source| path_error("read", pin_dir, source))? {
            let path = entry
                .map_err(|source| path_error("read", pin_dir, source))?
                .path();
            let name = path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            if path != self.root && name.is_some_and(|name| is_layout(&name)) {
                return Err(DatapathError::OtherLayout { path });
            }
        }
        Ok(())
    }
}

pub(crate) fn path_error(action: &'static str, path: &Path, source: io::Error) -> DatapathError {
    DatapathError::Path {
        action,
        path: path.into(),
        source,
    }
}

fn is_layout(name: &str) -> bool {
    name.strip_prefix('v')
        .is_some_and(|digits| digits.parse::<u32>().is_ok())
}

/// The longest part of the path that exists.
fn existing_part(path: &Path) -> &Path {
    path.ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(path)
}

fn is_bpffs(path: &Path) -> Result<bool, DatapathError> {
    let info = statfs(path).map_err(|errno| path_error("inspect", path, errno.into()))?;
    Ok(info.filesystem_type() == BPF_FS_MAGIC)
}

fn require_bpffs(path: &Path) -> Result<(), DatapathError> {
    if is_bpffs(path)? {
        Ok(())
    } else {
        Err(DatapathError::NoBpfFs { path: path.into() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn only_layout_folders_are_ours() {
        assert!(is_layout("v1") && is_layout("v20"));
        assert!(!is_layout("v") && !is_layout("vx") && !is_layout("1") && !is_layout("cilium"));
    }

    #[test]
    fn removing_what_is_on_another_file_system_is_refused() {
        let folder = std::env::temp_dir().join(format!("ringfence-pins-{}", std::process::id()));
        fs::create_dir_all(folder.join("v1")).unwrap();
        assert!(matches!(
            remove(&folder),
            Err(DatapathError::NoBpfFs { .. })
        ));
        assert!(folder.join("v1").exists());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn removing_nothing_is_no_error() {
        remove(Path::new("/nonexistent/ringfence")).unwrap();
    }
}
