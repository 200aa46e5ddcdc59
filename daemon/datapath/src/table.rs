//! A kernel hash map with a name for messages, usable from many threads.

use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData, MapError},
};

use crate::DatapathError;

#[derive(Debug)]
pub(crate) struct Table<K: Pod, V: Pod> {
    name: &'static str,
    map: Mutex<HashMap<MapData, K, V>>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    pub(crate) fn new(name: &'static str, map: Map) -> Result<Self, DatapathError> {
        let map = HashMap::try_from(map).map_err(|e| table_error("open", name, e))?;
        Ok(Table {
            name,
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

/// Above the size of the largest table (262 144).
pub(crate) const MOST_KEYS: usize = 1 << 20;

pub(crate) fn table_error(
    action: &'static str,
    table: &'static str,
    error: MapError,
) -> DatapathError {
    match errno(&error) {
        Some(libc::E2BIG | libc::ENOSPC) => DatapathError::Full { table },
        _ => DatapathError::Table {
            action,
            table,
            source: Box::new(error),
        },
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
