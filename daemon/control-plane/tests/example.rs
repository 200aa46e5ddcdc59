//! The example that ships is valid, and `validate` tells when it is not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use tempfile::TempDir;

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/examples");

#[test]
fn example_is_valid_without_warnings() {
    let folder = folder();
    let validated = ringfence_control_plane::validate(&folder.path().join("mesh.yaml")).unwrap();
    assert_eq!(validated.warnings, []);
    assert_eq!(
        (
            validated.nodes,
            validated.workloads,
            validated.services,
            validated.policies
        ),
        (2, 4, 1, 1)
    );
}

#[test]
fn example_with_its_manifests_is_valid_without_warnings() {
    let folder = folder();
    let mesh = folder.path().join("mesh.yaml");
    let text = fs::read_to_string(&mesh).unwrap();
    let with = text
        .replace("#manifests:", "manifests:")
        .replace("#l7:", "l7:");
    assert_eq!(with.len() + 2, text.len());
    fs::write(&mesh, with).unwrap();
    let validated = ringfence_control_plane::validate(&mesh).unwrap();
    assert_eq!(validated.warnings, []);
    // One of the mesh file, three AuthorizationPolicies, one for the modes of ports.
    assert_eq!(validated.policies, 5);
}

#[test]
fn example_without_its_tokens_is_not_valid() {
    let folder = folder();
    fs::remove_file(folder.path().join("node-b.token")).unwrap();
    let error = ringfence_control_plane::validate(&folder.path().join("mesh.yaml"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("nodes[1].token_file: cannot read") && error.contains("node-b.token"),
        "{error}"
    );
}

fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    for file in ["mesh.yaml", "policies.yaml"] {
        fs::copy(format!("{EXAMPLES}/{file}"), folder.path().join(file)).unwrap();
    }
    fs::write(
        folder.path().join("node-a.token"),
        "0123456789abcdef0123456789abcdef",
    )
    .unwrap();
    fs::write(
        folder.path().join("node-b.token"),
        "fedcba9876543210fedcba9876543210",
    )
    .unwrap();
    folder
}
