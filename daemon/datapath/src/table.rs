//! A kernel hash map with a name for messages, usable from many threads.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};

use crate::{DatapathError, sys};

#[derive(Debug)]
pub(crate) struct Table<K: Pod, V: Pod> {
    name: &'static str,
    fd: OwnedFd,
    map: Mutex<HashMap<MapData, K, V>>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    pub(crate) fn new(name: &'static str, map: Map) -> Result<Self, DatapathError> {
        let fd = descriptor(name, &map)?;
        let map = HashMap::try_from(map).map_err(|e| table_error("open", name, e))?;
        Ok(Table {
            name,
            fd,
            map: Mutex::new(map),
        })
    }

    pub(crate) fn get(&self, key: &K) -> Result<Option<V>, DatapathError> {
        match self.map().get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(table_error("read", self.name, error)),
        }
    }

    pub(crate) fn put(&self, key: &K, value: &V) -> Result<(), DatapathError> {
        self.map()
            .insert(key, value, 0)
            .map_err(|e| table_error("write to", self.name, e))
    }

    /// Writes many entries; some may have been written when this fails.
    pub(crate) fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), DatapathError> {
        put_all(self.name, self.fd.as_fd(), keys, values, |key, value| {
            self.put(key, value)
        })
    }

    /// Removes many entries. A missing one is no error.
    pub(crate) fn remove_all(&self, keys: &[K]) -> Result<(), DatapathError> {
        remove_all(self.fd.as_fd(), keys, |key| self.remove(key))
    }

    /// A missing entry is no error.
    pub(crate) fn remove(&self, key: &K) -> Result<(), DatapathError> {
        match self.map().remove(key) {
            Err(error) if !is_missing(&error) => Err(table_error("remove from", self.name, error)),
            _ => Ok(()),
        }
    }

    /// All keys. An entry that comes or goes meanwhile may be missed or seen twice.
    pub(crate) fn keys(&self) -> Result<Vec<K>, DatapathError> {
        self.map()
            .keys()
            // The walk begins again when the key it stands on is removed.
            .take(MOST_KEYS)
            .collect::<Result<_, _>>()
            .map_err(|e| table_error("list", self.name, e))
    }

    /// All entries, with the same caveat.
    pub(crate) fn entries(&self) -> Result<Vec<(K, V)>, DatapathError> {
        let mut entries = Vec::new();
        for key in self.keys()? {
            if let Some(value) = self.get(&key)? {
                entries.push((key, value));
            }
        }
        Ok(entries)
    }

    fn map(&self) -> MutexGuard<'_, HashMap<MapData, K, V>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A kernel array with a name for messages.
pub(crate) struct Elements<V: Pod> {
    name: &'static str,
    fd: OwnedFd,
    array: Mutex<Array<MapData, V>>,
    length: u32,
}

impl<V: Pod> Elements<V> {
    pub(crate) fn new(name: &'static str, map: Map) -> Result<Self, DatapathError> {
        let fd = descriptor(name, &map)?;
        let array = Array::try_from(map).map_err(|e| table_error("open", name, e))?;
        Ok(Elements {
            name,
            fd,
            length: array.len(),
            array: Mutex::new(array),
        })
    }

    /// The number of elements.
    pub(crate) fn len(&self) -> u32 {
        self.length
    }

    /// Writes many elements; some may have been written when this fails.
    pub(crate) fn put_all(&self, indices: &[u32], values: &[V]) -> Result<(), DatapathError> {
        put_all(
            self.name,
            self.fd.as_fd(),
            indices,
            values,
            |index, value| {
                let mut array = self.array.lock().unwrap_or_else(PoisonError::into_inner);
                array
                    .set(*index, value, 0)
                    .map_err(|e| table_error("write to", self.name, e))
            },
        )
    }

    /// All elements are taken.
    pub(crate) fn full(&self) -> DatapathError {
        DatapathError::Full { table: self.name }
    }
}

impl<V: Pod> fmt::Debug for Elements<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Elements")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Above the size of the largest table (1 048 576).
pub(crate) const MOST_KEYS: usize = 1 << 21;

/// A descriptor of its own for what aya has no method for.
pub(crate) fn descriptor(name: &'static str, map: &Map) -> Result<OwnedFd, DatapathError> {
    match map {
        Map::HashMap(data) | Map::Array(data) => data
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|e| table_error("open", name, MapError::IoError(e))),
        _ => Err(DatapathError::Missing { name }),
    }
}

/// How many entries the table holds at most.
pub(crate) fn room(name: &'static str, map: &Map) -> Result<usize, DatapathError> {
    match map {
        Map::HashMap(data) | Map::Array(data) => data
            .info()
            .map(|info| info.max_entries() as usize)
            .map_err(|e| table_error("inspect", name, e)),
        _ => Err(DatapathError::Missing { name }),
    }
}

/// Writes entries by one system call where the kernel can, and by one each elsewhere.
pub(crate) fn put_all<K: Pod, V: Pod>(
    name: &'static str,
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
    mut put: impl FnMut(&K, &V) -> Result<(), DatapathError>,
) -> Result<(), DatapathError> {
    if keys.len() > 1 {
        match sys::update_batch(map, keys, values) {
            Ok(()) => return Ok(()),
            Err(error) if is_full(error.raw_os_error()) => {
                return Err(DatapathError::Full { table: name });
            }
            Err(error) => tracing::trace!(%error, table = name, "no batch"),
        }
    }
    keys.iter().zip(values).try_for_each(|(k, v)| put(k, v))
}

/// Removes entries by one system call where the kernel can, and by one each elsewhere.
pub(crate) fn remove_all<K: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    remove: impl FnMut(&K) -> Result<(), DatapathError>,
) -> Result<(), DatapathError> {
    if keys.len() > 1 && sys::delete_batch(map, keys).is_ok() {
        return Ok(());
    }
    keys.iter().try_for_each(remove)
}

fn is_full(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::E2BIG | libc::ENOSPC))
}

pub(crate) fn table_error(
    action: &'static str,
    table: &'static str,
    error: MapError,
) -> DatapathError {
    if is_full(errno(&error)) {
        return DatapathError::Full { table };
    }
    DatapathError::Table {
        action,
        table,
        source: Box::new(error),
    }
}

pub(crate) fn is_missing(error: &MapError) -> bool {
    matches!(error, MapError::KeyNotFound) || errno(error) == Some(libc::ENOENT)
}

fn errno(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}
