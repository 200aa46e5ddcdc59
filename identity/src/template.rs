//! Texts with an identity's parts in them: selectors and file names.

use crate::spiffe_id::WorkloadIdentity;

/// A text in which `{trust_domain}`, `{namespace}` and `{service_account}` stand
/// for the parts of an identity, as in `k8s:ns:{namespace}`.
///
/// The parts are valid path segments of a SPIFFE ID: letters, digits, `.`, `-`
/// and `_`, never `.` or `..` alone. So a filled-in text has a slash or a colon
/// only where the template has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityTemplate {
    text: String,
    parts: Vec<Part>,
}

impl IdentityTemplate {
    /// Parses a template; braces are for the three placeholders only.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let bad = |problem: &str| TemplateError {
            text: text.to_owned(),
            problem: problem.to_owned(),
        };
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once('{') {
            let (name, after) = behind
                .split_once('}')
                .ok_or_else(|| bad("has a { without }"))?;
            parts.push(Part::Text(before.to_owned()));
            parts.push(match name {
                "trust_domain" => Part::TrustDomain,
                "namespace" => Part::Namespace,
                "service_account" => Part::ServiceAccount,
                other => return Err(bad(&format!("has the unknown placeholder {{{other}}}"))),
            });
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        let stray = |part: &Part| matches!(part, Part::Text(text) if text.contains('}'));
        if parts.iter().any(stray) {
            return Err(bad("has a } without {"));
        }
        Ok(Self {
            text: text.to_owned(),
            parts,
        })
    }

    /// The text for one identity.
    pub fn fill_in(&self, identity: &WorkloadIdentity) -> String {
        self.parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => text.as_str(),
                Part::TrustDomain => identity.trust_domain().as_str(),
                Part::Namespace => identity.namespace(),
                Part::ServiceAccount => identity.service_account(),
            })
            .collect()
    }

    /// The template itself.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Why a template does not parse: the operator is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "template {text:?} {problem} (known are {{trust_domain}}, {{namespace}}, {{service_account}})"
)]
pub struct TemplateError {
    /// The template.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    TrustDomain,
    Namespace,
    ServiceAccount,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::workload;

    #[test]
    fn placeholders_become_the_identitys_parts() {
        let filled = |text: &str| {
            IdentityTemplate::parse(text)
                .unwrap()
                .fill_in(&workload("td", "shop", "cart"))
        };
        assert_eq!(filled("k8s:ns:{namespace}"), "k8s:ns:shop");
        assert_eq!(
            filled("{trust_domain}/{namespace}/{service_account}"),
            "td/shop/cart"
        );
        assert_eq!(filled("{namespace}{namespace}"), "shopshop");
        assert_eq!(filled(""), "");
    }

    #[test]
    fn other_braces_are_refused() {
        for (text, problem) in [
            ("{pod}", "unknown placeholder {pod}"),
            ("{}", "unknown placeholder {}"),
            ("a{namespace", "{ without }"),
            ("a}b", "} without {"),
            ("{namespace}}", "} without {"),
            ("{{namespace}}", "unknown placeholder {{namespace}"),
        ] {
            let error = IdentityTemplate::parse(text).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }
}
