//! The judge of one peer.

#[cfg(test)]
mod corpus;
mod peer;
mod refusal;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

pub use self::peer::VerifiedPeer;
pub use self::refusal::PeerRefusal;
use crate::aliases::TrustDomainAliases;
use crate::chain::{Role, SIGNATURES};
use crate::leaf::Leaf;
use crate::spiffe_id::SpiffeId;
use crate::trust::TrustStore;

/// Judges the peer of exactly one connection and remembers the verdict.
///
/// Give one instance to one rustls connection, on either side; afterwards ask
/// for [`verified`](Self::verified) or [`refusal`](Self::refusal). A second
/// certificate shown to the same instance is refused, so a verifier shared by
/// mistake can never mix up two peers.
///
/// The peer must show exactly one URI SAN that is a canonical SPIFFE ID, a
/// chain to a root of *that ID's* trust domain, and a signature over the
/// handshake with the leaf's key. Names other than the URI SAN are ignored, and
/// so is the name the connection was dialled with (SNI is not used).
///
/// Revocation is checked where lists are configured for the peer's trust domain,
/// on either side. Not checked here: whether the peer may do what it asks for.
#[derive(Debug)]
pub struct PeerVerifier {
    trust: TrustStore,
    expected: ExpectedPeer,
    state: Mutex<State>,
}

impl PeerVerifier {
    /// A verifier for one connection. `trust` is a [`TrustStore`], or an
    /// `Arc<TrustBundles>` where there are neither aliases nor revocation lists.
    pub fn new(trust: impl Into<TrustStore>, expected: ExpectedPeer) -> Arc<Self> {
        Arc::new(Self {
            trust: trust.into(),
            expected,
            state: Mutex::new(State::Fresh),
        })
    }

    /// The peer, once its certificate *and* its handshake signature are good.
    ///
    /// Ask after the handshake is complete: only then is it known that nobody
    /// changed the handshake on the way.
    pub fn verified(&self) -> Option<VerifiedPeer> {
        match &*self.state() {
            State::Verified(peer) => Some(peer.clone()),
            _ => None,
        }
    }

    /// Why the peer's certificate was refused, if this verifier refused it.
    pub fn refusal(&self) -> Option<PeerRefusal> {
        match &*self.state() {
            State::Refused(refusal) => Some(refusal.clone()),
            _ => None,
        }
    }

    /// Why a handshake that ended with `error` failed, where that is about the
    /// peer's identity. Unlike [`refusal`](Self::refusal) this also knows what
    /// rustls refuses before it asks a verifier: no certificate at all.
    pub fn refusal_of(&self, error: &Error) -> Option<PeerRefusal> {
        self.refusal().or(match error {
            Error::NoCertificatesPresented => Some(PeerRefusal::NoCertificate),
            _ => None,
        })
    }

    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn trust(&self) -> TrustStore {
        self.trust.clone()
    }

    fn judge_certificate(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
        now: UnixTime,
    ) -> Result<(), Error> {
        let mut state = self.state();
        let verdict = match *state {
            State::Fresh => self.judge(leaf, intermediates, role, now),
            _ => Err(PeerRefusal::VerifierReused),
        };
        match verdict {
            Ok(peer) => {
                *state = State::CertificateGood(peer);
                Ok(())
            }
            Err(refusal) => {
                let error = refusal.to_rustls();
                *state = State::Refused(refusal);
                Err(error)
            }
        }
    }

    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
        now: UnixTime,
    ) -> Result<VerifiedPeer, PeerRefusal> {
        let facts = Leaf::read(leaf)?;
        let path = self
            .trust
            .prove(&facts.id, leaf, intermediates, role, now)?;
        if !self.expected.admits(&facts.id, &self.trust.aliases()) {
            return Err(PeerRefusal::WrongIdentity(facts.id));
        }
        Ok(VerifiedPeer::new(facts, leaf, intermediates, path, role))
    }

    fn judge_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let mut state = self.state();
        let refusal = match &*state {
            State::CertificateGood(peer) if peer.leaf() == Some(leaf) => {
                let peer = peer.clone();
                let verdict =
                    rustls::crypto::verify_tls13_signature(message, leaf, signature, &SIGNATURES);
                match verdict {
                    Ok(valid) => {
                        *state = State::Verified(peer);
                        return Ok(valid);
                    }
                    Err(error) => {
                        *state = State::Refused(PeerRefusal::BadHandshakeSignature);
                        return Err(error);
                    }
                }
            }
            State::Refused(refusal) => refusal.clone(),
            _ => PeerRefusal::VerifierReused,
        };
        let error = refusal.to_rustls();
        *state = State::Refused(refusal);
        Err(error)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whom the connection is meant to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpectedPeer {
    /// Whoever has a valid identity: the accepting side, where policy decides.
    AnyTrusted,
    /// One of these, and nobody when it is empty: the dialling side. An ID of
    /// an alias trust domain counts as the same path in the canonical one (see
    /// [`TrustDomainAliases`]).
    OneOf(BTreeSet<SpiffeId>),
}

impl ExpectedPeer {
    /// Exactly this identity.
    pub fn only(id: SpiffeId) -> Self {
        Self::OneOf(BTreeSet::from([id]))
    }

    fn admits(&self, id: &SpiffeId, aliases: &TrustDomainAliases) -> bool {
        match self {
            Self::AnyTrusted => true,
            Self::OneOf(ids) if ids.contains(id) => true,
            Self::OneOf(_) if aliases.is_empty() => false,
            Self::OneOf(ids) => ids.iter().any(|expected| aliases.same(expected, id)),
        }
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.judge_certificate(end_entity, intermediates, Role::Server, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls13_only())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.judge_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SIGNATURES.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.judge_certificate(end_entity, intermediates, Role::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls13_only())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.judge_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SIGNATURES.supported_schemes()
    }
}

/// How far into the future a `not_before` may lie: clocks of nodes differ.
/// Expiry gets no such allowance.
pub const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Certificates in a peer's chain, the leaf included.
pub const MAX_CHAIN_LENGTH: usize = 10;

/// The order is the order of events; no state is entered twice.
#[derive(Debug)]
enum State {
    Fresh,
    /// The certificate is good; whether the peer has its key is not known yet.
    CertificateGood(VerifiedPeer),
    Verified(VerifiedPeer),
    Refused(PeerRefusal),
}

fn tls13_only() -> Error {
    Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled)
}
