//! `AuthorizationPolicy` and `PeerAuthentication` files that the mesh file names.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use ringfence_manifest::{
    AuthorizationPolicy, Converted, L7Handling, ManifestError, Manifests, OtherKinds,
    PeerAuthentication, Place, Selector, convert, parse,
};
use serde_saphyr::{Location, Spanned};

use super::check::Checker;
use super::diagnostic::Diagnostic;
use super::{Policy, Workload, schema, selects};

/// What the mesh file itself says about the same things.
pub(super) struct Native<'a> {
    pub root_namespace: &'a str,
    pub workloads: &'a [Workload],
    pub policies: &'a [Policy],
    pub modes: Vec<PeerAuthentication>,
}

pub(super) struct Served {
    pub converted: Converted,
    /// To be watched.
    pub folders: Vec<PathBuf>,
}

impl Checker<'_> {
    pub(super) fn manifests(
        &mut self,
        paths: Vec<Spanned<PathBuf>>,
        l7: Option<schema::Text>,
        native: Native<'_>,
    ) -> Served {
        let l7 = l7.map_or(L7Handling::default(), |l7| self.l7(l7));
        let mut folders = BTreeSet::new();
        let mut files = BTreeSet::new();
        let mut manifests = Manifests::default();
        for (index, path) in paths.into_iter().enumerate() {
            let (field, at) = (format!("manifests[{index}]"), path.referenced);
            let path = self.directory.join(path.value);
            let listed = list(&path, &mut folders)
                .map_err(|error| format!("cannot read {}: {error}", path.display()));
            let found = self.take(&field, at, listed).unwrap_or_default();
            if found.is_empty() && path.is_dir() {
                let message = format!(
                    "{} has no file that ends in .yaml, .yml or .json",
                    path.display()
                );
                self.diagnostics.warning(at, &field, message);
            }
            // A file may be named twice: by itself and by its directory.
            for file in found {
                if files.insert(file.clone()) {
                    self.manifest(&mut manifests, &file, &field, at);
                }
            }
        }
        for policy in manifests.authorization_policies() {
            self.policy_conflicts(policy, &native);
        }
        for mode in manifests.peer_authentications() {
            self.mode_conflicts(mode, &native);
        }
        for mode in native.modes {
            let added = manifests.add_peer_authentication(mode);
            self.manifest_errors(added.err());
        }
        let converted = convert(&manifests, native.root_namespace, l7);
        for warning in &converted.warnings {
            let field = joined(&warning.resource, &warning.field);
            let warning = diagnostic(&warning.at, field, warning.kind.to_string());
            self.diagnostics.warnings.push(warning);
        }
        Served {
            converted,
            folders: folders.into_iter().collect(),
        }
    }

    fn l7(&mut self, text: schema::Text) -> L7Handling {
        match text.value.as_str() {
            "istio-exact" => L7Handling::IstioExact,
            "deny-as-l4" => L7Handling::DenyAsL4,
            other => {
                let message = format!(
                    "`{other}` is not a handling of HTTP conditions: expected istio-exact or deny-as-l4"
                );
                self.diagnostics.error(text.referenced, "l7", message);
                L7Handling::default()
            }
        }
    }

    fn manifest(&mut self, manifests: &mut Manifests, file: &Path, field: &str, at: Location) {
        let text = std::fs::read_to_string(file)
            .map_err(|error| format!("cannot read {}: {error}", file.display()));
        let Some(text) = self.take(field, at, text) else {
            return;
        };
        let added = parse(&text, file, OtherKinds::Skip)
            .and_then(|of_this_file| manifests.merge(of_this_file));
        self.manifest_errors(added.err().into_iter().flatten());
    }

    fn policy_conflicts(&mut self, policy: &AuthorizationPolicy, native: &Native<'_>) {
        let name = policy.name();
        let resource = format!("AuthorizationPolicy {name}");
        let taken = |other: &Policy| other.namespace == name.namespace && other.name == name.name;
        if native.policies.iter().any(taken) {
            let message = "the mesh file has a policy of that name in `policies`".to_owned();
            let field = joined(&resource, "metadata.name");
            let error = diagnostic(policy.place(), field, message);
            self.diagnostics.errors.push(error);
        }
        let everywhere = name.namespace == native.root_namespace;
        let in_scope = |w: &&Workload| everywhere || w.namespace == name.namespace;
        let workloads = native.workloads.iter().filter(in_scope);
        self.selects_something(policy.place(), &resource, policy.selector(), workloads);
    }

    /// Two that hold for the same workload, one in the mesh file and one in a manifest,
    /// have no order.
    fn mode_conflicts(&mut self, mode: &PeerAuthentication, native: &Native<'_>) {
        let namespace = &mode.name().namespace;
        let resource = format!("PeerAuthentication {}", mode.name());
        let in_scope = |w: &&Workload| w.namespace == *namespace;
        let workloads = || native.workloads.iter().filter(in_scope);
        self.selects_something(mode.place(), &resource, mode.selector(), workloads());
        let overlaps = |other: &&PeerAuthentication| {
            let same_namespace = other.name().namespace == *namespace;
            let same_scope = match (mode.selector(), other.selector()) {
                (None, None) => true,
                (Some(one), Some(other)) => {
                    workloads().any(|w| one.selects(&w.labels) && other.selects(&w.labels))
                }
                _ => false,
            };
            same_namespace && same_scope
        };
        if let Some(other) = native.modes.iter().find(overlaps) {
            let message = format!(
                "holds for the same workloads as the entry at {}",
                other.place()
            );
            let error = diagnostic(mode.place(), resource, message);
            self.diagnostics.errors.push(error);
        }
    }

    fn selects_something<'w>(
        &mut self,
        at: &Place,
        resource: &str,
        selector: Option<&Selector>,
        mut workloads: impl Iterator<Item = &'w Workload>,
    ) {
        let Some(selector) = selector else { return };
        if !workloads.any(|workload| selects(selector.labels(), &workload.labels)) {
            let field = joined(resource, "spec.selector");
            let warning = diagnostic(at, field, "selects no workload".to_owned());
            self.diagnostics.warnings.push(warning);
        }
    }

    fn manifest_errors(&mut self, errors: impl IntoIterator<Item = ManifestError>) {
        let errors = errors.into_iter().map(|error| {
            let field = joined(&error.resource, &error.field);
            diagnostic(&error.at, field, error.problem.to_string())
        });
        self.diagnostics.errors.extend(errors);
    }
}

/// The files at `path`, in the order of their names, and the folders in which to see them
/// change.
fn list(path: &Path, folders: &mut BTreeSet<PathBuf>) -> io::Result<Vec<PathBuf>> {
    if let Some(parent) = path.parent().filter(|parent| parent.is_dir()) {
        folders.insert(parent.to_owned());
    }
    if !path.is_dir() {
        std::fs::metadata(path)?;
        return Ok(vec![path.to_owned()]);
    }
    folders.insert(path.to_owned());
    let mut files = Vec::new();
    for entry in path.read_dir()? {
        let file = entry?.path();
        let named_so = file
            .extension()
            .is_some_and(|extension| EXTENSIONS.iter().any(|known| extension == *known));
        let hidden = file
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if named_so && !hidden && !file.is_dir() {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn joined(resource: &str, field: &str) -> String {
    if field.is_empty() {
        resource.to_owned()
    } else {
        format!("{resource}: {field}")
    }
}

fn diagnostic(at: &Place, field: String, message: String) -> Diagnostic {
    Diagnostic {
        file: at.file.to_path_buf(),
        line: at.line,
        column: at.column,
        field,
        message,
    }
}

/// Those that kubectl reads in a directory.
const EXTENSIONS: &[&str] = &["yaml", "yml", "json"];
