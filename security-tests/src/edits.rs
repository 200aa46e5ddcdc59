//! Changes of a lab's mesh that many cases make.

use ringfence_lab::mesh::{Action, Mesh, Policy, Rule, TEST_PORT};

/// Admits to `web` whatever the rule matches.
pub fn allow(name: &str, rule: Rule) -> Policy {
    Policy {
        name: name.into(),
        rules: vec![rule],
        ..Policy::clients_may_use_web()
    }
}

/// Denies `web` to whatever the rule matches.
pub fn deny(name: &str, rule: Rule) -> Policy {
    Policy {
        action: Action::Deny,
        ..allow(name, rule)
    }
}

/// Admits everybody to the test port by address: what remains is the question of plaintext.
pub fn admit_by_address(mesh: &mut Mesh) {
    let rule = Rule {
        ip_blocks: vec!["10.77.0.0/16".into(), "fd77::/16".into()],
        ports: vec![TEST_PORT],
        ..Rule::default()
    };
    mesh.policies
        .push(allow("anyone-may-use-the-test-port", rule));
}

/// `STRICT` or `PERMISSIVE`, wherever the mesh file says either.
pub fn mode(mesh: &mut Mesh, mode: &str) {
    for entry in &mut mesh.peer_authentication {
        entry.mode = mode.to_owned();
    }
}
