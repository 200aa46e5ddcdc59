//! A CA in memory, for tests: it issues what a real one would and what a real
//! one must never issue.
//!
//! Everything here panics on a mistake of the test itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod handshake;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SignatureAlgorithm,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::bundles::TrustBundles;
use crate::spiffe_id::{TrustDomain, WorkloadIdentity};
use crate::svid::Svid;

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
    signer: Issuer<'static, KeyPair>,
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
            signer: Issuer::new(certificate_params, key),
        }
    }

    /// The same root, with leaves now signed by one more intermediate.
    #[must_use]
    pub fn with_intermediate(mut self, params: &CaParams) -> Self {
        let key = KeyPair::generate_for(params.algorithm).unwrap();
        let depth = self.intermediates.len();
        let name = format!("intermediate {depth} of ");
        let certificate_params = params.certificate(&name, self.trust_domain.as_str());
        let certificate = certificate_params.signed_by(&key, &self.signer).unwrap();
        self.intermediates.insert(0, certificate.der().clone());
        self.signer = Issuer::new(certificate_params, key);
        self
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
        let leaf = params.certificate().signed_by(key, &self.signer).unwrap();
        std::iter::once(leaf.der().clone())
            .chain(self.intermediates.iter().cloned())
            .collect()
    }
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
}

impl Default for CaParams {
    fn default() -> Self {
        Self {
            algorithm: &rcgen::PKCS_ECDSA_P256_SHA256,
            not_before: SystemTime::now() - Duration::from_secs(3600),
            not_after: SystemTime::now() + Duration::from_secs(10 * 365 * 86400),
            is_ca: true,
            key_usages: vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign],
        }
    }
}

impl CaParams {
    fn certificate(&self, name: &str, trust_domain: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("{name}{trust_domain}"));
        params.not_before = self.not_before.into();
        params.not_after = self.not_after.into();
        params.is_ca = if self.is_ca {
            IsCa::Ca(BasicConstraints::Unconstrained)
        } else {
            IsCa::ExplicitNoCa
        };
        params.key_usages = self.key_usages.clone();
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
        }
    }

    fn key(&self) -> KeyPair {
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
            params.custom_extensions = vec![extension];
        }
        params
    }
}
