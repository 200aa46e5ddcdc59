//! A TLS 1.3 peer that does after the handshake whatever it is told to: it has the traffic
//! keys and seals records of any type and content, by code of its own (RFC 8446, section 5).

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ktls_offload::protocol::{CONTENT_TYPE, Message, decode, encode};
use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::kx_group::X25519;
use rustls::crypto::aws_lc_rs::{default_provider, sign::any_supported_type};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, Connection, ConnectionTrafficSecrets, DigitallySignedStruct,
    ServerConfig, ServerConnection, SignatureScheme,
};

use crate::authority::Credentials;

pub const ALERT: u8 = 21;
pub const HANDSHAKE: u8 = 22;
pub const DATA: u8 = 23;

/// The alert close_notify, level warning (RFC 8446, section 6.1).
pub const CLOSE_NOTIFY: [u8; 2] = [1, 0];

const HEADER: usize = 5;

/// One end of a TLS 1.3 connection whose handshake is complete on this side.
#[derive(Debug)]
pub struct Peer {
    stream: TcpStream,
    /// What the other side showed, leaf first; empty when it showed nothing.
    certificates: Vec<CertificateDer<'static>>,
    sealer: Keys,
    opener: Keys,
    /// Number of the next control message.
    counter: u64,
}

/// What comes from the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// Content type and content.
    Record(u8, Vec<u8>),
    /// The connection is closed.
    Fin,
    /// The connection is reset.
    Reset,
}

/// The key exchanges that a [`Peer`] knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyExchange {
    /// Whatever rustls knows, post-quantum hybrids first.
    Any,
    /// X25519 alone, as of a peer from before the hybrids.
    X25519,
}

impl KeyExchange {
    fn provider(self) -> Arc<CryptoProvider> {
        let mut provider = default_provider();
        if self == KeyExchange::X25519 {
            provider.kx_groups = vec![X25519];
        }
        Arc::new(provider)
    }
}

impl Peer {
    /// Shakes hands as a client that shows `credentials` and takes any server. The key need
    /// not be the certificate's.
    pub fn connect(
        stream: TcpStream,
        credentials: Option<&Credentials>,
        alpn: &[&[u8]],
    ) -> Result<Self> {
        Self::connect_by(stream, credentials, alpn, KeyExchange::Any)
    }

    /// The same, with these key exchanges to choose from.
    pub fn connect_by(
        stream: TcpStream,
        credentials: Option<&Credentials>,
        alpn: &[&[u8]],
        key_exchange: KeyExchange,
    ) -> Result<Self> {
        let config = client_config(credentials, alpn, key_exchange)?;
        let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
        Self::establish(
            stream,
            ClientConnection::new(Arc::new(config), name)?.into(),
        )
    }

    /// Shakes hands as a server that shows `credentials` and takes any client.
    pub fn accept(
        stream: TcpStream,
        credentials: &Credentials,
        alpn: &[&[u8]],
        key_exchange: KeyExchange,
    ) -> Result<Self> {
        let mut config = ServerConfig::builder_with_provider(key_exchange.provider())
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(certified(credentials)?));
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config.enable_secret_extraction = true;
        config.send_tls13_tickets = 0;
        Self::establish(stream, ServerConnection::new(Arc::new(config))?.into())
    }

    fn establish(mut stream: TcpStream, mut tls: Connection) -> Result<Self> {
        loop {
            while tls.wants_write() {
                tls.write_tls(&mut stream)
                    .context("sending a handshake record")?;
            }
            if !tls.is_handshaking() {
                break;
            }
            // Record by record: what follows the handshake is not rustls's.
            let Some(record) = read_record(&mut stream)? else {
                bail!("closed during the handshake")
            };
            tls.read_tls(&mut record.as_slice())?;
            if let Err(error) = tls.process_new_packets() {
                while tls.wants_write() && tls.write_tls(&mut stream).is_ok() {}
                return Err(error.into());
            }
        }
        let certificates = tls.peer_certificates().unwrap_or_default().to_vec();
        let secrets = tls.dangerous_extract_secrets()?;
        Ok(Peer {
            stream,
            certificates,
            sealer: Keys::new(secrets.tx)?,
            opener: Keys::new(secrets.rx)?,
            counter: 0,
        })
    }

    /// The chain that the other side showed, leaf first.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// The ClientHello that [`Peer::connect`] begins with, as a record.
    pub fn first_flight(alpn: &[&[u8]]) -> Result<Vec<u8>> {
        let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        let mut tls =
            ClientConnection::new(Arc::new(client_config(None, alpn, KeyExchange::Any)?), name)?;
        let mut hello = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut hello)?;
        }
        Ok(hello)
    }

    /// Sends one record of that type.
    pub fn put(&mut self, kind: u8, content: &[u8]) -> Result<()> {
        let record = self.sealer.seal(kind, content)?;
        self.stream.write_all(&record).context("sending a record")
    }

    /// Sends one record, changed by `spoil` after it was sealed.
    pub fn put_spoiled(
        &mut self,
        kind: u8,
        content: &[u8],
        spoil: impl FnOnce(&mut Vec<u8>),
    ) -> Result<()> {
        let mut record = self.sealer.seal(kind, content)?;
        spoil(&mut record);
        self.stream
            .write_all(&record)
            .context("sending a spoiled record")
    }

    /// Sends a control message.
    pub fn say(&mut self, message: Message) -> Result<()> {
        let encoded = encode(&message, self.counter);
        self.counter += 1;
        self.put(CONTENT_TYPE, encoded.as_bytes())
    }

    /// The next control message; anything else is an error.
    pub fn hear(&mut self) -> Result<Message> {
        match self.receive()? {
            Received::Record(CONTENT_TYPE, content) => Ok(decode(&content)?.0),
            other => bail!("{other:?} instead of a control message"),
        }
    }

    /// What comes next.
    pub fn receive(&mut self) -> Result<Received> {
        match read_record(&mut self.stream) {
            Ok(Some(record)) => {
                let (kind, content) = self.opener.open(&record)?;
                Ok(Received::Record(kind, content))
            }
            Ok(None) => Ok(Received::Fin),
            Err(error) if is_reset(&error) => Ok(Received::Reset),
            Err(error) => Err(error).context("waiting for a record"),
        }
    }

    /// Reads until the connection is closed in whatever way; returns the records before that.
    /// A close_notify is answered, so that the other side need not wait for us.
    pub fn until_closed(&mut self) -> Result<Vec<(u8, Vec<u8>)>> {
        let mut records = Vec::new();
        loop {
            match self.receive()? {
                Received::Record(kind, content) => {
                    if kind == ALERT {
                        self.finish_sending();
                    }
                    records.push((kind, content));
                }
                Received::Fin | Received::Reset => return Ok(records),
            }
        }
    }

    /// Closes as one should, and waits until the other side has closed, too.
    pub fn leave(&mut self) -> Result<()> {
        self.put(ALERT, &CLOSE_NOTIFY)?;
        self.until_closed()?;
        Ok(())
    }

    /// Sends FIN. The connection may be gone already.
    pub fn finish_sending(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

/// What a peer without keys sees until the connection is closed, by FIN or RST.
pub fn read_until_closed(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(error) if is_reset(&error) => Ok(bytes),
        Err(error) => Err(error).context("waiting for the connection to be closed"),
    }
}

fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}

fn client_config(
    credentials: Option<&Credentials>,
    alpn: &[&[u8]],
    key_exchange: KeyExchange,
) -> Result<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(key_exchange.provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    let mut config = match credentials {
        Some(credentials) => builder.with_client_cert_resolver(Arc::new(certified(credentials)?)),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_secret_extraction = true;
    config.enable_sni = false;
    Ok(config)
}

/// Certificate and key, not compared: somebody else's certificate can be shown.
fn certified(credentials: &Credentials) -> Result<SingleCertAndKey> {
    let key = any_supported_type(&credentials.key)?;
    Ok(SingleCertAndKey::from(CertifiedKey::new(
        credentials.chain.clone(),
        key,
    )))
}

/// One whole record with its header, or `None` at the end of the stream.
fn read_record(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut record = vec![0u8; HEADER];
    if let Err(error) = stream.read_exact(&mut record) {
        return if error.kind() == ErrorKind::UnexpectedEof {
            Ok(None)
        } else {
            Err(error)
        };
    }
    let length = match record.as_slice() {
        [_, _, _, high, low] => usize::from(u16::from_be_bytes([*high, *low])),
        _ => 0,
    };
    record.resize(HEADER + length, 0);
    stream.read_exact(record.get_mut(HEADER..).unwrap_or_default())?;
    Ok(Some(record))
}

/// Keys of one direction.
#[derive(Debug)]
struct Keys {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Keys {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => bail!("a cipher suite that this peer cannot seal for"),
        };
        let key = UnboundKey::new(algorithm, key.as_ref())
            .map_err(|_| anyhow::anyhow!("a key of the wrong length"))?;
        Ok(Keys {
            key: LessSafeKey::new(key),
            iv: iv.as_ref().try_into()?,
            sequence,
        })
    }

    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce.iter_mut().skip(4).zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    fn seal(&mut self, kind: u8, content: &[u8]) -> Result<Vec<u8>> {
        let mut sealed = content.to_vec();
        sealed.push(kind);
        let length = u16::try_from(sealed.len() + self.key.algorithm().tag_len())?;
        let mut record = vec![DATA, 3, 3];
        record.extend(length.to_be_bytes());
        let nonce = self.nonce();
        self.key
            .seal_in_place_append_tag(nonce, Aad::from(&record), &mut sealed)
            .map_err(|_| anyhow::anyhow!("sealing a record failed"))?;
        record.extend(sealed);
        Ok(record)
    }

    /// Content type and content of a record.
    fn open(&mut self, record: &[u8]) -> Result<(u8, Vec<u8>)> {
        let (header, body) = record
            .split_at_checked(HEADER)
            .context("a record without a header")?;
        let mut body = body.to_vec();
        let nonce = self.nonce();
        let inner = self
            .key
            .open_in_place(nonce, Aad::from(header), &mut body)
            .map_err(|_| {
                anyhow::anyhow!("the peer sent a record that does not open: {header:02x?}")
            })?;
        let end = inner
            .iter()
            .rposition(|byte| *byte != 0)
            .context("a record of padding alone")?;
        let kind = *inner.get(end).context("a record without a type")?;
        Ok((kind, inner.get(..end).unwrap_or_default().to_vec()))
    }
}

/// Takes any server certificate: the attacker does not care.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::authority::{Authority, Leaf};
    use std::net::TcpListener;

    fn pair() -> (Peer, Peer) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let credentials = Authority::stranger()
            .unwrap()
            .issue(&Leaf::of("x"))
            .unwrap();
        let server = std::thread::spawn(move || {
            Peer::accept(server, &credentials, &[b"a"], KeyExchange::Any).unwrap()
        });
        let client = Peer::connect(client, None, &[b"a"]).unwrap();
        (client, server.join().unwrap())
    }

    #[test]
    fn two_peers_understand_each_other() {
        let (mut client, mut server) = pair();
        client.say(Message::Ready).unwrap();
        assert_eq!(server.hear().unwrap(), Message::Ready);
        server.put(DATA, b"data").unwrap();
        assert_eq!(
            client.receive().unwrap(),
            Received::Record(DATA, b"data".to_vec())
        );
        server.put(ALERT, &CLOSE_NOTIFY).unwrap();
        server.finish_sending();
        assert_eq!(
            client.until_closed().unwrap(),
            [(ALERT, CLOSE_NOTIFY.to_vec())]
        );
        assert_eq!(server.receive().unwrap(), Received::Fin);
    }

    #[test]
    fn a_record_that_was_spoiled_is_noticed() {
        let (mut client, mut server) = pair();
        client
            .put_spoiled(DATA, b"data", |record| *record.last_mut().unwrap() ^= 1)
            .unwrap();
        assert!(server.receive().is_err());
        client
            .put_spoiled(DATA, b"data", |record| record.truncate(7))
            .unwrap();
        client.finish_sending();
        assert!(server.receive().is_err());
    }
}
