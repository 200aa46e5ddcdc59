//! A TLS handshake between two sides in memory.
//!
//! Panics on a mistake of the test itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::{AlertDescription, ClientConfig, ClientConnection, Error, ServerConnection};

use crate::svid::Svid;
use crate::tls;
use crate::verifier::{ExpectedPeer, PeerVerifier, VerifiedPeer};

/// How a handshake ended, seen by one of the sides.
#[derive(Debug)]
pub struct Outcome {
    judge: Arc<PeerVerifier>,
    /// What the side of the judge ended with.
    judged: Result<(), Error>,
    /// What the other side ended with.
    other: Result<(), Error>,
}

impl Outcome {
    /// The peer, if both sides finished and it was verified.
    pub fn accepted(self) -> Result<VerifiedPeer, String> {
        let failed = |error: Error| match self.judge.refusal_of(&error) {
            Some(refusal) => format!("{error} ({})", refusal.as_str()),
            None => error.to_string(),
        };
        self.judged.map_err(failed)?;
        self.other.map_err(|error| error.to_string())?;
        self.judge
            .verified()
            .ok_or_else(|| "not verified".to_owned())
    }

    /// The peer was refused for `reason` and learned no more than `alert`.
    pub fn assert_refused(&self, reason: &str, alert: AlertDescription) {
        let error = match &self.judged {
            Ok(()) => panic!("accepted instead of {reason}"),
            Err(error) => error,
        };
        let refusal = self.judge.refusal_of(error);
        let got = refusal.as_ref().map(|refusal| refusal.as_str());
        assert_eq!(got, Some(reason), "{error}");
        assert_eq!(self.judge.verified(), None, "{reason}");
        assert_eq!(self.other, Err(Error::AlertReceived(alert)), "{reason}");
    }
}

/// Runs a handshake and answers as the client and as the server see it.
pub fn run(
    client: &Svid,
    client_verifier: Arc<PeerVerifier>,
    server: &Svid,
    server_verifier: Arc<PeerVerifier>,
) -> (Outcome, Outcome) {
    let client = tls::client_config(client, Arc::clone(&client_verifier), &[b"test"]).unwrap();
    let server = tls::server_config(server, Arc::clone(&server_verifier), &[b"test"]).unwrap();
    let (on_client, on_server) = pump(client, server);
    let seen_by_client = Outcome {
        judge: client_verifier,
        judged: on_client.clone(),
        other: on_server.clone(),
    };
    let seen_by_server = Outcome {
        judge: server_verifier,
        judged: on_server,
        other: on_client,
    };
    (seen_by_client, seen_by_server)
}

/// Runs a handshake in which the client has nothing to show, as `judge`, the
/// server's verifier, sees it.
pub fn run_without_client_certificate(server: &Svid, judge: Arc<PeerVerifier>) -> Outcome {
    let client = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(PeerVerifier::new(
            judge.trust(),
            ExpectedPeer::AnyTrusted,
        ))
        .with_no_client_auth();
    let server = tls::server_config(server, Arc::clone(&judge), &[]).unwrap();
    let (other, judged) = pump(client, server);
    Outcome {
        judge,
        judged,
        other,
    }
}

/// A client that offers one key exchange only.
pub fn client_config(
    svid: &Svid,
    verifier: Arc<PeerVerifier>,
    alpn: &[&[u8]],
    group: &'static dyn SupportedKxGroup,
) -> ClientConfig {
    let provider = CryptoProvider {
        kx_groups: vec![group],
        ..CryptoProvider::clone(&tls::provider())
    };
    tls::client_config_on(Arc::new(provider), svid, verifier, alpn).unwrap()
}

/// The key exchange that was agreed on, or what the client ended with.
pub fn key_exchange(
    client: ClientConfig,
    server: rustls::ServerConfig,
) -> Result<rustls::NamedGroup, Error> {
    let (client, on_client, on_server) = pump_with(client, server);
    on_client?;
    on_server?;
    Ok(client.negotiated_key_exchange_group().unwrap().name())
}

/// Passes bytes until neither side has any left; what the client and the server
/// ended with.
pub fn pump(
    client: ClientConfig,
    server: rustls::ServerConfig,
) -> (Result<(), Error>, Result<(), Error>) {
    let (_, on_client, on_server) = pump_with(client, server);
    (on_client, on_server)
}

fn pump_with(
    client: ClientConfig,
    server: rustls::ServerConfig,
) -> (ClientConnection, Result<(), Error>, Result<(), Error>) {
    let mut client = ClientConnection::new(Arc::new(client), tls::unused_server_name()).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    let (mut on_client, mut on_server) = (Ok(()), Ok(()));
    loop {
        let mut to_server = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut to_server).unwrap();
        }
        let mut rest = to_server.as_slice();
        while !rest.is_empty() && on_server.is_ok() {
            server.read_tls(&mut rest).unwrap();
            on_server = server.process_new_packets().map(|_| ());
        }
        let mut to_client = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut to_client).unwrap();
        }
        let mut rest = to_client.as_slice();
        while !rest.is_empty() && on_client.is_ok() {
            client.read_tls(&mut rest).unwrap();
            on_client = client.process_new_packets().map(|_| ());
        }
        if to_server.is_empty() && to_client.is_empty() {
            break;
        }
    }
    let handshaking = client.is_handshaking() || server.is_handshaking();
    assert!(
        !handshaking || on_client.is_err() || on_server.is_err(),
        "the handshake stopped half-way"
    );
    (client, on_client, on_server)
}
