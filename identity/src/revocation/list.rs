//! One certificate revocation list (RFC 5280 section 5).

use std::collections::HashSet;

use arc_swap::ArcSwapOption;
use rustls_pki_types::UnixTime;
use webpki::BorrowedCertRevocationList;
use x509_parser::asn1_rs::Any;
use x509_parser::extensions::{
    CRLDistributionPoint, DistributionPointName, GeneralName, ParsedExtension,
};
use x509_parser::prelude::{CertificateRevocationList, FromDer};
use x509_parser::x509::X509Name;

use crate::chain::{Link, SIGNATURES};
use crate::leaf::printable;
use crate::verifier::CLOCK_SKEW;

/// A list that parsed. Whether its issuer really signed it is known once an
/// issuer's key is at hand, with the chain of a peer.
pub(super) struct Crl {
    /// DER contents of the issuer's name.
    pub(super) issuer: Vec<u8>,
    /// The issuer's name, printable.
    pub(super) issuer_name: String,
    /// Unix seconds.
    pub(super) this_update: i64,
    /// Unix seconds.
    pub(super) next_update: i64,
    pub(super) der: Vec<u8>,
    /// The CRL number (RFC 5280 section 5.2.3), big endian without zeros in front.
    number: Option<Vec<u8>>,
    /// The identifier of the key that signed it (section 5.2.1).
    authority_key: Option<Vec<u8>>,
    revoked: HashSet<Box<[u8]>>,
    scope: Option<Scope>,
    signed: Vec<u8>,
    algorithm: Vec<u8>,
    signature: Vec<u8>,
    /// The public key that the signature was last found good under. The key of
    /// an issuer seldom changes: one signature check a list, not one a
    /// handshake.
    verified_by: ArcSwapOption<Vec<u8>>,
}

/// An issuing distribution point: the list is about some of the issuer's
/// certificates only.
#[derive(PartialEq, Eq)]
struct Scope {
    points: Vec<String>,
    leaves_only: bool,
    cas_only: bool,
}

impl Crl {
    pub(super) fn parse(der: &[u8]) -> Result<Self, String> {
        let (_, list) = CertificateRevocationList::from_der(der)
            .map_err(|_| "not a certificate revocation list".to_owned())?;
        // openssl's default: webpki would call it malformed.
        if list.version().is_none() {
            return Err(
                "it is of version 1: version 2 is needed (for openssl: set crl_extensions)"
                    .to_owned(),
            );
        }
        // webpki's reading is the strict one: version 2, a nextUpdate, no delta,
        // no indirect and no by-reason list, no unknown critical extension.
        let strict = BorrowedCertRevocationList::from_der(der).map_err(unsupported)?;
        let revoked = strict
            .into_iter()
            .map(|entry| entry.map(|entry| significant(entry.serial_number).into()))
            .collect::<Result<HashSet<Box<[u8]>>, _>>()
            .map_err(unsupported)?;
        let strict = strict.to_owned().map_err(unsupported)?;
        let strict = webpki::CertRevocationList::from(strict);

        let next_update = list
            .next_update()
            .ok_or_else(|| "it has no nextUpdate".to_owned())?;
        let parts = signed_parts(der).ok_or_else(|| "its signature does not parse".to_owned())?;
        let scope = match strict.issuing_distribution_point() {
            Some(_) => Some(scope_of(&list)?),
            None => None,
        };
        Ok(Self {
            issuer: strict.issuer().to_vec(),
            issuer_name: printable(&list.issuer().to_string()),
            this_update: list.last_update().timestamp(),
            next_update: next_update.timestamp(),
            der: der.to_vec(),
            number: list
                .crl_number()
                .map(|number| significant(&number.to_bytes_be()).to_vec()),
            authority_key: authority_key(&list),
            revoked,
            scope,
            signed: parts.0.to_vec(),
            algorithm: parts.1.to_vec(),
            signature: parts.2.to_vec(),
            verified_by: ArcSwapOption::empty(),
        })
    }

    /// How many serial numbers it lists.
    pub(super) fn len(&self) -> usize {
        self.revoked.len()
    }

    pub(super) fn lists(&self, serial: &[u8]) -> bool {
        self.revoked.contains(significant(serial))
    }

    /// Whether both are editions of one list: of the same issuer, key and scope.
    /// A rotated issuer keeps its name, but numbers the lists of its keys apart.
    pub(super) fn same_series(&self, other: &Self) -> bool {
        self.issuer == other.issuer
            && self.authority_key == other.authority_key
            && self.scope == other.scope
    }

    /// Whether it says which key signed it, as RFC 5280 demands.
    pub(super) fn names_its_key(&self) -> bool {
        self.authority_key.is_some()
    }

    /// Whether it was issued before `other`, an edition of the same list. Where
    /// both have a CRL number the number decides.
    pub(super) fn older_than(&self, other: &Self) -> bool {
        match (&self.number, &other.number) {
            (Some(own), Some(theirs)) if own != theirs => (own.len(), own) < (theirs.len(), theirs),
            _ => self.this_update < other.this_update,
        }
    }

    /// Number and date, to tell editions apart in messages.
    pub(super) fn edition(&self) -> String {
        let number = match &self.number {
            Some(number) => format!("number 0x{}", crate::leaf::hex(number)),
            None => "no number".to_owned(),
        };
        format!("{number}, thisUpdate {} (Unix seconds)", self.this_update)
    }

    /// Whether the list claims to know about this certificate at all.
    ///
    /// A list with a distribution point is one of several; it knows about the
    /// certificates that name the point. Reading it as complete would accept
    /// what another of the lists revokes.
    pub(super) fn covers(&self, link: &Link) -> bool {
        let Some(scope) = &self.scope else {
            return true;
        };
        let kind = if link.is_ca {
            !scope.leaves_only
        } else {
            !scope.cas_only
        };
        kind && link
            .crl_points
            .iter()
            .any(|point| scope.points.contains(point))
    }

    /// Whether its issuer has that name.
    pub(super) fn issued_under(&self, name: &X509Name<'_>) -> bool {
        Any::from_der(name.as_raw()).is_ok_and(|(_, name)| name.data == self.issuer)
    }

    /// Whether the key signed this list. `public_key` is the contents of a
    /// `SubjectPublicKeyInfo`.
    pub(super) fn signed_by(&self, public_key: &[u8]) -> bool {
        if self
            .verified_by
            .load()
            .as_ref()
            .is_some_and(|known| known.as_slice() == public_key)
        {
            return true;
        }
        let Some((algorithm, key)) = algorithm_and_bits(public_key) else {
            return false;
        };
        let good = SIGNATURES.all.iter().any(|candidate| {
            candidate.public_key_alg_id().as_ref() == algorithm
                && candidate.signature_alg_id().as_ref() == self.algorithm
                && candidate
                    .verify_signature(key, &self.signed, &self.signature)
                    .is_ok()
        });
        if good {
            self.verified_by
                .store(Some(std::sync::Arc::new(public_key.to_vec())));
        }
        good
    }

    /// Whether the list may be relied on at `now`. Like a certificate it may
    /// begin a little late, and ends on the second.
    pub(super) fn timeliness(&self, now: UnixTime) -> Timeliness {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let skew = i64::try_from(CLOCK_SKEW.as_secs()).unwrap_or(0);
        if now >= self.next_update {
            Timeliness::Overdue
        } else if self.this_update > now.saturating_add(skew) {
            Timeliness::NotYet
        } else {
            Timeliness::Current
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timeliness {
    Current,
    Overdue,
    NotYet,
}

/// URIs under which a certificate says its list can be had.
pub(crate) fn point_uris(points: &[CRLDistributionPoint<'_>]) -> Vec<String> {
    points
        .iter()
        // A point with an issuer or reasons is for indirect or partial lists.
        .filter(|point| point.crl_issuer.is_none() && point.reasons.is_none())
        .filter_map(|point| point.distribution_point.as_ref())
        .flat_map(uris)
        .collect()
}

fn uris(name: &DistributionPointName<'_>) -> Vec<String> {
    match name {
        DistributionPointName::FullName(names) => names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some((*uri).to_owned()),
                _ => None,
            })
            .collect(),
        DistributionPointName::NameRelativeToCRLIssuer(_) => Vec::new(),
    }
}

fn scope_of(list: &CertificateRevocationList<'_>) -> Result<Scope, String> {
    let mut scope = None;
    for extension in list.extensions() {
        if let ParsedExtension::IssuingDistributionPoint(point) = extension.parsed_extension() {
            scope = Some(Scope {
                points: point
                    .distribution_point
                    .as_ref()
                    .map(uris)
                    .unwrap_or_default(),
                leaves_only: point.only_contains_user_certs,
                cas_only: point.only_contains_ca_certs,
            });
        }
    }
    match scope {
        Some(scope) if !scope.points.is_empty() => Ok(scope),
        _ => Err("its issuing distribution point has no URI".to_owned()),
    }
}

fn authority_key(list: &CertificateRevocationList<'_>) -> Option<Vec<u8>> {
    list.extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(key) => key.key_identifier.as_ref(),
            _ => None,
        })
        .map(|identifier| identifier.0.to_vec())
}

/// What is signed, the algorithm identifier's contents and the signature.
fn signed_parts(der: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (_, outer) = Any::from_der(der).ok()?;
    let contents = outer.data;
    let (rest, _) = Any::from_der(contents).ok()?;
    let signed = contents.get(..contents.len().checked_sub(rest.len())?)?;
    let (algorithm, signature) = algorithm_and_bits(rest)?;
    Some((signed, algorithm, signature))
}

/// An algorithm identifier's contents and the whole bytes of the bit string
/// behind it: a public key, or a signature.
fn algorithm_and_bits(contents: &[u8]) -> Option<(&[u8], &[u8])> {
    let (rest, algorithm) = Any::from_der(contents).ok()?;
    let (rest, bits) = Any::from_der(rest).ok()?;
    let (unused, whole) = bits.data.split_first()?;
    (rest.is_empty() && *unused == 0).then_some((algorithm.data, whole))
}

/// A serial number without the zero bytes in front. Two encodings of one number
/// are one number; that a negative one then equals a positive one can only
/// refuse more.
fn significant(serial: &[u8]) -> &[u8] {
    let start = serial.iter().position(|&byte| byte != 0);
    start
        .and_then(|start| serial.get(start..))
        .unwrap_or_default()
}

fn unsupported(error: webpki::Error) -> String {
    use webpki::Error as E;
    match error {
        E::UnsupportedDeltaCrl => "it is a delta list: give the complete one".to_owned(),
        E::UnsupportedIndirectCrl => {
            "it is an indirect list: give the one each issuer signs itself".to_owned()
        }
        E::UnsupportedRevocationReasonsPartitioning => {
            "it covers some revocation reasons only: give the complete one".to_owned()
        }
        E::UnsupportedCrlVersion => "it is not of version 2".to_owned(),
        other => format!("not a certificate revocation list of RFC 5280: {other}"),
    }
}
