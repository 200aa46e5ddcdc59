//! Files of the state directory: written as a whole or not at all, keys for their
//! owner alone, and every change on disk before the next one begins.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rcgen::KeyPair;
use zeroize::Zeroizing;

use super::CaError;

/// User and group that a file is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    pub(crate) fn of(path: &Path) -> Result<Self, CaError> {
        let metadata = std::fs::metadata(path).map_err(|e| io("look at", path, e))?;
        Ok(Self {
            uid: metadata.uid(),
            gid: metadata.gid(),
        })
    }
}

/// Puts a file in place of whatever is there: all of the content or none of it,
/// also after a crash. Without an owner it is the caller's.
pub(crate) fn replace(
    path: &Path,
    content: &[u8],
    mode: u32,
    owner: Option<Owner>,
) -> Result<(), CaError> {
    let fresh = path.with_extension("new");
    // Left by a crash.
    remove(&fresh)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&fresh)
        .map_err(|e| io("create", &fresh, e))?;
    if let Some(owner) = owner
        && Owner::of(&fresh)? != owner
    {
        std::os::unix::fs::fchown(&file, Some(owner.uid), Some(owner.gid))
            .map_err(|e| io("change the owner of", &fresh, e))?;
    }
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(|e| io("write", &fresh, e))?;
    rename(&fresh, path)
}

/// Renames over what is there, durably.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), CaError> {
    std::fs::rename(from, to).map_err(|e| io("create", to, e))?;
    sync_folder_of(to)
}

/// Gives a file a second name, durably.
pub(crate) fn link(from: &Path, to: &Path) -> Result<(), CaError> {
    std::fs::hard_link(from, to).map_err(|e| io("create", to, e))?;
    sync_folder_of(to)
}

/// Overwrites a file and removes it; says whether there was one. On file systems and
/// disks that write elsewhere (copy on write, flash) the old blocks live on until reused.
pub(crate) fn shred(path: &Path) -> Result<bool, CaError> {
    let mut file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(io("open", path, e)),
    };
    let metadata = file.metadata().map_err(|e| io("look at", path, e))?;
    // Under another name it may be in use.
    if metadata.nlink() == 1 {
        let zeros = vec![0; usize::try_from(metadata.len()).unwrap_or(0)];
        file.write_all(&zeros)
            .and_then(|()| file.sync_all())
            .map_err(|e| io("overwrite", path, e))?;
    }
    remove(path)?;
    sync_folder_of(path)?;
    Ok(true)
}

/// `None`: there is no such file.
pub(crate) fn read_key(path: &Path) -> Result<Option<Zeroizing<KeyPair>>, CaError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io("open", path, e)),
    };
    // Of the open file, so that it cannot be exchanged in between.
    let mode = file
        .metadata()
        .map_err(|e| io("look at", path, e))?
        .permissions()
        .mode()
        & 0o7777;
    if mode & 0o077 != 0 {
        return Err(CaError::KeyExposed {
            path: path.to_owned(),
            mode,
        });
    }
    let pem = std::io::read_to_string(file)
        .map(Zeroizing::new)
        .map_err(|e| io("read", path, e))?;
    let unusable = |e: rcgen::Error| CaError::Unusable {
        path: path.to_owned(),
        reason: e.to_string(),
    };
    KeyPair::from_pem(&pem)
        .map(|key| Some(Zeroizing::new(key)))
        .map_err(unusable)
}

/// Makes sure that one control plane at most uses the directory, for its whole life.
pub(crate) fn lock_for_control_plane(path: &Path) -> Result<File, CaError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| io("open", path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(CaError::Locked {
            path: path.to_owned(),
        }),
        Err(std::fs::TryLockError::Error(e)) => Err(io("lock", path, e)),
    }
}

/// How the directory is locked for the moment of one look or one change. Not by a
/// file in it: one made by root could not be opened by a control plane that is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Change,
}

/// Keeps the files of the roots from changing (or being read) half-way.
/// Whoever has the lock gives it back within the time of a few disk writes.
pub(crate) fn lock_roots(folder: &Path, access: Access) -> Result<File, CaError> {
    let file = File::open(folder).map_err(|e| io("open", folder, e))?;
    let give_up = Instant::now() + LOCK_WAIT;
    loop {
        let locked = match access {
            Access::Read => file.try_lock_shared(),
            Access::Change => file.try_lock(),
        };
        match locked {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::WouldBlock) if Instant::now() < give_up => {
                // There is no lock with a deadline to wait for.
                std::thread::sleep(LOCK_RETRY);
            }
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(CaError::Rotating {
                    path: folder.to_owned(),
                });
            }
            Err(std::fs::TryLockError::Error(e)) => return Err(io("lock", folder, e)),
        }
    }
}

pub(crate) fn remove(path: &Path) -> Result<(), CaError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", path, e)),
        _ => Ok(()),
    }
}

pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> CaError {
    CaError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// A name is durable when its folder is.
fn sync_folder_of(path: &Path) -> Result<(), CaError> {
    let Some(folder) = path.parent() else {
        return Ok(());
    };
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|e| io("write", folder, e))
}

const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(10);
