//! What a step of a rotation tells the operator.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::RotationStep;
use crate::ca::roots::RotationPhase;
use crate::ca::{Root, Roots};

/// Where a rotation stands. Its `Display` is for people: several lines.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RotationReport {
    pub phase: RotationPhase,
    /// Did this step change anything? Repeated, it does not.
    pub changed: bool,
    /// The signing root first.
    pub roots: Vec<RootSummary>,
    /// Has the control plane taken these roots? Soon after a step it has not.
    pub served: bool,
    /// `None` when no rotation is under way.
    pub next: Option<NextStep>,
    /// The file that every agent needs a copy of as its `root_ca`.
    pub bundle: PathBuf,
    now: SystemTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RootSummary {
    /// SHA-256 of the DER, in lower-case hexadecimal digits.
    pub fingerprint: String,
    pub role: RootRole,
    pub not_after: SystemTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RootRole {
    Signs,
    /// Trusted, and to sign after `switch`.
    Next,
    /// Trusted until `finish`.
    Old,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct NextStep {
    pub step: RotationStep,
    /// When it cuts nobody off; `None` until the control plane has taken the last one.
    pub not_before: Option<SystemTime>,
}

impl RotationReport {
    pub(super) fn new(
        roots: &Roots,
        changed: bool,
        settled: Option<SystemTime>,
        bundle: PathBuf,
        now: SystemTime,
    ) -> Self {
        let next = |step| {
            Some(NextStep {
                step,
                not_before: settled,
            })
        };
        let (role, next) = match roots.phase {
            RotationPhase::Idle => (RootRole::Next, None),
            RotationPhase::Prepared => (RootRole::Next, next(RotationStep::Switch)),
            RotationPhase::Switched => (RootRole::Old, next(RotationStep::Finish)),
        };
        let summary = |root: &Root, role| RootSummary {
            fingerprint: root.fingerprint(),
            role,
            not_after: root.not_after.into(),
        };
        let mut summaries = vec![summary(&roots.signing, RootRole::Signs)];
        summaries.extend(roots.other.iter().map(|root| summary(root, role)));
        Self {
            phase: roots.phase,
            changed,
            roots: summaries,
            served: settled.is_some(),
            next,
            bundle,
            now,
        }
    }
}

impl fmt::Display for RotationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rotation: {}", self.phase)?;
        for root in &self.roots {
            let (role, print) = (root.role, &root.fingerprint);
            writeln!(
                f,
                "root {print} {role}, expires {}",
                instant(root.not_after)
            )?;
        }
        if !self.served {
            writeln!(f, "control plane: has not taken these roots yet")?;
        }
        let Some(NextStep { step, not_before }) = self.next else {
            return write!(f, "next: nothing to do");
        };
        writeln!(
            f,
            "meanwhile: give every agent {} as its root_ca file",
            self.bundle.display()
        )?;
        write!(f, "next: `{step}`")?;
        match not_before {
            None => write!(f, ", when the control plane has taken these roots"),
            Some(at) => match at.duration_since(self.now) {
                Ok(wait) if !wait.is_zero() => {
                    write!(f, " in {}, from {} on", span(wait), instant(at))
                }
                _ => write!(f, ", at any time"),
            },
        }
    }
}

impl fmt::Display for RotationStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepare => "prepare",
            Self::Switch => "switch",
            Self::Finish => "finish",
            Self::Status => "status",
        })
    }
}

impl fmt::Display for RotationPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "not under way",
            Self::Prepared => "prepared (both roots are trusted, the old one signs)",
            Self::Switched => "switched (both roots are trusted, the new one signs)",
        })
    }
}

impl fmt::Display for RootRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Signs => "signs",
            Self::Next => "is next",
            Self::Old => "has signed before",
        })
    }
}

/// Like `23h 59m 10s`, rounded up: to wait that long is long enough.
pub(super) fn span(duration: Duration) -> String {
    let seconds = duration
        .as_secs()
        .saturating_add(u64::from(duration.subsec_nanos() > 0));
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m {seconds}s"),
        _ => format!("{hours}h {minutes}m {seconds}s"),
    }
}

/// RFC 3339, UTC, whole seconds, rounded up.
pub(super) fn instant(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    let whole = at.replace_nanosecond(0).unwrap_or(at);
    let up = match whole == at {
        true => Some(at),
        false => whole.checked_add(time::Duration::SECOND),
    };
    let up = up.unwrap_or(at);
    up.format(&Rfc3339).unwrap_or_else(|_| up.to_string())
}
