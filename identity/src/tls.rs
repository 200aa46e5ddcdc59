//! rustls configurations for one connection.
//!
//! TLS 1.3 only, mutual, hybrid post-quantum key exchange first or only
//! ([`KeyExchangePolicy`]). Traffic
//! secrets can be extracted (the record layer is elsewhere). No session is ever
//! resumed and no ticket sent: a resumed session would carry an identity that
//! was proven under an older certificate. No early data, no SNI, no client
//! hints about the roots we trust.
//!
//! Whether an ALPN protocol was agreed on is for the caller to check after the
//! handshake: rustls ends a handshake without overlap only when both sides
//! offered one.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, OnceLock};

use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;

use crate::chain::SIGNATURES;
use crate::svid::Svid;
use crate::verifier::PeerVerifier;

/// Which key exchanges a connection may end up with. The one that was agreed on
/// is rustls's `negotiated_key_exchange_group`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KeyExchangePolicy {
    /// X25519MLKEM768 first; X25519 or P-256 with a peer that lacks it.
    #[default]
    PreferPostQuantum,
    /// X25519MLKEM768 or no connection: what is recorded today stays secret from
    /// a quantum computer of tomorrow, whoever the peer is.
    RequirePostQuantum,
}

impl KeyExchangePolicy {
    /// A short fixed name: a configuration value and a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PreferPostQuantum => "prefer-post-quantum",
            Self::RequirePostQuantum => "require-post-quantum",
        }
    }
}

/// [`client_config_with`] the default [`KeyExchangePolicy`].
pub fn client_config(
    svid: &Svid,
    verifier: Arc<PeerVerifier>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, rustls::Error> {
    client_config_with(svid, verifier, alpn, KeyExchangePolicy::default())
}

/// [`server_config_with`] the default [`KeyExchangePolicy`].
pub fn server_config(
    svid: &Svid,
    verifier: Arc<PeerVerifier>,
    alpn: &[&[u8]],
) -> Result<ServerConfig, rustls::Error> {
    server_config_with(svid, verifier, alpn, KeyExchangePolicy::default())
}

/// A configuration for dialling one connection under `svid`. ALPN protocols in
/// order of preference.
///
/// The error is a bug of ours (a provider without TLS 1.3), never the peer's.
pub fn client_config_with(
    svid: &Svid,
    verifier: Arc<PeerVerifier>,
    alpn: &[&[u8]],
    key_exchange: KeyExchangePolicy,
) -> Result<ClientConfig, rustls::Error> {
    client_config_on(provider_for(key_exchange), svid, verifier, alpn)
}

/// [`client_config_with`] a provider, whatever is in it.
pub(crate) fn client_config_on(
    provider: Arc<CryptoProvider>,
    svid: &Svid,
    verifier: Arc<PeerVerifier>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(
            svid.certified_key(),
        ))));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_sni = false;
    config.enable_early_data = false;
    config.enable_secret_extraction = true;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// A configuration for accepting one connection under `svid`. ALPN protocols in
/// order of preference (the server's order decides).
///
/// The error is a bug of ours (a provider without TLS 1.3), never the peer's.
pub fn server_config_with(
    svid: &Svid,
    verifier: Arc<PeerVerifier>,
    alpn: &[&[u8]],
    key_exchange: KeyExchangePolicy,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider_for(key_exchange))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(
            svid.certified_key(),
        ))));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_secret_extraction = true;
    config.max_early_data_size = 0;
    config.send_half_rtt_data = false;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// A name to give rustls, which wants one for dialling. It is never sent (SNI
/// is off) and never compared (a peer is known by its SPIFFE ID).
pub fn unused_server_name() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into())
}

/// The provider of mesh connections: aws-lc-rs, narrowed.
///
/// AES-128-GCM comes first: it is what kTLS accelerates best and what every
/// kernel with kTLS has.
pub fn provider() -> Arc<CryptoProvider> {
    provider_for(KeyExchangePolicy::default())
}

/// [`provider`] with another key exchange policy.
pub fn provider_for(key_exchange: KeyExchangePolicy) -> Arc<CryptoProvider> {
    static PREFER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    static REQUIRE: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let (slot, kx_groups): (_, &[&'static dyn SupportedKxGroup]) = match key_exchange {
        KeyExchangePolicy::PreferPostQuantum => (
            &PREFER,
            &[
                kx_group::X25519MLKEM768,
                kx_group::X25519,
                kx_group::SECP256R1,
            ],
        ),
        KeyExchangePolicy::RequirePostQuantum => (&REQUIRE, &[kx_group::X25519MLKEM768]),
    };
    Arc::clone(slot.get_or_init(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                cipher_suite::TLS13_AES_128_GCM_SHA256,
                cipher_suite::TLS13_AES_256_GCM_SHA384,
                cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: kx_groups.to_vec(),
            signature_verification_algorithms: SIGNATURES,
            ..aws_lc_rs::default_provider()
        })
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::{TestCa, handshake, workload};
    use crate::verifier::ExpectedPeer;
    use rustls::{NamedGroup, ProtocolVersion};

    fn configs() -> (ClientConfig, ServerConfig) {
        let ca = TestCa::shared();
        let svid = ca.svid(&workload("td", "a", "b"));
        let verifier = || PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
        (
            client_config(&svid, verifier(), &[b"ringfence/1", b"h2"]).unwrap(),
            server_config(&svid, verifier(), &[b"ringfence/1"]).unwrap(),
        )
    }

    #[test]
    fn nothing_but_tls13_is_offered_and_nothing_is_resumed() {
        let (client, server) = configs();
        for suite in &provider().cipher_suites {
            assert_eq!(suite.version().version, ProtocolVersion::TLSv1_3);
        }
        assert_eq!(provider().kx_groups[0].name(), NamedGroup::X25519MLKEM768);
        assert!(client.enable_secret_extraction && server.enable_secret_extraction);
        assert!(!client.enable_early_data && !client.enable_sni);
        assert_eq!(server.send_tls13_tickets, 0);
        assert_eq!(server.max_early_data_size, 0);
        assert!(!server.session_storage.can_cache());
        assert!(!server.ticketer.enabled());
    }

    /// The group both ends agreed on, or what the dialling side ended with.
    fn agreed(
        client: KeyExchangePolicy,
        server: KeyExchangePolicy,
        classic_client: bool,
    ) -> Result<NamedGroup, rustls::Error> {
        let ca = TestCa::shared();
        let svid = ca.svid(&workload("td", "a", "b"));
        let verifier = || PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
        let mut dialling = client_config_with(&svid, verifier(), &[b"h2"], client).unwrap();
        if classic_client {
            dialling = handshake::client_config(&svid, verifier(), &[b"h2"], kx_group::X25519);
        }
        let accepting = server_config_with(&svid, verifier(), &[b"h2"], server).unwrap();
        handshake::key_exchange(dialling, accepting)
    }

    #[test]
    fn the_key_exchange_is_post_quantum_where_both_can() {
        use KeyExchangePolicy::{PreferPostQuantum, RequirePostQuantum};
        for client in [PreferPostQuantum, RequirePostQuantum] {
            for server in [PreferPostQuantum, RequirePostQuantum] {
                assert_eq!(
                    agreed(client, server, false),
                    Ok(NamedGroup::X25519MLKEM768)
                );
            }
        }
        let classic = agreed(PreferPostQuantum, PreferPostQuantum, true);
        assert_eq!(classic, Ok(NamedGroup::X25519));
    }

    #[test]
    fn a_classic_peer_is_refused_where_post_quantum_is_required() {
        let refused = agreed(
            KeyExchangePolicy::PreferPostQuantum,
            KeyExchangePolicy::RequirePostQuantum,
            true,
        );
        assert_eq!(
            refused,
            Err(rustls::Error::AlertReceived(
                rustls::AlertDescription::HandshakeFailure
            ))
        );
    }

    #[test]
    fn a_hello_carries_no_server_name() {
        let (client, _) = configs();
        let mut connection =
            rustls::ClientConnection::new(Arc::new(client), unused_server_name()).unwrap();
        let mut hello = Vec::new();
        connection.write_tls(&mut hello).unwrap();
        let mut acceptor = rustls::server::Acceptor::default();
        acceptor.read_tls(&mut hello.as_slice()).unwrap();
        let accepted = acceptor.accept().unwrap().unwrap();
        assert_eq!(accepted.client_hello().server_name(), None);
    }
}
