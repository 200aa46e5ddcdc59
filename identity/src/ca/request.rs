//! What we ask for: a CSR with a fresh key.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prost_types::value::Kind;
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::sign::SigningKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::{Zeroize as _, Zeroizing};

use crate::ca_proto::IstioCertificateRequest;
use crate::source::FetchProblem;
use crate::spiffe_id::WorkloadIdentity;

/// A request and the key that its answer is for.
pub(super) struct Asked {
    pub(super) message: IstioCertificateRequest,
    pub(super) key: Arc<dyn SigningKey>,
    /// PKCS#8 DER of the same key, where the caller is to have it.
    pub(super) exported: Option<Zeroizing<Vec<u8>>>,
}

impl Asked {
    /// A new P-256 key and a CSR with the SPIFFE URI SAN and nothing else: the
    /// CA decides on everything but whose key it is.
    pub(super) fn new(
        identity: &WorkloadIdentity,
        ttl: Duration,
        use_of_key: KeyUse,
    ) -> Result<Self, FetchProblem> {
        let mut pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(internal)?;
        let mut made = Self::with_key(&pair, identity, ttl);
        if let (Ok(made), KeyUse::Exported) = (&mut made, use_of_key) {
            made.exported = Some(Zeroizing::new(pair.serialized_der().to_vec()));
        }
        pair.zeroize();
        made
    }

    fn with_key(
        pair: &KeyPair,
        identity: &WorkloadIdentity,
        ttl: Duration,
    ) -> Result<Self, FetchProblem> {
        let uri = Ia5String::try_from(identity.to_string()).map_err(internal)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri)];
        let csr = params
            .serialize_request(pair)
            .and_then(|csr| csr.pem())
            .map_err(internal)?;
        // Borrowed: the only copy of the encoding is the one zeroized above.
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialized_der()));
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).map_err(internal)?;
        Ok(Self {
            message: IstioCertificateRequest {
                csr,
                validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
                metadata: Some(impersonating(identity)),
            },
            key,
            exported: None,
        })
    }
}

/// What is to become of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyUse {
    /// It stays inside the crypto library.
    Ours,
    /// The caller gets a copy to hand on.
    Exported,
}

fn impersonating(identity: &WorkloadIdentity) -> prost_types::Struct {
    let whom = prost_types::Value {
        kind: Some(Kind::StringValue(identity.to_string())),
    };
    prost_types::Struct {
        fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), whom)]),
    }
}

fn internal(error: impl std::fmt::Display) -> FetchProblem {
    FetchProblem::Internal(error.to_string())
}
