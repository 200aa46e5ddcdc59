use std::fmt;
use std::path::{Path, PathBuf};

use serde_saphyr::Location;

/// One thing wrong in a mesh file or in a manifest that it names, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    pub file: PathBuf,
    /// From 1; 0 when the place is not known.
    pub line: u64,
    /// From 1, in characters; 0 when the place is not known.
    pub column: u64,
    /// As in `workloads[0].addresses[1]`, after the resource's name in a manifest; empty
    /// for the file as a whole.
    pub field: String,
    pub message: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if self.line != 0 {
            write!(f, "{}:{}:", self.line, self.column)?;
        }
        if !self.field.is_empty() {
            write!(f, " {}:", self.field)?;
        }
        write!(f, " {}", self.message)
    }
}

/// Why a mesh file was not taken. Nothing of it is in force.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// Syntax, a field of a wrong type, or an unknown field: the first one only,
    /// since nothing after it can be understood.
    #[error("{0}")]
    Syntax(Diagnostic),
    /// All that is wrong in a file that could be parsed.
    #[error("{}", lines(.0))]
    Invalid(Vec<Diagnostic>),
}

impl ConfigError {
    /// The files that something is wrong in.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        let (one, all): (_, &[Diagnostic]) = match self {
            Self::Read { path, .. } => (Some(path.as_path()), &[]),
            Self::Syntax(diagnostic) => (Some(diagnostic.file.as_path()), &[]),
            Self::Invalid(diagnostics) => (None, diagnostics),
        };
        one.into_iter().chain(all.iter().map(|d| d.file.as_path()))
    }

    pub(super) fn syntax(
        file: &Path,
        error: &serde_saphyr::Error,
        path: &serde_path_to_error::Path,
    ) -> Self {
        let (line, column) = error
            .location()
            .map_or((0, 0), |at| (at.line(), at.column()));
        let options = serde_saphyr::render_options! {
            formatter: &serde_saphyr::UserMessageFormatter,
            snippets: serde_saphyr::SnippetMode::Off,
        };
        let rendered = error.render_with_options(options);
        let message = rendered
            .strip_suffix(&format!(" at line {line}, column {column}"))
            .unwrap_or(&rendered);
        let message = match message {
            "invalid i64" => "is not a whole number",
            "invalid boolean" => "is neither true nor false",
            other => other,
        };
        Self::Syntax(Diagnostic {
            file: file.to_owned(),
            line,
            column,
            field: field_of(path),
            message: message.to_owned(),
        })
    }
}

/// Collects what is wrong, so that one run shows all of it.
#[derive(Debug)]
pub(super) struct Diagnostics<'a> {
    pub(super) file: &'a Path,
    pub(super) errors: Vec<Diagnostic>,
    pub(super) warnings: Vec<Diagnostic>,
}

impl<'a> Diagnostics<'a> {
    pub(super) fn new(file: &'a Path) -> Self {
        Self {
            file,
            errors: Vec::new(),
            warnings: Vec::new(),
        }
    }

    pub(super) fn error(
        &mut self,
        at: Location,
        field: impl Into<String>,
        message: impl Into<String>,
    ) {
        let diagnostic = self.diagnostic(at, field.into(), message.into());
        self.errors.push(diagnostic);
    }

    pub(super) fn warning(
        &mut self,
        at: Location,
        field: impl Into<String>,
        message: impl Into<String>,
    ) {
        let diagnostic = self.diagnostic(at, field.into(), message.into());
        self.warnings.push(diagnostic);
    }

    fn diagnostic(&self, at: Location, field: String, message: String) -> Diagnostic {
        Diagnostic {
            file: self.file.to_owned(),
            line: at.line(),
            column: at.column(),
            field,
            message,
        }
    }
}

/// The path in the file; `Spanned` adds segments of its own, all named `value`.
fn field_of(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut field = String::new();
    for segment in path.iter() {
        match segment {
            Segment::Seq { index } => field.push_str(&format!("[{index}]")),
            Segment::Map { key } if key != "value" => {
                if !field.is_empty() {
                    field.push('.');
                }
                field.push_str(key);
            }
            Segment::Map { .. } | Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    field
}

fn lines(diagnostics: &[Diagnostic]) -> String {
    diagnostics
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}
