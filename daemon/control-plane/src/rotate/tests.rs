#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tempfile::TempDir;

use super::*;
use crate::ca::Ca;

const TD: &str = "cluster.local";
const TTL: Duration = Duration::from_secs(3600);

/// A state directory, and a control plane that looks when it is told to.
struct Lab {
    folder: TempDir,
    ca: Ca,
}

impl Lab {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let ca = Ca::open(folder.path(), TD).unwrap();
        ca.record_served(TTL).unwrap();
        Self { folder, ca }
    }

    fn dir(&self) -> &Path {
        self.folder.path()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// The control plane notices.
    fn look(&self) -> bool {
        let changed = self.ca.reload().unwrap();
        self.ca.record_served(TTL).unwrap();
        changed
    }

    /// All files but the lock, to come back to.
    fn keep(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let files = fs::read_dir(self.dir()).unwrap().map(|e| e.unwrap().path());
        files.map(|p| (p.clone(), fs::read(p).unwrap())).collect()
    }

    /// Puts one file back as it was in `kept`, or away.
    fn put_back(&self, name: &str, kept: &[(PathBuf, Vec<u8>)]) {
        let path = self.file(name);
        match kept.iter().find(|(p, _)| *p == path) {
            Some((_, content)) => {
                let mode = if name.contains("key") { 0o600 } else { 0o644 };
                files::replace(&path, content, mode, None).unwrap();
            }
            None => fs::remove_file(path).unwrap(),
        }
    }

    fn later(&self, wait: Duration) -> Rotation<'_> {
        Rotation::begin(self.dir(), TD, SystemTime::now() + wait).unwrap()
    }

    fn bundle(&self) -> Vec<CertificateDer<'static>> {
        let pem = fs::read(self.file(ROOT_FILE)).unwrap();
        CertificateDer::pem_slice_iter(&pem)
            .map(Result::unwrap)
            .collect()
    }

    /// What a control plane that starts now would do.
    fn opened(self) -> (RotationPhase, TempDir) {
        let Self { folder, ca } = self;
        drop(ca);
        let ca = Ca::open(folder.path(), TD).unwrap();
        let phase = ca.roots().phase;
        drop(ca);
        (phase, folder)
    }

    fn prepared() -> Self {
        let lab = Self::new();
        prepare(lab.dir(), TD).unwrap();
        assert!(lab.look());
        lab
    }

    fn switched() -> Self {
        let lab = Self::prepared();
        lab.later(TTL).switch(false).unwrap();
        assert!(lab.look());
        lab
    }
}

#[test]
fn three_steps_replace_the_root_and_leave_one_key() {
    let lab = Lab::new();
    let old = lab.bundle();
    let old_key = fs::read(lab.file(KEY_FILE)).unwrap();

    let report = prepare(lab.dir(), TD).unwrap();
    assert_eq!(
        (report.phase, report.changed),
        (RotationPhase::Prepared, true)
    );
    let both = lab.bundle();
    assert_eq!((both.len(), &both[0]), (2, &old[0]));
    assert_eq!(fs::read(lab.file(KEY_FILE)).unwrap(), old_key);
    let mode = fs::metadata(lab.file(NEXT_KEY_FILE))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(lab.look());
    assert_eq!(lab.ca.roots().signing.der, both[0]);

    let report = lab.later(TTL).switch(false).unwrap();
    assert_eq!(
        (report.phase, report.changed),
        (RotationPhase::Switched, true)
    );
    assert_eq!(lab.bundle(), both);
    assert!(lab.look());
    assert_eq!(lab.ca.roots().signing.der, both[1]);

    let report = lab.later(TTL).finish(false).unwrap();
    assert_eq!((report.phase, report.changed), (RotationPhase::Idle, true));
    assert_eq!(lab.bundle(), both[1..]);
    assert!(lab.look());
    for gone in [NEXT_KEY_FILE, OLD_KEY_FILE, DESTROYED_KEY_FILE] {
        assert!(!lab.file(gone).exists(), "{gone}");
    }
    for (path, content) in lab.keep() {
        assert_ne!(content, old_key, "{}", path.display());
    }
}

#[test]
fn every_step_repeated_changes_nothing() {
    let lab = Lab::prepared();
    let before = lab.keep();
    let again = prepare(lab.dir(), TD).unwrap();
    assert_eq!(
        (again.phase, again.changed),
        (RotationPhase::Prepared, false)
    );
    assert_eq!(lab.keep(), before);

    lab.later(TTL).switch(false).unwrap();
    let before = lab.keep();
    // Also before the control plane has noticed.
    let again = lab.later(Duration::ZERO).switch(false).unwrap();
    assert_eq!(
        (again.phase, again.changed),
        (RotationPhase::Switched, false)
    );
    assert_eq!(lab.keep(), before);
    lab.look();

    lab.later(TTL).finish(false).unwrap();
    let before = lab.keep();
    let again = lab.later(Duration::ZERO).finish(false).unwrap();
    assert_eq!((again.phase, again.changed), (RotationPhase::Idle, false));
    assert_eq!(lab.keep(), before);
}

#[test]
fn wrong_order_is_refused_also_by_force_and_changes_nothing() {
    let refused = |lab: &Lab, step: RotationStep, expected: &str| {
        let before = lab.keep();
        let rotation = lab.later(TTL * 2);
        let error = match step {
            RotationStep::Prepare => rotation.prepare(),
            RotationStep::Switch => rotation.switch(true),
            _ => rotation.finish(true),
        }
        .unwrap_err();
        assert!(matches!(error, RotationError::WrongOrder { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(lab.keep(), before);
    };
    refused(
        &Lab::new(),
        RotationStep::Switch,
        "begin one with `prepare`",
    );
    refused(
        &Lab::prepared(),
        RotationStep::Finish,
        "go on with `switch`",
    );
    refused(
        &Lab::switched(),
        RotationStep::Prepare,
        "end this one with `finish`",
    );
}

#[test]
fn switch_and_finish_wait_for_every_svid_from_before_to_expire() {
    let lab = Lab::prepared();
    let early = |result: Result<RotationReport, RotationError>| {
        let error = result.unwrap_err();
        assert!(
            matches!(error, RotationError::TooEarly { wait, .. } if wait <= TTL && wait > TTL - Duration::from_secs(30)),
            "{error}"
        );
        error.to_string()
    };
    let message = early(switch(lab.dir(), TD, false));
    assert!(
        message.contains("wait 59m") || message.contains("wait 1h"),
        "{message}"
    );
    lab.later(TTL).switch(false).unwrap();
    lab.look();
    early(finish(lab.dir(), TD, false));
    lab.later(TTL).finish(false).unwrap();
}

#[test]
fn force_does_not_wait() {
    let lab = Lab::prepared();
    assert_eq!(
        switch(lab.dir(), TD, true).unwrap().phase,
        RotationPhase::Switched
    );
    // The control plane has not even noticed.
    assert_eq!(
        finish(lab.dir(), TD, true).unwrap().phase,
        RotationPhase::Idle
    );
    assert!(lab.look());
    assert_eq!(lab.bundle(), [lab.ca.roots().signing.der.clone()]);
}

#[test]
fn time_counts_from_when_the_control_plane_serves_the_roots() {
    let lab = Lab::new();
    prepare(lab.dir(), TD).unwrap();
    let error = lab.later(TTL * 10).switch(false).unwrap_err();
    assert!(matches!(error, RotationError::NotServed { .. }), "{error}");
    assert!(!status(lab.dir(), TD).unwrap().served);
    lab.look();
    assert!(status(lab.dir(), TD).unwrap().served);
    let error = lab.later(TTL / 2).switch(false).unwrap_err();
    assert!(matches!(error, RotationError::TooEarly { .. }), "{error}");
    lab.later(TTL).switch(false).unwrap();
}

#[test]
fn lifetime_that_was_shortened_lately_still_counts() {
    let lab = Lab::new();
    lab.ca.record_served(TTL / 10).unwrap();
    prepare(lab.dir(), TD).unwrap();
    lab.ca.reload().unwrap();
    lab.ca.record_served(TTL / 10).unwrap();
    let error = lab.later(TTL / 2).switch(false).unwrap_err();
    assert!(matches!(error, RotationError::TooEarly { .. }), "{error}");
    lab.later(TTL).switch(false).unwrap();
}

#[test]
fn forced_step_does_not_shorten_the_next_wait() {
    let lab = Lab::prepared();
    lab.later(Duration::ZERO).switch(true).unwrap();
    lab.ca.reload().unwrap();
    // Issued for a short time now, but those from before live on.
    lab.ca.record_served(TTL / 10).unwrap();
    let error = lab.later(TTL / 2).finish(false).unwrap_err();
    assert!(matches!(error, RotationError::TooEarly { .. }), "{error}");
}

#[test]
fn interrupted_prepare_is_as_if_not_begun_and_goes_on_with_the_same_key() {
    let lab = Lab::new();
    let before = lab.keep();
    prepare(lab.dir(), TD).unwrap();
    // The key is there, its certificate is not, and both writes left their halves.
    lab.put_back(ROOT_FILE, &before);
    let next = fs::read(lab.file(NEXT_KEY_FILE)).unwrap();
    fs::write(lab.file("next-key.new"), "half a ke").unwrap();
    fs::write(lab.file("root-cert.new"), "half a cer").unwrap();
    assert!(!lab.look());
    assert_eq!(status(lab.dir(), TD).unwrap().phase, RotationPhase::Idle);

    let report = prepare(lab.dir(), TD).unwrap();
    assert_eq!(
        (report.phase, report.changed),
        (RotationPhase::Prepared, true)
    );
    assert_eq!(fs::read(lab.file(NEXT_KEY_FILE)).unwrap(), next);
    assert_eq!(lab.opened().0, RotationPhase::Prepared);
}

#[test]
fn interrupted_switch_is_still_prepared_and_goes_on() {
    let lab = Lab::prepared();
    files::link(&lab.file(KEY_FILE), &lab.file(OLD_KEY_FILE)).unwrap();
    assert!(!lab.look());
    let report = lab.later(TTL).switch(false).unwrap();
    assert_eq!(report.phase, RotationPhase::Switched);
    assert_eq!(fs::metadata(lab.file(OLD_KEY_FILE)).unwrap().nlink(), 1);
    assert_eq!(lab.opened().0, RotationPhase::Switched);

    let lab = Lab::prepared();
    files::link(&lab.file(KEY_FILE), &lab.file(OLD_KEY_FILE)).unwrap();
    assert_eq!(lab.opened().0, RotationPhase::Prepared);
}

#[test]
fn interrupted_finish_trusts_the_old_root_no_more_and_destroys_its_key_when_repeated() {
    let interrupted = |old_key_as: &str, overwritten: bool| {
        let lab = Lab::switched();
        let before = lab.keep();
        lab.later(TTL).finish(false).unwrap();
        lab.put_back(OLD_KEY_FILE, &before);
        fs::rename(lab.file(OLD_KEY_FILE), lab.file(old_key_as)).unwrap();
        if overwritten {
            fs::write(lab.file(old_key_as), [0; 10]).unwrap();
        }
        assert!(lab.look());
        assert_eq!(lab.ca.roots().phase, RotationPhase::Idle);
        lab
    };
    for (name, overwritten) in [
        (OLD_KEY_FILE, false),
        (DESTROYED_KEY_FILE, false),
        (DESTROYED_KEY_FILE, true),
    ] {
        let lab = interrupted(name, overwritten);
        let report = lab.later(Duration::ZERO).finish(false).unwrap();
        assert_eq!((report.phase, report.changed), (RotationPhase::Idle, true));
        assert!(!lab.file(name).exists());
        assert_eq!(lab.opened().0, RotationPhase::Idle);

        // Or when the next rotation begins.
        let lab = interrupted(name, overwritten);
        prepare(lab.dir(), TD).unwrap();
        assert!(!lab.file(name).exists());
        assert_eq!(lab.opened().0, RotationPhase::Prepared);

        assert_eq!(
            interrupted(name, overwritten).opened().0,
            RotationPhase::Idle
        );
    }
}

#[test]
fn key_that_has_another_name_is_not_overwritten_under_it() {
    let lab = Lab::switched();
    let backup = lab.file("backup.pem");
    fs::hard_link(lab.file(OLD_KEY_FILE), &backup).unwrap();
    let key = fs::read(&backup).unwrap();
    lab.later(TTL).finish(false).unwrap();
    assert_eq!(fs::read(backup).unwrap(), key);
}

#[test]
fn stray_root_in_the_bundle_is_refused_and_what_is_in_force_stays() {
    let (lab, other) = (Lab::new(), Lab::new());
    let stray = fs::read_to_string(other.file(ROOT_FILE)).unwrap();
    let own = fs::read_to_string(lab.file(ROOT_FILE)).unwrap();
    fs::write(lab.file(ROOT_FILE), format!("{own}{stray}")).unwrap();
    let error = lab.ca.reload().unwrap_err();
    assert!(
        error.to_string().contains("whose keys are not beside it"),
        "{error}"
    );
    prepare(lab.dir(), TD).unwrap_err();
    assert_eq!(lab.ca.roots().bundle_pem(), own);

    let key = fs::read_to_string(lab.file(KEY_FILE)).unwrap();
    fs::write(lab.file(ROOT_FILE), format!("{own}{key}")).unwrap();
    let error = lab.ca.reload().unwrap_err();
    assert!(error.to_string().contains("holds a private key"), "{error}");
}

#[test]
fn directory_without_a_ca_and_another_trust_domain_are_refused() {
    let folder = TempDir::new().unwrap();
    let error = prepare(folder.path(), TD).unwrap_err();
    assert!(matches!(error, RotationError::NoCa { .. }), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

    let lab = Lab::new();
    let error = prepare(lab.dir(), "other.example").unwrap_err();
    assert!(
        matches!(error, RotationError::Ca(CaError::OtherTrustDomain { .. })),
        "{error}"
    );
}

#[test]
fn control_plane_does_not_look_while_a_step_is_being_taken() {
    let lab = Lab::new();
    let step = lab.later(Duration::ZERO);
    std::thread::scope(|threads| {
        let look = threads.spawn(|| lab.ca.reload());
        let report = step.prepare().unwrap();
        assert_eq!(report.phase, RotationPhase::Prepared);
        // It has waited, and sees all of the step.
        assert!(look.join().unwrap().unwrap());
    });
    assert_eq!(lab.ca.roots().phase, RotationPhase::Prepared);
}

#[test]
fn report_says_what_comes_next_and_when() {
    let lab = Lab::new();
    let page = status(lab.dir(), TD).unwrap().to_string();
    assert!(
        page.contains("not under way") && page.ends_with("nothing to do"),
        "{page}"
    );
    let page = prepare(lab.dir(), TD).unwrap().to_string();
    assert!(page.contains("has not taken these roots yet"), "{page}");
    assert_eq!(page.matches("\nroot ").count(), 2, "{page}");
    lab.look();
    let page = status(lab.dir(), TD).unwrap().to_string();
    assert!(
        page.contains("next: `switch` in ") && page.contains("root_ca"),
        "{page}"
    );
    let page = lab.later(TTL).report(false).unwrap().to_string();
    assert!(page.ends_with("next: `switch`, at any time"), "{page}");
}

#[test]
fn spans_and_instants_are_rounded_up() {
    assert_eq!(report::span(Duration::from_millis(1)), "1s");
    assert_eq!(report::span(Duration::from_secs(125)), "2m 5s");
    assert_eq!(report::span(Duration::from_secs(86_399)), "23h 59m 59s");
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(59_001);
    assert_eq!(report::instant(at), "1970-01-01T00:01:00Z");
}
