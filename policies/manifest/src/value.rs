//! Single values: what they may look like.

use ringfence_policies::{Cidr, PolicyName, ServiceAccountMatch, StringMatch, ValueError};

use crate::{MtlsMode, Problem};

/// RFC 1123 subdomain, as Kubernetes names objects. Without underscores: the names of
/// converted policies have one.
pub(crate) fn name(text: &str) -> Result<String, Problem> {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let label = |label: &str| {
        label.bytes().all(|b| alphanumeric(b) || b == b'-')
            && label.bytes().next().is_some_and(alphanumeric)
            && label.bytes().last().is_some_and(alphanumeric)
    };
    if text.len() <= 253 && text.split('.').all(label) {
        Ok(text.to_owned())
    } else {
        Err(Problem::Name(text.to_owned()))
    }
}

/// What L4 does not look at: any text but none.
pub(crate) fn any(text: &str) -> Result<(), Problem> {
    if text.is_empty() {
        Err(ValueError::EmptyString.into())
    } else {
        Ok(())
    }
}

pub(crate) fn pattern(text: &str) -> Result<StringMatch, Problem> {
    Ok(text.parse()?)
}

pub(crate) fn principal(text: &str) -> Result<StringMatch, Problem> {
    if text.starts_with("spiffe://") {
        return Err(Problem::Scheme(text.to_owned()));
    }
    pattern(text)
}

pub(crate) fn cidr(text: &str) -> Result<Cidr, Problem> {
    Ok(text.parse()?)
}

/// `lowest`: Istio lets a rule name port 0, a PeerAuthentication not.
pub(crate) fn port(text: &str, lowest: u16) -> Result<u16, Problem> {
    // `u16::from_str` would take a sign.
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(port) if digits && port >= lowest => Ok(port),
        _ => Err(Problem::Port(text.to_owned(), lowest)),
    }
}

/// `NAMESPACE/NAME`, or `NAME` in the policy's own namespace.
pub(crate) fn service_account(
    text: &str,
    own: &PolicyName,
) -> Result<ServiceAccountMatch, Problem> {
    let wrong = || Problem::ServiceAccount(text.to_owned());
    let (namespace, account) = text
        .split_once('/')
        .unwrap_or((own.namespace.as_str(), text));
    if text.contains('*') || account.contains('/') {
        return Err(wrong());
    }
    ServiceAccountMatch::new(namespace, account).map_err(|_| wrong())
}

pub(crate) fn mode(text: &str) -> Result<MtlsMode, Problem> {
    match text {
        "UNSET" => Ok(MtlsMode::Unset),
        "DISABLE" => Ok(MtlsMode::Disable),
        "PERMISSIVE" => Ok(MtlsMode::Permissive),
        "STRICT" => Ok(MtlsMode::Strict),
        _ => Err(Problem::Mode(text.to_owned())),
    }
}

/// As Go reads booleans, which is how Istiod reads annotations.
pub(crate) fn boolean(text: &str) -> Result<bool, Problem> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" | "" => Ok(false),
        _ => Err(Problem::Bool(text.to_owned())),
    }
}

/// As the API server writes it, `YYYY-MM-DDThh:mm:ssZ`: such times sort as text.
pub(crate) fn time(text: &str) -> Result<String, Problem> {
    let shape = "0000-00-00T00:00:00Z";
    let fits = |(shape, byte): (u8, u8)| match shape {
        b'0' => byte.is_ascii_digit(),
        _ => byte == shape,
    };
    if text.len() == shape.len() && shape.bytes().zip(text.bytes()).all(fits) {
        Ok(text.to_owned())
    } else {
        Err(Problem::Time(text.to_owned()))
    }
}

/// What a `when` compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    SourceIp,
    SourceNamespace,
    SourcePrincipal,
    DestinationIp,
    DestinationPort,
    /// Known to Istio, not to L4.
    Other,
}

pub(crate) fn key(text: &str) -> Result<Key, Problem> {
    let indexed = |prefix: &str| {
        let name = text
            .strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix(']'));
        name.is_some_and(|rest| {
            rest.split_once('[')
                .is_some_and(|(_, name)| !name.is_empty())
        })
    };
    match text {
        "source.ip" => Ok(Key::SourceIp),
        "source.namespace" => Ok(Key::SourceNamespace),
        "source.principal" => Ok(Key::SourcePrincipal),
        "destination.ip" => Ok(Key::DestinationIp),
        "destination.port" => Ok(Key::DestinationPort),
        "remote.ip"
        | "source.serviceAccount"
        | "source.trustDomain"
        | "request.auth.principal"
        | "request.auth.audiences"
        | "request.auth.presenter"
        | "connection.sni" => Ok(Key::Other),
        _ if [
            "request.headers",
            "request.auth.claims",
            "experimental.envoy.filters.",
        ]
        .into_iter()
        .any(indexed) =>
        {
            Ok(Key::Other)
        }
        _ => Err(Problem::Key(text.to_owned())),
    }
}
