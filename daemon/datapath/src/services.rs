//! Service addresses and their backends.
//!
//! A program looks up the service, picks an index, and looks up the backend. A changed
//! service gets a new id: its backends are written under it first, then the service is
//! pointed at it, then the old ones go. A program in between finds the old backends, or
//! none, and looks the service up again.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::maps::Map;
use ringfence_bpf_common::{Backend, BackendKey, Service, ServiceKey};

use crate::{Datapath, DatapathError, table::Table};

impl Datapath {
    /// Sets the backends of a service. None at all: connections to it are refused.
    pub fn put_service(&self, key: ServiceKey, backends: &[Backend]) -> Result<(), DatapathError> {
        self.services.put(key, backends)
    }

    /// Forgets the service: its address is one like any other.
    pub fn remove_service(&self, key: &ServiceKey) -> Result<(), DatapathError> {
        self.services.remove(key)
    }

    /// All services, also those that an earlier agent wrote.
    pub fn services(&self) -> Result<Vec<ServiceKey>, DatapathError> {
        self.services.services.keys()
    }
}

#[derive(Debug)]
pub(crate) struct Services {
    services: Table<ServiceKey, Service>,
    backends: Table<BackendKey, Backend>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    services: HashMap<ServiceKey, Service>,
    ids: HashSet<u32>,
    last_id: u32,
}

impl Services {
    /// Takes over what is pinned, and removes backends that no service uses (an agent
    /// was killed in the middle of a change).
    pub(crate) fn new(services: Map, backends: Map) -> Result<Self, DatapathError> {
        let services = Table::new("SERVICES", services)?;
        let backends: Table<BackendKey, Backend> = Table::new("BACKENDS", backends)?;
        let mut known = Known::default();
        for (key, service) in services.entries()? {
            known.insert(key, service);
        }
        for key in backends.keys()? {
            if !known.ids.contains(&key.service) {
                backends.remove(&key)?;
            }
        }
        Ok(Services {
            services,
            backends,
            known: Mutex::new(known),
        })
    }

    fn put(&self, key: ServiceKey, backends: &[Backend]) -> Result<(), DatapathError> {
        let mut known = self.known();
        let count =
            u32::try_from(backends.len()).map_err(|_| DatapathError::Full { table: "BACKENDS" })?;
        let service = Service {
            id: known.free_id(),
            backends: count,
        };
        let written = (0..)
            .zip(backends)
            .try_for_each(|(index, backend)| {
                self.backends.put(
                    &BackendKey {
                        service: service.id,
                        index,
                    },
                    backend,
                )
            })
            .and_then(|()| self.services.put(&key, &service));
        if let Err(error) = written {
            // The old ones stay in force.
            self.remove_backends(&service)?;
            return Err(error);
        }
        let old = known.insert(key, service);
        old.map_or(Ok(()), |old| self.remove_backends(&old))
    }

    pub(crate) fn contains(&self, key: &ServiceKey) -> bool {
        self.known().services.contains_key(key)
    }

    fn remove(&self, key: &ServiceKey) -> Result<(), DatapathError> {
        let mut known = self.known();
        self.services.remove(key)?;
        match known.services.remove(key) {
            Some(old) => {
                known.ids.remove(&old.id);
                self.remove_backends(&old)
            }
            None => Ok(()),
        }
    }

    fn remove_backends(&self, service: &Service) -> Result<(), DatapathError> {
        (0..service.backends).try_for_each(|index| {
            self.backends.remove(&BackendKey {
                service: service.id,
                index,
            })
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Remembers the service and returns the one it replaces.
    fn insert(&mut self, key: ServiceKey, service: Service) -> Option<Service> {
        self.ids.insert(service.id);
        self.last_id = self.last_id.max(service.id);
        let old = self.services.insert(key, service);
        if let Some(old) = old {
            self.ids.remove(&old.id);
        }
        old
    }

    /// An id that no service has. It is not one that was used a moment ago either, so
    /// that a program in between does not find another service's backends.
    fn free_id(&mut self) -> u32 {
        loop {
            self.last_id = self.last_id.wrapping_add(1);
            if !self.ids.contains(&self.last_id) {
                return self.last_id;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_bpf_common::Addr;

    #[test]
    fn ids_in_use_are_not_given_again_when_they_wrap() {
        let mut known = Known::default();
        let key = ServiceKey::new(Addr::v4([10, 0, 0, 1]), 80);
        known.insert(
            key,
            Service {
                id: u32::MAX,
                backends: 1,
            },
        );
        assert_eq!(known.free_id(), 0);
        assert_eq!(known.free_id(), 1);
        known.last_id = u32::MAX - 1;
        assert_eq!(known.free_id(), 0, "u32::MAX is taken");
    }

    #[test]
    fn replaced_service_frees_its_id() {
        let mut known = Known::default();
        let key = ServiceKey::new(Addr::v4([10, 0, 0, 1]), 80);
        let old = Service {
            id: known.free_id(),
            backends: 2,
        };
        assert_eq!(known.insert(key, old), None);
        let new = Service {
            id: known.free_id(),
            backends: 1,
        };
        assert_eq!(known.insert(key, new), Some(old));
        assert!(!known.ids.contains(&old.id) && known.ids.contains(&new.id));
    }
}
