//! A certificate and its key, for one identity of ours.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::sign::{CertifiedKey, SigningKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::encoding::signing_key;
use crate::leaf::Leaf;
use crate::spiffe_id::SpiffeId;
use crate::verifier::{CLOCK_SKEW, MAX_CHAIN_LENGTH, PeerRefusal};

/// An X.509-SVID of ours with its private key.
///
/// The key is held by aws-lc, which cleans its memory on drop; this type keeps
/// no encoded copy and `Debug` shows none. The chain is leaf first and has no
/// root in it.
pub struct Svid {
    facts: Leaf,
    key: Arc<CertifiedKey>,
}

impl Svid {
    /// Puts a chain and its key together for `identity`.
    ///
    /// Checks that the leaf obeys the X.509-SVID profile, names exactly
    /// `identity`, is for this key, and has not expired at `now` (nor begins
    /// more than [`CLOCK_SKEW`] later). Whether the chain leads to a root is
    /// *not* checked: that needs a trust bundle.
    pub fn new(
        identity: &SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: Arc<dyn SigningKey>,
        now: SystemTime,
    ) -> Result<Self, SvidError> {
        if chain.len() > MAX_CHAIN_LENGTH {
            return Err(SvidError::ChainTooLong(chain.len()));
        }
        let leaf = chain.first().ok_or(SvidError::EmptyChain)?;
        let facts = Leaf::read(leaf).map_err(SvidError::Leaf)?;
        if facts.id != *identity {
            return Err(SvidError::OtherIdentity(facts.id));
        }
        check_validity(&facts, now)?;
        let key = CertifiedKey::new(chain, key);
        key.keys_match().map_err(|_| SvidError::OtherKey)?;
        Ok(Self {
            facts,
            key: Arc::new(key),
        })
    }

    /// [`new`](Self::new) with an encoded private key (PKCS#8, SEC 1 or
    /// PKCS#1; ECDSA P-256 or P-384, Ed25519, RSA). Zeroize your copy.
    pub fn from_der(
        identity: &SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKeyDer<'_>,
        now: SystemTime,
    ) -> Result<Self, SvidError> {
        Self::new(identity, chain, signing_key(key)?, now)
    }

    /// Whom this SVID names.
    pub fn id(&self) -> &SpiffeId {
        &self.facts.id
    }

    /// DER certificates, leaf first, without the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The chain and the key as rustls wants them.
    pub fn certified_key(&self) -> &Arc<CertifiedKey> {
        &self.key
    }

    /// First moment of validity, Unix seconds.
    pub fn not_before(&self) -> i64 {
        self.facts.not_before
    }

    /// Last moment of validity, Unix seconds.
    pub fn not_after(&self) -> i64 {
        self.facts.not_after
    }

    /// The serial number, lower-case hex.
    pub fn serial(&self) -> &str {
        &self.facts.serial
    }

    /// The issuer, as a printable distinguished name.
    pub fn issuer(&self) -> &str {
        &self.facts.issuer
    }

    /// Whether the leaf has expired at `now`; no allowance is made.
    pub fn expired_at(&self, now: SystemTime) -> bool {
        unix_seconds(now) > self.facts.not_after
    }

    /// A certificate that `new` would refuse, to see peers refuse it.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn unchecked(
        id: SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: Arc<dyn SigningKey>,
    ) -> Self {
        Self {
            facts: Leaf {
                id,
                not_before: 0,
                not_after: i64::MAX,
                serial: "00".to_owned(),
                issuer: "unchecked".to_owned(),
            },
            key: Arc::new(CertifiedKey::new(chain, key)),
        }
    }
}

impl std::fmt::Debug for Svid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.facts.id)
            .field("serial", &self.facts.serial)
            .field("issuer", &self.facts.issuer)
            .field("not_before", &self.facts.not_before)
            .field("not_after", &self.facts.not_after)
            .finish_non_exhaustive()
    }
}

/// Why a chain and a key are not the SVID that was asked for. Whoever issued
/// them is at fault.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SvidError {
    /// There is no leaf.
    #[error("the chain is empty")]
    EmptyChain,
    /// More certificates than a peer would accept.
    #[error("the chain has {0} certificates, more than {MAX_CHAIN_LENGTH}")]
    ChainTooLong(usize),
    /// The first certificate is not an X.509-SVID.
    #[error("the first certificate would be refused by every peer: {}", .0.as_str())]
    Leaf(PeerRefusal),
    /// It names someone else.
    #[error("the certificate is for {0}")]
    OtherIdentity(SpiffeId),
    /// It is for another key pair.
    #[error("the first certificate is not for our key (is the chain leaf first?)")]
    OtherKey,
    /// The private key does not parse or is of an unknown kind.
    #[error("the private key is not an ECDSA P-256/P-384, Ed25519 or RSA key")]
    UnusableKey,
    /// Too late.
    #[error("the certificate expired at {not_after} and it is {now} (Unix seconds)")]
    Expired {
        /// Unix seconds.
        not_after: i64,
        /// Unix seconds.
        now: i64,
    },
    /// Too early.
    #[error(
        "the certificate is valid from {not_before} and it is {now} (Unix seconds): is a clock wrong?"
    )]
    NotYetValid {
        /// Unix seconds.
        not_before: i64,
        /// Unix seconds.
        now: i64,
    },
}

fn check_validity(facts: &Leaf, now: SystemTime) -> Result<(), SvidError> {
    let now = unix_seconds(now);
    let skew = i64::try_from(CLOCK_SKEW.as_secs()).unwrap_or(0);
    if now > facts.not_after {
        return Err(SvidError::Expired {
            not_after: facts.not_after,
            now,
        });
    }
    if facts.not_before > now.saturating_add(skew) {
        return Err(SvidError::NotYetValid {
            not_before: facts.not_before,
            now,
        });
    }
    Ok(())
}

/// Whole seconds since the epoch; a clock before 1970 reads as 0.
pub(crate) fn unix_seconds(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::{LeafParams, TestCa, workload};
    use std::time::Duration;

    fn id() -> SpiffeId {
        workload("td", "a", "b").spiffe_id().clone()
    }

    fn good() -> Svid {
        TestCa::shared().svid(&workload("td", "a", "b"))
    }

    fn at(unix: i64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(unix.try_into().unwrap())
    }

    /// Puts the good SVID's parts together again, some of them changed.
    fn remake(
        chain: &[CertificateDer<'static>],
        key: &Svid,
        now: SystemTime,
    ) -> Result<Svid, SvidError> {
        let key = Arc::clone(&key.certified_key().key);
        Svid::new(&id(), chain.to_vec(), key, now)
    }

    #[test]
    fn a_matching_chain_and_key_are_accepted() {
        let svid = good();
        let again = remake(svid.chain(), &svid, SystemTime::now()).unwrap();
        assert_eq!(again.id(), &id());
        assert_eq!(again.serial(), svid.serial());
        assert!(!again.expired_at(SystemTime::now()));
    }

    #[test]
    fn mismatches_are_refused_by_name() {
        let (svid, other) = (good(), good());
        let now = SystemTime::now();
        let remade = |chain: &[CertificateDer<'static>]| remake(chain, &svid, now).unwrap_err();

        assert_eq!(remake(&[], &svid, now).unwrap_err(), SvidError::EmptyChain);
        assert_eq!(remade(other.chain()), SvidError::OtherKey);
        let long = vec![svid.chain()[0].clone(); MAX_CHAIN_LENGTH + 1];
        assert_eq!(remade(&long), SvidError::ChainTooLong(MAX_CHAIN_LENGTH + 1));
        let wrong_order = [TestCa::shared().root().clone(), svid.chain()[0].clone()];
        assert_eq!(remade(&wrong_order), SvidError::Leaf(PeerRefusal::LeafIsCa));
        let garbage = [CertificateDer::from(vec![1, 2, 3])];
        assert_eq!(remade(&garbage), SvidError::Leaf(PeerRefusal::Malformed));
        let stranger = workload("td", "a", "stranger");
        let foreign = TestCa::shared().svid(&stranger);
        let expected = SvidError::OtherIdentity(stranger.spiffe_id().clone());
        assert_eq!(
            remake(foreign.chain(), &foreign, now).unwrap_err(),
            expected
        );
    }

    #[test]
    fn validity_has_skew_at_its_start_only() {
        let svid = good();
        let try_at = |unix| remake(svid.chain(), &svid, at(unix));
        try_at(svid.not_before() - 60).unwrap();
        let early = try_at(svid.not_before() - 61).unwrap_err();
        assert!(matches!(early, SvidError::NotYetValid { .. }));
        try_at(svid.not_after()).unwrap();
        let late = try_at(svid.not_after() + 1).unwrap_err();
        assert!(matches!(late, SvidError::Expired { .. }));
        assert!(!svid.expired_at(at(svid.not_after())));
        assert!(svid.expired_at(at(svid.not_after() + 1)));
    }

    #[test]
    fn encoded_keys_of_each_kind_are_read() {
        for algorithm in [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
            &rcgen::PKCS_RSA_SHA256,
        ] {
            let pair = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let params = LeafParams::good(&workload("td", "a", "b"));
            let chain = TestCa::shared().chain_for(&params, &pair);
            let der = PrivateKeyDer::try_from(pair.serialize_der()).unwrap();
            Svid::from_der(&id(), chain, &der, SystemTime::now()).unwrap();
        }
        let der = PrivateKeyDer::Pkcs8(vec![0u8; 16].into());
        let error = Svid::from_der(&id(), good().chain().to_vec(), &der, SystemTime::now());
        assert_eq!(error.unwrap_err(), SvidError::UnusableKey);
    }

    #[test]
    fn debug_shows_neither_key_nor_certificate() {
        let text = format!("{:?}", good());
        assert!(
            text.starts_with("Svid { id: spiffe://td/ns/a/sa/b, serial: "),
            "{text}"
        );
        assert!(!text.to_lowercase().contains("key"), "{text}");
        assert!(text.len() < 300, "{text}");
    }
}
