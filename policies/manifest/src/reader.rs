//! Takes trees apart and collects what is wrong with them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::node::{Node, Spot, Value};
use crate::{ManifestError, Place, Problem, Selector, Warning, WarningKind};

/// Reads one file. After an error it goes on with a stand-in; what was read is thrown
/// away in the end.
pub(crate) struct Reader {
    pub file: Arc<Path>,
    /// What is being read, for messages.
    pub resource: String,
    pub errors: Vec<ManifestError>,
    pub warnings: Vec<Warning>,
}

/// The fields of a mapping, all of them known.
pub(crate) struct Fields {
    entries: Vec<(String, Node)>,
    /// Path of the mapping, and where it begins.
    path: String,
    pub at: Spot,
}

/// A field that is there, with its path.
pub(crate) struct Field {
    pub path: String,
    pub node: Node,
}

impl Reader {
    pub(crate) fn new(file: Arc<Path>) -> Self {
        Reader {
            file,
            resource: String::new(),
            errors: Vec::new(),
            warnings: Vec::new(),
        }
    }

    pub(crate) fn error(&mut self, at: Spot, field: impl Into<String>, problem: Problem) {
        self.errors.push(ManifestError {
            at: self.place(at),
            resource: self.resource.clone(),
            field: field.into(),
            problem,
        });
    }

    pub(crate) fn warn(&mut self, at: Spot, field: impl Into<String>, kind: WarningKind) {
        self.warnings.push(Warning {
            at: self.place(at),
            resource: self.resource.clone(),
            field: field.into(),
            kind,
        });
    }

    pub(crate) fn place(&self, at: Spot) -> Place {
        Place {
            file: Arc::clone(&self.file),
            line: at.line,
            column: at.column,
        }
    }

    /// The mapping at `path`; others than the `known` fields are errors.
    pub(crate) fn fields(
        &mut self,
        path: &str,
        node: Node,
        known: &'static [&'static str],
    ) -> Fields {
        let at = node.at;
        let mut fields = Fields {
            entries: Vec::new(),
            path: path.to_owned(),
            at,
        };
        for (key, value) in self.entries(path, node) {
            let key_at = key.at;
            let name = match key.value {
                Value::Text(name) => name,
                Value::Number(digits) => digits,
                other => {
                    self.wrong_type(key_at, path.to_owned(), other.kind(), "text");
                    continue;
                }
            };
            if known.contains(&name.as_str()) {
                fields.entries.push((name, value));
            } else {
                let path = fields.path(&name);
                self.error(key_at, path, Problem::UnknownField { name, known });
            }
        }
        fields
    }

    /// A mapping with any keys.
    pub(crate) fn entries(&mut self, path: &str, node: Node) -> Vec<(Node, Node)> {
        match node.value {
            Value::Map(entries) => entries,
            other => {
                self.wrong_type(node.at, path.to_owned(), other.kind(), "a mapping");
                Vec::new()
            }
        }
    }

    pub(crate) fn text(&mut self, path: &str, node: Node) -> Option<(String, Spot)> {
        match node.value {
            Value::Text(text) => Some((text, node.at)),
            other => {
                self.wrong_type(node.at, path.to_owned(), other.kind(), "text");
                None
            }
        }
    }

    /// The text of a field that may be absent, as `parse` reads it.
    pub(crate) fn parsed<T>(
        &mut self,
        field: Option<Field>,
        parse: impl Fn(&str) -> Result<T, Problem>,
    ) -> Option<(T, Spot)> {
        let Field { path, node } = field?;
        let (text, at) = self.text(&path, node)?;
        let value = self.take(at, &path, parse(&text))?;
        Some((value, at))
    }

    /// The elements of a list with their paths. Absent: none. Without elements: an error.
    pub(crate) fn list(&mut self, field: Option<Field>) -> Vec<Field> {
        let Some(Field { path, node }) = field else {
            return Vec::new();
        };
        let elements = match node.value {
            Value::List(elements) => elements,
            Value::Null => Vec::new(),
            other => {
                self.wrong_type(node.at, path, other.kind(), "a list");
                return Vec::new();
            }
        };
        if elements.is_empty() {
            self.error(node.at, path, Problem::EmptyList);
            return Vec::new();
        }
        let elements = elements.into_iter().enumerate();
        elements
            .map(|(i, node)| Field {
                path: format!("{path}[{i}]"),
                node,
            })
            .collect()
    }

    /// A list of texts, each as `parse` reads it.
    pub(crate) fn values<T>(
        &mut self,
        field: Option<Field>,
        parse: impl Fn(&str) -> Result<T, Problem>,
    ) -> Vec<T> {
        let elements = self.list(field);
        let parsed = elements
            .into_iter()
            .filter_map(|element| self.parsed(Some(element), &parse));
        parsed.map(|(value, _)| value).collect()
    }

    /// `matchLabels` of a `selector` that is there.
    pub(crate) fn selector(&mut self, field: Field) -> Option<Selector> {
        let at = field.node.at;
        let mut fields = self.fields(&field.path, field.node, &["matchLabels"]);
        let labels = fields.take("matchLabels");
        let labels = labels.map_or_else(BTreeMap::new, |labels| self.labels(labels));
        let literal = labels
            .iter()
            .flat_map(|(key, value)| [key, value])
            .find(|text| text.contains('*'));
        if let Some(text) = literal {
            self.error(at, &field.path, Problem::SelectorWildcard(text.clone()));
        }
        let selector = Selector::new(labels);
        if selector.is_none() {
            self.error(at, field.path, Problem::EmptySelector);
        }
        selector
    }

    /// A mapping from text to text.
    pub(crate) fn labels(&mut self, field: Field) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::new();
        for (key, value) in self.entries(&field.path, field.node) {
            let Some((key, _)) = self.text(&field.path, key) else {
                continue;
            };
            if let Some((value, _)) = self.text(&format!("{}[{key}]", field.path), value) {
                labels.insert(key, value);
            }
        }
        labels
    }

    pub(crate) fn take<T>(
        &mut self,
        at: Spot,
        path: &str,
        result: Result<T, Problem>,
    ) -> Option<T> {
        result.map_err(|problem| self.error(at, path, problem)).ok()
    }

    fn wrong_type(&mut self, at: Spot, path: String, found: &'static str, expected: &'static str) {
        self.error(at, path, Problem::Type { found, expected });
    }
}

impl Fields {
    /// Takes a field out. As for Kubernetes, a field without a value is absent.
    pub(crate) fn take(&mut self, name: &str) -> Option<Field> {
        self.take_even_null(name)
            .filter(|field| !field.node.is_null())
    }

    /// For lists, where a missing value is a mistake that changes the meaning.
    pub(crate) fn take_even_null(&mut self, name: &str) -> Option<Field> {
        let at = self.entries.iter().position(|(key, _)| key == name)?;
        let (name, node) = self.entries.swap_remove(at);
        let path = self.path(&name);
        Some(Field { path, node })
    }

    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }
}
