//! Root rotation: how the CA gets a new root while everything goes on.
//!
//! Three steps, each a command of the operator, safe to repeat, and whole or not begun
//! after a crash: [`prepare`] has both roots trusted, [`switch`] has the new one sign,
//! [`finish`] takes the old one out and destroys its key. The running control plane
//! notices each by itself. A step that would cut somebody off is refused until every
//! SVID from before the last one has expired; `force` overrides that, never the order.
//!
//! What this cannot see: whether the agents' own `root_ca` files were replaced, and
//! whether other trust domains that federate with this one have the new root.
//! See `docs/decisions/root-rotation.md`.

mod report;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::Error;
use crate::ca::files::{self, Access, Owner};
use crate::ca::{self, CaError, KEY_FILE, NEXT_KEY_FILE, OLD_KEY_FILE, ROOT_FILE, Roots, Served};
use crate::config::{Loaded, MeshConfig};

pub use crate::ca::roots::RotationPhase;
pub use report::{NextStep, RootRole, RootSummary, RotationReport};

/// What an operator can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotationStep {
    /// Make the next root; from then on both are trusted.
    Prepare,
    /// Sign with the new root.
    Switch,
    /// Stop trusting the old root and destroy its key.
    Finish,
    /// Look, and change nothing.
    Status,
}

/// Why a step was not taken. The roots are as they were.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("there is no CA in {} yet: start the control plane once", path.display())]
    NoCa { path: PathBuf },
    #[error("`{step}` is not what comes now, the rotation is {phase}: {advice}")]
    WrongOrder {
        step: RotationStep,
        phase: RotationPhase,
        advice: &'static str,
    },
    #[error("`{step}` would cut off agents: the control plane does not serve the roots in {} yet; start it, or look in its log for the reason (--force does it all the same)", path.display())]
    NotServed { step: RotationStep, path: PathBuf },
    #[error("`{step}` would cut off agents until they have refreshed their certificates: wait {}, until {} (--force does it all the same)", report::span(*wait), report::instant(*until))]
    TooEarly {
        step: RotationStep,
        wait: Duration,
        until: SystemTime,
    },
    #[error("the next root expires before it could be used, at {}: remove {NEXT_KEY_FILE} and its certificate in {ROOT_FILE}", report::instant(*not_after))]
    NextExpired { not_after: SystemTime },
}

/// Takes a step in the state directory that a mesh file names. The control plane may
/// run, and should.
pub fn rotate(
    config_path: &Path,
    step: RotationStep,
    force: bool,
) -> Result<RotationReport, Error> {
    let Loaded { config, .. } = MeshConfig::load(config_path)?;
    let (state_dir, trust_domain) = (&config.state_dir, config.trust_domain.as_str());
    Ok(match step {
        RotationStep::Prepare => prepare(state_dir, trust_domain),
        RotationStep::Switch => switch(state_dir, trust_domain, force),
        RotationStep::Finish => finish(state_dir, trust_domain, force),
        RotationStep::Status => status(state_dir, trust_domain),
    }?)
}

/// Makes the next root and its key. Cuts nobody off, at any time.
pub fn prepare(state_dir: &Path, trust_domain: &str) -> Result<RotationReport, RotationError> {
    Rotation::begin(state_dir, trust_domain, SystemTime::now())?.prepare()
}

/// Makes the next root the one that signs.
pub fn switch(
    state_dir: &Path,
    trust_domain: &str,
    force: bool,
) -> Result<RotationReport, RotationError> {
    Rotation::begin(state_dir, trust_domain, SystemTime::now())?.switch(force)
}

/// Takes the old root out of the bundle and destroys its key.
pub fn finish(
    state_dir: &Path,
    trust_domain: &str,
    force: bool,
) -> Result<RotationReport, RotationError> {
    Rotation::begin(state_dir, trust_domain, SystemTime::now())?.finish(force)
}

/// How far a rotation is, and when it can go on.
pub fn status(state_dir: &Path, trust_domain: &str) -> Result<RotationReport, RotationError> {
    let rotation = Rotation::open(state_dir, trust_domain, SystemTime::now(), Access::Read)?;
    rotation.report(false)
}

/// The state directory, locked against other commands.
struct Rotation<'a> {
    state_dir: &'a Path,
    trust_domain: &'a str,
    now: SystemTime,
    _lock: std::fs::File,
}

impl<'a> Rotation<'a> {
    fn begin(
        state_dir: &'a Path,
        trust_domain: &'a str,
        now: SystemTime,
    ) -> Result<Self, RotationError> {
        Self::open(state_dir, trust_domain, now, Access::Change)
    }

    fn open(
        state_dir: &'a Path,
        trust_domain: &'a str,
        now: SystemTime,
        access: Access,
    ) -> Result<Self, RotationError> {
        let root = state_dir.join(ROOT_FILE);
        if !root
            .try_exists()
            .map_err(|e| files::io("look for", &root, e))?
        {
            return Err(RotationError::NoCa {
                path: state_dir.to_owned(),
            });
        }
        Ok(Self {
            state_dir,
            trust_domain,
            now,
            _lock: files::lock_roots(state_dir, access)?,
        })
    }

    fn prepare(self) -> Result<RotationReport, RotationError> {
        const STEP: RotationStep = RotationStep::Prepare;
        let roots = self.roots()?;
        match roots.phase {
            RotationPhase::Prepared => return self.report(false),
            RotationPhase::Switched => {
                return Err(wrong_order(STEP, &roots, "end this one with `finish`"));
            }
            RotationPhase::Idle => {}
        }
        // Of an interrupted `finish`.
        self.destroy_old_key()?;
        let (next_path, root_path) = (self.file(NEXT_KEY_FILE), self.file(ROOT_FILE));
        // Whoever runs the command, the control plane must be able to read the files.
        let owner = Some(Owner::of(&self.file(KEY_FILE))?);
        let next = match files::read_key(&next_path)? {
            Some(key) => key,
            None => ca::new_key(&next_path, owner)?,
        };
        let next = ca::roots::self_signed(self.trust_domain, &next)?;
        let bundle = format!("{}\n{next}", roots.bundle_pem().trim_end());
        // This is the moment from which there are two roots.
        files::replace(
            &root_path,
            bundle.as_bytes(),
            0o644,
            Some(Owner::of(&root_path)?),
        )?;
        self.report(true)
    }

    fn switch(self, force: bool) -> Result<RotationReport, RotationError> {
        const STEP: RotationStep = RotationStep::Switch;
        let roots = self.roots()?;
        match roots.phase {
            RotationPhase::Switched => return self.report(false),
            RotationPhase::Idle => {
                return Err(wrong_order(STEP, &roots, "begin one with `prepare`"));
            }
            RotationPhase::Prepared => {}
        }
        if let Some(next) = &roots.other
            && SystemTime::from(next.not_after) <= self.now
        {
            let not_after = next.not_after.into();
            return Err(RotationError::NextExpired { not_after });
        }
        self.check_settled(STEP, &roots, force)?;
        let (key, next, old) = (
            self.file(KEY_FILE),
            self.file(NEXT_KEY_FILE),
            self.file(OLD_KEY_FILE),
        );
        // Left by an interrupted `switch` or `finish`; not the only copy of anything in use.
        files::remove(&old)?;
        files::link(&key, &old)?;
        // This is the moment from which the new root signs.
        files::rename(&next, &key)?;
        self.report(true)
    }

    fn finish(self, force: bool) -> Result<RotationReport, RotationError> {
        const STEP: RotationStep = RotationStep::Finish;
        let roots = self.roots()?;
        match roots.phase {
            RotationPhase::Prepared => {
                return Err(wrong_order(STEP, &roots, "go on with `switch`"));
            }
            RotationPhase::Idle => {
                let destroyed = self.destroy_old_key()?;
                return self.report(destroyed);
            }
            RotationPhase::Switched => {}
        }
        self.check_settled(STEP, &roots, force)?;
        let root_path = self.file(ROOT_FILE);
        // This is the moment from which the old root is nobody's.
        files::replace(
            &root_path,
            roots.signing.pem().as_bytes(),
            0o644,
            Some(Owner::of(&root_path)?),
        )?;
        self.destroy_old_key()?;
        self.report(true)
    }

    /// Under another name first: a half overwritten key must not be read as one.
    fn destroy_old_key(&self) -> Result<bool, RotationError> {
        let (old, destroyed) = (self.file(OLD_KEY_FILE), self.file(DESTROYED_KEY_FILE));
        let before = files::shred(&destroyed)?;
        if !old
            .try_exists()
            .map_err(|e| files::io("look for", &old, e))?
        {
            return Ok(before);
        }
        files::rename(&old, &destroyed)?;
        files::shred(&destroyed)?;
        Ok(true)
    }

    fn check_settled(
        &self,
        step: RotationStep,
        roots: &Roots,
        force: bool,
    ) -> Result<(), RotationError> {
        let checked = match self.served(roots)? {
            None => Err(RotationError::NotServed {
                step,
                path: self.state_dir.to_owned(),
            }),
            Some(until) => match until.duration_since(self.now) {
                Ok(wait) if !wait.is_zero() => Err(RotationError::TooEarly { step, wait, until }),
                _ => Ok(()),
            },
        };
        match checked {
            Err(error) if force => {
                tracing::warn!(reason = %error, "forced");
                Ok(())
            }
            checked => checked,
        }
    }

    /// Until when somebody may depend on the roots before these; `None` when the control
    /// plane has not taken these.
    fn served(&self, roots: &Roots) -> Result<Option<SystemTime>, RotationError> {
        let served = Served::read(self.state_dir)?.filter(|served| served.is_of(roots));
        Ok(served.map(|served| served.settled()))
    }

    fn report(&self, changed: bool) -> Result<RotationReport, RotationError> {
        let roots = self.roots()?;
        let settled = self.served(&roots)?;
        let bundle = self.file(ROOT_FILE);
        Ok(RotationReport::new(
            &roots, changed, settled, bundle, self.now,
        ))
    }

    fn roots(&self) -> Result<Roots, RotationError> {
        Ok(Roots::load(self.state_dir, self.trust_domain)?)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.state_dir.join(name)
    }
}

fn wrong_order(step: RotationStep, roots: &Roots, advice: &'static str) -> RotationError {
    RotationError::WrongOrder {
        step,
        phase: roots.phase,
        advice,
    }
}

/// The old key, while it is being overwritten.
const DESTROYED_KEY_FILE: &str = "old-key.destroyed";

#[cfg(test)]
mod tests;
