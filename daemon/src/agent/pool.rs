//! Idle tunnels, kept for the next stream to the same place.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ktls_offload::Tunnel;
use ringfence_identity::{SpiffeId, TrustStore};

use crate::status;

/// An idle tunnel is closed after this long. Shorter than the server's patience.
const IDLE: Duration = Duration::from_secs(60);
/// Idle tunnels kept for one key.
const PER_KEY: usize = 64;

/// Tunnels are shared by nobody but streams of one source identity, from one namespace,
/// to one destination, under one certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    pub source: SpiffeId,
    pub netns: u64,
    pub destination: IpAddr,
    /// Serial of our certificate: a rotation retires the tunnels of the old one.
    pub serial: String,
}

struct Idle {
    tunnel: Tunnel,
    since: Instant,
}

/// The idle tunnels.
#[derive(Default)]
pub struct Pool(Mutex<HashMap<Key, Vec<Idle>>>);

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

impl Pool {
    /// The idle tunnel used last that is still alive and whose peer is still expected and
    /// not revoked.
    pub fn take(
        &self,
        key: &Key,
        expected: &BTreeSet<SpiffeId>,
        trust: &TrustStore,
    ) -> Option<Tunnel> {
        let (now, wall) = (status::now().cast_signed(), SystemTime::now());
        let aliases = trust.aliases();
        let mut pool = self.lock();
        let idle = pool.get_mut(key)?;
        while let Some(Idle { tunnel, since }) = idle.pop() {
            if since.elapsed() < IDLE
                && tunnel.is_reusable()
                && tunnel.peer().not_after() > now
                && expected.iter().any(|e| aliases.same(e, tunnel.peer().id()))
                && trust.revoked(tunnel.peer(), wall).is_ok()
            {
                return Some(tunnel);
            }
        }
        None
    }

    /// Closes the idle tunnels of an identity that has a new certificate.
    pub async fn retire(&self, source: &SpiffeId, serial: &str) {
        let mut retired = Vec::new();
        self.lock().retain(|key, idle| {
            let old = key.source == *source && key.serial != serial;
            if old {
                retired.append(idle);
            }
            !old
        });
        close(retired).await;
    }

    /// Keeps a tunnel.
    pub fn put(&self, key: Key, tunnel: Tunnel) {
        let mut pool = self.lock();
        let idle = pool.entry(key).or_default();
        if idle.len() < PER_KEY {
            idle.push(Idle {
                tunnel,
                since: Instant::now(),
            });
        }
    }

    /// Closes what has been idle for too long; call it every few seconds.
    pub async fn sweep(&self) {
        let mut stale = Vec::new();
        {
            let mut pool = self.lock();
            for idle in pool.values_mut() {
                let (old, young) = std::mem::take(idle)
                    .into_iter()
                    .partition(|i| i.since.elapsed() >= IDLE);
                *idle = young;
                stale.extend::<Vec<Idle>>(old);
            }
            pool.retain(|_, idle| !idle.is_empty());
        }
        close(stale).await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Vec<Idle>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn close(tunnels: Vec<Idle>) {
    for Idle { tunnel, .. } in tunnels {
        // The peer may be gone already; then there is nothing left to close.
        if let Err(error) = tunnel.close().await {
            tracing::debug!(%error, "idle tunnel");
        }
    }
}
