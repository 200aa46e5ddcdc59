//! Which policies the kernel goes by, for status.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringfence_policies::{Policy, PolicyStore, RejectedPolicy};

use crate::status;

/// The policies that the kernel goes by: later than what was received by as
/// long as it takes to put it in place.
#[derive(Debug, Default)]
pub struct InForce(Mutex<BTreeMap<String, Stood>>);

#[derive(Debug)]
enum Stood {
    Usable(Arc<Policy>),
    Rejected(Arc<RejectedPolicy>),
}

impl InForce {
    /// All of `store` is in force.
    pub fn reset(&self, store: &PolicyStore) {
        let usable = store
            .policies()
            .map(|policy| (policy.name.to_string(), Stood::Usable(policy.clone())));
        let rejected = store
            .rejected()
            .map(|policy| (policy.name.to_string(), Stood::Rejected(policy.clone())));
        *self.lock() = usable.chain(rejected).collect();
    }

    /// What `store` has, or has not, under these names is in force.
    pub fn update<'a>(&self, store: &PolicyStore, names: impl IntoIterator<Item = &'a String>) {
        let mut in_force = self.lock();
        for name in names {
            let Ok(parsed) = name.parse() else { continue };
            let stood = match (store.policy(&parsed), store.rejected_policy(&parsed)) {
                (Some(policy), _) => Stood::Usable(policy.clone()),
                (None, Some(policy)) => Stood::Rejected(policy.clone()),
                (None, None) => {
                    in_force.remove(name);
                    continue;
                }
            };
            in_force.insert(name.clone(), stood);
        }
    }

    /// The lines of the status page.
    pub fn describe(&self) -> Vec<status::Policy> {
        let describe = |(name, stood): (&String, &Stood)| status::Policy {
            name: name.clone(),
            summary: match stood {
                Stood::Usable(policy) => policy.summary().to_string(),
                Stood::Rejected(policy) => {
                    format!("REJECTED, closes its workloads: {}", policy.error)
                }
            },
        };
        self.lock().iter().map(describe).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Stood>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
