//! Certificates that a proper CA would issue, and those it never would: signed with the key
//! of the lab's own CA, or with a stranger's.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use ringfence_lab::mesh::principal;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Signs leaf certificates.
#[derive(Debug)]
pub struct Authority(Issuer<'static, KeyPair>);

/// What a leaf certificate says. Start from [`Leaf::of`] and spoil it.
#[derive(Clone, Debug)]
pub struct Leaf {
    pub uris: Vec<String>,
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub is_ca: bool,
    pub usages: Vec<ExtendedKeyUsagePurpose>,
    /// Random when there is none.
    pub serial: Option<u64>,
}

/// A chain, leaf first and without the root, and the leaf's key.
#[derive(Debug)]
pub struct Credentials {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

/// The SPIFFE ID of a service account of the lab.
pub fn spiffe_id(service_account: &str) -> String {
    format!("spiffe://{}", principal(service_account))
}

impl Authority {
    /// The lab's own CA, whose root every agent of the lab trusts. `root` is the path of its
    /// root certificate, beside which it keeps its key.
    pub fn of_lab(root: &Path) -> Result<Self> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
        };
        let key = KeyPair::from_pem(&read(&root.with_file_name("ca-key.pem"))?)?;
        Ok(Authority(Issuer::from_ca_cert_pem(&read(root)?, key)?))
    }

    /// A CA that nobody trusts.
    pub fn stranger() -> Result<Self> {
        Ok(Authority(Issuer::new(stranger(), KeyPair::generate()?)))
    }

    /// A CA that is trusted where its root certificate (DER) is put.
    pub fn with_root() -> Result<(Self, CertificateDer<'static>)> {
        let (params, key) = (stranger(), KeyPair::generate()?);
        let root = params.self_signed(&key)?.der().clone();
        Ok((Authority(Issuer::new(params, key)), root))
    }

    /// The root certificate of a CA that nobody trusts, PEM.
    pub fn another_root_pem() -> Result<String> {
        Ok(stranger().self_signed(&KeyPair::generate()?)?.pem())
    }

    pub fn issue(&self, leaf: &Leaf) -> Result<Credentials> {
        let (certificate, key) = self.sign(leaf)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        Ok(Credentials {
            chain: vec![certificate.der().clone()],
            key,
        })
    }

    /// Certificate and key in PEM.
    pub fn issue_pem(&self, leaf: &Leaf) -> Result<(String, String)> {
        let (certificate, key) = self.sign(leaf)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    fn sign(&self, leaf: &Leaf) -> Result<(Certificate, KeyPair)> {
        let key = KeyPair::generate()?;
        Ok((leaf.params()?.signed_by(&key, &self.0)?, key))
    }

    /// A revocation list (PEM) that was made a minute ago, with these serial numbers (hex,
    /// as `ringfence certs` shows them). It is newer than every other that was made here.
    pub fn revocation_list(&self, serials: &[&str], next_update: SystemTime) -> Result<String> {
        let this_update = SystemTime::now() - Duration::from_secs(60);
        let revoked_certs = serials
            .iter()
            .map(|serial| {
                Ok(RevokedCertParams {
                    serial_number: SerialNumber::from(bytes_of_hex(serial)?),
                    revocation_time: this_update.into(),
                    reason_code: None,
                    invalidity_date: None,
                })
            })
            .collect::<Result<_>>()?;
        let params = CertificateRevocationListParams {
            this_update: this_update.into(),
            next_update: next_update.into(),
            crl_number: SerialNumber::from(nanoseconds()?),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.0)?.pem()?)
    }
}

/// Since the epoch.
fn nanoseconds() -> Result<u64> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(since.as_nanos().try_into()?)
}

fn bytes_of_hex(text: &str) -> Result<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?))
        .collect::<Result<_>>()
        .with_context(|| format!("`{text}` is not hexadecimal"))
}

impl Leaf {
    /// The good certificate of a service account of the lab, valid from a minute ago for an
    /// hour.
    pub fn of(service_account: &str) -> Self {
        Leaf {
            uris: vec![spiffe_id(service_account)],
            dns_names: Vec::new(),
            addresses: Vec::new(),
            not_before: SystemTime::now() - Duration::from_secs(60),
            not_after: SystemTime::now() + Duration::from_secs(3600),
            is_ca: false,
            usages: vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
            serial: None,
        }
    }

    fn params(&self) -> Result<CertificateParams> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.serial_number = self.serial.map(SerialNumber::from);
        params.not_before = self.not_before.into();
        params.not_after = self.not_after.into();
        for uri in &self.uris {
            params
                .subject_alt_names
                .push(SanType::URI(Ia5String::try_from(uri.as_str())?));
        }
        for name in &self.dns_names {
            params
                .subject_alt_names
                .push(SanType::DnsName(Ia5String::try_from(name.as_str())?));
        }
        let addresses = self.addresses.iter().copied().map(SanType::IpAddress);
        params.subject_alt_names.extend(addresses);
        params.is_ca = if self.is_ca {
            IsCa::Ca(BasicConstraints::Unconstrained)
        } else {
            IsCa::ExplicitNoCa
        };
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = self.usages.clone();
        Ok(params)
    }
}

fn stranger() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, "a stranger's root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}
