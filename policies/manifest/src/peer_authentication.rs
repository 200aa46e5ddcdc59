//! The specification of a `PeerAuthentication`.

use std::collections::BTreeMap;

use crate::node::{Node, Spot, Value};
use crate::parse::Metadata;
use crate::reader::{Field, Reader};
use crate::{MtlsMode, PeerAuthentication, Problem, value};

impl Reader {
    pub(crate) fn peer_authentication(
        &mut self,
        metadata: Metadata,
        spec: Option<Field>,
    ) -> PeerAuthentication {
        let mut policy = PeerAuthentication {
            name: metadata.name,
            mode_at: Spot {
                line: metadata.at.line,
                column: metadata.at.column,
            },
            at: metadata.at,
            selector: None,
            mode: MtlsMode::Unset,
            ports: BTreeMap::new(),
            created: metadata.created,
            native: false,
        };
        let Some(Field { path, node }) = spec else {
            return policy;
        };
        let mut spec = self.fields(&path, node, &["selector", "mtls", "portLevelMtls"]);
        let selector = spec.take("selector");
        let selected = selector.is_some();
        policy.selector = selector.and_then(|selector| self.selector(selector));
        if let Some(mtls) = spec.take("mtls") {
            (policy.mode, policy.mode_at) = self.mtls(mtls);
        }
        if let Some(ports) = spec.take("portLevelMtls") {
            if !selected {
                let path = ports.path.clone();
                self.error(ports.node.at, path, Problem::PortsWithoutSelector);
            }
            policy.ports = self.port_modes(ports);
        }
        policy
    }

    fn mtls(&mut self, field: Field) -> (MtlsMode, Spot) {
        let at = field.node.at;
        let mut mtls = self.fields(&field.path, field.node, &["mode"]);
        self.parsed(mtls.take("mode"), value::mode)
            .unwrap_or((MtlsMode::Unset, at))
    }

    fn port_modes(&mut self, field: Field) -> BTreeMap<u16, (MtlsMode, Spot)> {
        let (at, path) = (field.node.at, field.path);
        let mut modes = BTreeMap::new();
        let entries = self.entries(&path, field.node);
        if entries.is_empty() {
            self.error(at, path.clone(), Problem::EmptyList);
        }
        for (key, node) in entries {
            let key_at = key.at;
            let Some(digits) = self.port_key(&path, key) else {
                continue;
            };
            let path = format!("{path}[{digits}]");
            let Some(port) = self.take(key_at, &path, value::port(&digits, 1)) else {
                continue;
            };
            let (mode, _) = self.mtls(Field {
                path: path.clone(),
                node,
            });
            // 8080 and "8080" are two keys to YAML and one to Istio.
            if let Some((_, earlier)) = modes.insert(port, (mode, key_at)) {
                let earlier = self.place(earlier);
                self.error(key_at, path, Problem::Duplicate(earlier));
            }
        }
        modes
    }

    /// A number, quoted or not.
    fn port_key(&mut self, path: &str, key: Node) -> Option<String> {
        match key.value {
            Value::Number(digits) => Some(digits),
            value => {
                let key = Node { value, at: key.at };
                self.text(path, key).map(|(text, _)| text)
            }
        }
    }
}
