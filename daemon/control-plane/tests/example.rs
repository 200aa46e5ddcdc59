//! The example that ships is valid, and `validate` tells when it is not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use tempfile::TempDir;

const EXAMPLE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../deploy/examples/mesh.yaml"
);

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
    fs::copy(EXAMPLE, folder.path().join("mesh.yaml")).unwrap();
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
