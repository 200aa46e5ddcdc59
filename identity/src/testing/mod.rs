//! A CA in memory, for tests: it issues what a real one would and what a real
//! one must never issue.
//!
//! Everything here panics on a mistake of the test itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod handshake;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use prost::Message as _;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CrlDistributionPoint,
    CrlIssuingDistributionPoint, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, NameConstraints,
    RevokedCertParams, SanType, SerialNumber, SignatureAlgorithm, SigningKey as _,
};
use rustls::sign::SigningKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::asn1_rs::Any;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundles::TrustBundles;
use crate::source::{FetchProblem, Issued};
use crate::spiffe_id::{TrustDomain, WorkloadIdentity};
use crate::svid::Svid;
use crate::trust::TrustStore;

/// The identity `spiffe://TD/ns/NS/sa/SA`.
pub fn workload(trust_domain: &str, namespace: &str, service_account: &str) -> WorkloadIdentity {
    let trust_domain = TrustDomain::parse(trust_domain).unwrap();
    WorkloadIdentity::new(trust_domain, namespace, service_account).unwrap()
}

/// A root, optionally with an intermediate that signs the leaves.
#[derive(Debug)]
pub struct TestCa {
    trust_domain: TrustDomain,
    root: CertificateDer<'static>,
    intermediates: Vec<CertificateDer<'static>>,
    /// Root first; the last one signs the leaves.
    issuers: Vec<Issuer<'static, KeyPair>>,
}

impl TestCa {
    /// A self-signed P-256 root, valid from an hour ago for ten years.
    pub fn new(trust_domain: &str) -> Self {
        Self::with_root(trust_domain, &CaParams::default())
    }

    /// A root with other dates or another algorithm.
    pub fn with_root(trust_domain: &str, params: &CaParams) -> Self {
        let key = KeyPair::generate_for(params.algorithm).unwrap();
        let certificate_params = params.certificate("root of ", trust_domain);
        let root = certificate_params.self_signed(&key).unwrap().der().clone();
        Self {
            trust_domain: TrustDomain::parse(trust_domain).unwrap(),
            root,
            intermediates: Vec::new(),
            issuers: vec![Issuer::new(certificate_params, key)],
        }
    }

    /// The same root, with leaves now signed by one more intermediate.
    #[must_use]
    pub fn with_intermediate(mut self, params: &CaParams) -> Self {
        let key = KeyPair::generate_for(params.algorithm).unwrap();
        let depth = self.intermediates.len();
        let name = format!("intermediate {depth} of ");
        let certificate_params = params.certificate(&name, self.trust_domain.as_str());
        let certificate = certificate_params.signed_by(&key, self.signer()).unwrap();
        self.intermediates.insert(0, certificate.der().clone());
        self.issuers.push(Issuer::new(certificate_params, key));
        self
    }

    fn signer(&self) -> &Issuer<'static, KeyPair> {
        self.issuers.last().unwrap()
    }

    /// One CA of trust domain `td` for the whole process.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<TestCa> = OnceLock::new();
        SHARED.get_or_init(|| Self::new("td"))
    }

    /// The CA's trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The root certificate.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The CA certificates between leaf and root, nearest to the leaf first.
    pub fn intermediates(&self) -> &[CertificateDer<'static>] {
        &self.intermediates
    }

    /// Bundles that know this CA's root for its trust domain, and nothing else.
    pub fn bundle(&self) -> Arc<TrustBundles> {
        let bundles = TrustBundles::new();
        let roots = [self.root.clone()];
        bundles.replace("test", &self.trust_domain, &roots).unwrap();
        Arc::new(bundles)
    }

    /// A good SVID, valid from a minute ago for an hour.
    pub fn svid(&self, identity: &WorkloadIdentity) -> Svid {
        self.svid_with(&LeafParams::good(identity))
    }

    /// An SVID as described, good or bad: it is not checked.
    pub fn svid_with(&self, params: &LeafParams) -> Svid {
        self.svid_at(params, SystemTime::now())
    }

    /// [`svid_with`](Self::svid_with) for a test whose clock shows `now`.
    pub fn svid_at(&self, params: &LeafParams, now: SystemTime) -> Svid {
        let key = params.key();
        let chain = self.chain_for(params, &key);
        let der = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).unwrap();
        match Svid::new(
            params.identity.spiffe_id(),
            chain.clone(),
            Arc::clone(&key),
            now,
        ) {
            Ok(svid) => svid,
            Err(_) => Svid::unchecked(params.identity.spiffe_id().clone(), chain, key),
        }
    }

    /// A chain as described for somebody's public key, leaf first.
    pub fn chain_for(
        &self,
        params: &LeafParams,
        key: &impl rcgen::PublicKeyData,
    ) -> Vec<CertificateDer<'static>> {
        let leaf = params.certificate().signed_by(key, self.signer()).unwrap();
        std::iter::once(leaf.der().clone())
            .chain(self.intermediates.iter().cloned())
            .collect()
    }

    /// Another certificate in place of `certificate`, signed by the leaves'
    /// issuer: `change` may edit the DER of what is signed (header included).
    pub fn sign_again(
        &self,
        certificate: &CertificateDer<'_>,
        change: impl FnOnce(&mut Vec<u8>),
    ) -> CertificateDer<'static> {
        let (_, outer) = Any::from_der(certificate).unwrap();
        let (rest, _) = Any::from_der(outer.data).unwrap();
        let mut signed = outer.data[..outer.data.len() - rest.len()].to_vec();
        let (after, _) = Any::from_der(rest).unwrap();
        let algorithm = &rest[..rest.len() - after.len()];
        change(&mut signed);
        let signature = self.signer().key().sign(&signed).unwrap();
        let bits = [&[0], signature.as_slice()].concat();
        let content = [signed.as_slice(), algorithm, &tlv(0x03, &bits)].concat();
        CertificateDer::from(tlv(0x30, &content))
    }

    /// A revocation list (DER) of the issuer at `level`: 0 is the root, 1 the
    /// first intermediate below it.
    pub fn crl(&self, level: usize, params: &CrlParams) -> Vec<u8> {
        let issuer = self.issuers.get(level).unwrap();
        params.list().signed_by(issuer).unwrap().der().to_vec()
    }

    /// [`crl`](Self::crl) of the leaves' issuer, in PEM.
    pub fn crl_pem(&self, params: &CrlParams) -> String {
        params
            .list()
            .signed_by(self.signer())
            .unwrap()
            .pem()
            .unwrap()
    }
}

/// How a revocation list looks.
#[derive(Clone, Debug)]
pub struct CrlParams {
    /// DER contents of serial numbers.
    pub revoked: Vec<Vec<u8>>,
    /// When it was made.
    pub this_update: SystemTime,
    /// Until when it is valid.
    pub next_update: SystemTime,
    /// Of an issuing distribution point.
    pub point: Option<String>,
    /// The CRL number.
    pub number: u64,
}

impl Default for CrlParams {
    /// Revokes nobody, from a minute ago for an hour; newer than any before.
    fn default() -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        Self {
            revoked: Vec::new(),
            this_update: SystemTime::now() - Duration::from_secs(60),
            next_update: SystemTime::now() + Duration::from_secs(3600),
            point: None,
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
        }
    }
}

impl CrlParams {
    /// Revokes these certificates.
    pub fn revoking<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'a>>) -> Self {
        Self {
            revoked: certificates.into_iter().map(serial).collect(),
            ..Self::default()
        }
    }

    fn list(&self) -> CertificateRevocationListParams {
        CertificateRevocationListParams {
            this_update: self.this_update.into(),
            next_update: self.next_update.into(),
            crl_number: SerialNumber::from(self.number),
            issuing_distribution_point: self.point.clone().map(|uri| CrlIssuingDistributionPoint {
                distribution_point: CrlDistributionPoint { uris: vec![uri] },
                scope: None,
            }),
            revoked_certs: self
                .revoked
                .iter()
                .map(|serial| RevokedCertParams {
                    serial_number: SerialNumber::from_slice(serial),
                    revocation_time: self.this_update.into(),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
    }
}

/// Reads what a CA answered, as [`CaClient`](crate::CaClient) does, for
/// `spiffe://td/ns/a/sa/b` and a key of the process.
pub fn read_ca_answer(cert_chain: &[String]) -> Result<Issued, FetchProblem> {
    static KEY: OnceLock<Arc<dyn SigningKey>> = OnceLock::new();
    let key = KEY.get_or_init(|| {
        let pair = KeyPair::generate().unwrap();
        let der = PrivateKeyDer::try_from(pair.serialize_der()).unwrap();
        rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).unwrap()
    });
    let identity = workload("td", "a", "b");
    crate::ca::check_answer(cert_chain, &identity, Arc::clone(key), SystemTime::now())
}

/// Reads what a Workload API sent, as [`WorkloadApi`](crate::WorkloadApi) does:
/// the SVID of `spiffe://td/ns/a/sa/b`. Bundles and revocation lists go into
/// `trust`.
pub fn read_workload_answer(message: &[u8], trust: &TrustStore) -> Result<Issued, FetchProblem> {
    let message = crate::workload_proto::X509SvidResponse::decode(message)
        .map_err(|error| FetchProblem::BadAnswer(error.to_string()))?;
    crate::spire::read_answer(message, &workload("td", "a", "b"), trust)
}

/// One PEM section.
pub fn pem(label: &str, der: &[u8]) -> String {
    use std::fmt::Write as _;
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut base64 = String::new();
    for chunk in der.chunks(3) {
        let byte = |n: usize| u32::from(chunk.get(n).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let digit = usize::try_from(bits >> (18 - 6 * place) & 63).unwrap();
            let padding = place > chunk.len();
            base64.push(if padding { '=' } else { ALPHABET[digit].into() });
        }
    }
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in base64.as_bytes().chunks(64) {
        writeln!(text, "{}", str::from_utf8(line).unwrap()).unwrap();
    }
    text + &format!("-----END {label}-----\n")
}

/// Certificates as one PEM text.
pub fn pem_chain<'a>(chain: impl IntoIterator<Item = &'a CertificateDer<'a>>) -> String {
    chain
        .into_iter()
        .map(|der| pem("CERTIFICATE", der))
        .collect()
}

/// DER: tag, length and `content`.
pub fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let significant = &length[length.iter().position(|&b| b != 0).unwrap_or(7)..];
    let mut der = vec![tag];
    if content.len() >= 0x80 {
        der.push(0x80 | u8::try_from(significant.len()).unwrap());
    }
    der.extend_from_slice(significant);
    der.extend_from_slice(content);
    der
}

/// The DER contents of a certificate's serial number.
pub fn serial(certificate: &CertificateDer<'_>) -> Vec<u8> {
    let (_, certificate) = X509Certificate::from_der(certificate).unwrap();
    certificate.raw_serial().to_vec()
}

/// How a CA certificate looks.
#[derive(Clone, Debug)]
pub struct CaParams {
    /// The key's algorithm.
    pub algorithm: &'static SignatureAlgorithm,
    /// First moment of validity.
    pub not_before: SystemTime,
    /// Last moment of validity.
    pub not_after: SystemTime,
    /// Whether its basic constraints make it a CA.
    pub is_ca: bool,
    /// Its key usage.
    pub key_usages: Vec<KeyUsagePurpose>,
    /// How many CAs may follow below.
    pub path_length: Option<u8>,
    /// What names it may sign.
    pub name_constraints: Option<NameConstraints>,
    /// Empty leaves the extension out.
    pub extended_key_usages: Vec<ExtendedKeyUsagePurpose>,
    /// A common name other than one made from the trust domain.
    pub common_name: Option<String>,
}

impl Default for CaParams {
    fn default() -> Self {
        Self {
            algorithm: &rcgen::PKCS_ECDSA_P256_SHA256,
            not_before: SystemTime::now() - Duration::from_secs(3600),
            not_after: SystemTime::now() + Duration::from_secs(10 * 365 * 86400),
            is_ca: true,
            key_usages: vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign],
            path_length: None,
            name_constraints: None,
            extended_key_usages: Vec::new(),
            common_name: None,
        }
    }
}

impl CaParams {
    fn certificate(&self, name: &str, trust_domain: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(
            DnType::CommonName,
            self.common_name
                .clone()
                .unwrap_or_else(|| format!("{name}{trust_domain}")),
        );
        params.not_before = self.not_before.into();
        params.not_after = self.not_after.into();
        params.is_ca = if self.is_ca {
            IsCa::Ca(self.path_length.map_or(
                BasicConstraints::Unconstrained,
                BasicConstraints::Constrained,
            ))
        } else {
            IsCa::ExplicitNoCa
        };
        params.key_usages = self.key_usages.clone();
        params.extended_key_usages = self.extended_key_usages.clone();
        params.name_constraints = self.name_constraints.clone();
        params
    }
}

/// How a leaf certificate looks. Start from [`good`](Self::good) and spoil it.
#[derive(Clone, Debug)]
pub struct LeafParams {
    /// Whose SVID this pretends to be.
    pub identity: WorkloadIdentity,
    /// URI SANs, in order.
    pub uri_sans: Vec<String>,
    /// DNS SANs, in order, behind the URIs.
    pub dns_sans: Vec<String>,
    /// First moment of validity.
    pub not_before: SystemTime,
    /// Last moment of validity.
    pub not_after: SystemTime,
    /// `None` leaves the extension out; `Some(true)` makes the leaf a CA.
    pub basic_constraints_ca: Option<bool>,
    /// Empty leaves the extension out.
    pub key_usages: Vec<KeyUsagePurpose>,
    /// Empty leaves the extension out.
    pub extended_key_usages: Vec<ExtendedKeyUsagePurpose>,
    /// The key's algorithm.
    pub algorithm: &'static SignatureAlgorithm,
    /// Adds a critical extension that nobody knows.
    pub unknown_critical_extension: bool,
    /// URIs of distribution points.
    pub crl_points: Vec<String>,
    /// OID, DER content and criticality of extensions to add as they are.
    pub extensions: Vec<(Vec<u64>, Vec<u8>, bool)>,
    /// DER contents of a positive number; `None` is a random one.
    pub serial: Option<Vec<u8>>,
}

impl LeafParams {
    /// What a proper CA issues: P-256, from a minute ago for an hour.
    pub fn good(identity: &WorkloadIdentity) -> Self {
        Self {
            identity: identity.clone(),
            uri_sans: vec![identity.to_string()],
            dns_sans: Vec::new(),
            not_before: SystemTime::now() - Duration::from_secs(60),
            not_after: SystemTime::now() + Duration::from_secs(3600),
            basic_constraints_ca: Some(false),
            key_usages: vec![
                KeyUsagePurpose::DigitalSignature,
                KeyUsagePurpose::KeyEncipherment,
            ],
            extended_key_usages: vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
            algorithm: &rcgen::PKCS_ECDSA_P256_SHA256,
            unknown_critical_extension: false,
            crl_points: Vec::new(),
            extensions: Vec::new(),
            serial: None,
        }
    }

    /// A new key of the leaf's algorithm.
    pub fn key(&self) -> KeyPair {
        KeyPair::generate_for(self.algorithm).unwrap()
    }

    fn certificate(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = self.not_before.into();
        params.not_after = self.not_after.into();
        let ia5 = |name: &String| Ia5String::try_from(name.as_str()).unwrap();
        params.subject_alt_names = self
            .uri_sans
            .iter()
            .map(|uri| SanType::URI(ia5(uri)))
            .chain(self.dns_sans.iter().map(|dns| SanType::DnsName(ia5(dns))))
            .collect();
        params.is_ca = match self.basic_constraints_ca {
            None => IsCa::NoCa,
            Some(false) => IsCa::ExplicitNoCa,
            Some(true) => IsCa::Ca(BasicConstraints::Unconstrained),
        };
        params.key_usages = self.key_usages.clone();
        params.extended_key_usages = self.extended_key_usages.clone();
        if self.unknown_critical_extension {
            let oid = [1, 3, 6, 1, 4, 1, 55555, 1];
            let mut extension = CustomExtension::from_oid_content(&oid, vec![5, 0]);
            extension.set_criticality(true);
            params.custom_extensions.push(extension);
        }
        for (oid, content, critical) in &self.extensions {
            let mut extension = CustomExtension::from_oid_content(oid, content.clone());
            extension.set_criticality(*critical);
            params.custom_extensions.push(extension);
        }
        if !self.crl_points.is_empty() {
            let uris = self.crl_points.clone();
            params.crl_distribution_points = vec![CrlDistributionPoint { uris }];
        }
        params.serial_number = self.serial.as_deref().map(SerialNumber::from_slice);
        params
    }
}
