//! Reads the record structure of a captured TLS connection (RFC 8446, sections 4 and 5.1):
//! what a listener without keys can see.

use std::collections::BTreeMap;

/// One direction of a connection, as records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// Records by the content type on the outside.
    pub by_type: BTreeMap<u8, usize>,
    /// Bytes of records of type application_data, headers excluded.
    pub protected_bytes: usize,
    /// Bytes at the end that are part of a record not yet complete.
    pub incomplete: usize,
    /// The first thing that is no TLS record.
    pub violation: Option<String>,
    /// The ServerHello's choice, when this direction has one.
    pub server_hello: Option<ServerHello>,
}

/// What a ServerHello fixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerHello {
    /// From the extension supported_versions; 0x0303 without it.
    pub version: u16,
    pub cipher_suite: u16,
}

pub const CHANGE_CIPHER_SPEC: u8 = 20;
pub const ALERT: u8 = 21;
pub const HANDSHAKE: u8 = 22;
pub const APPLICATION_DATA: u8 = 23;

/// 2^14 and the 256 bytes that protection may add.
const LARGEST_RECORD: usize = 16_384 + 256;
const TLS_1_3: u16 = 0x0304;

impl ServerHello {
    pub fn is_tls13(self) -> bool {
        self.version == TLS_1_3
    }

    /// The IANA name of a TLS 1.3 suite.
    pub fn cipher_name(self) -> &'static str {
        match self.cipher_suite {
            0x1301 => "TLS_AES_128_GCM_SHA256",
            0x1302 => "TLS_AES_256_GCM_SHA384",
            0x1303 => "TLS_CHACHA20_POLY1305_SHA256",
            _ => "unknown cipher suite",
        }
    }
}

impl Records {
    /// Walks the records from the connection's first byte.
    pub fn parse(stream: &[u8]) -> Self {
        let mut records = Records::default();
        let mut rest = stream;
        while let Some((header, after)) = rest.split_first_chunk::<5>() {
            let [kind, major, minor, high, low] = *header;
            let length = usize::from(u16::from_be_bytes([high, low]));
            let offset = stream.len() - rest.len();
            // The first ClientHello may say 3.1 (RFC 8446, section 5.1).
            let version = major == 3 && (minor == 3 || (minor == 1 && offset == 0));
            if !(CHANGE_CIPHER_SPEC..=APPLICATION_DATA).contains(&kind)
                || !version
                || length == 0
                || length > LARGEST_RECORD
            {
                records.violation =
                    Some(format!("byte {offset} begins no TLS record: {header:02x?}"));
                return records;
            }
            let Some((body, next)) = after.split_at_checked(length) else {
                break;
            };
            *records.by_type.entry(kind).or_default() += 1;
            if kind == APPLICATION_DATA {
                records.protected_bytes += length;
            }
            if kind == HANDSHAKE && records.server_hello.is_none() {
                records.server_hello = server_hello(body);
            }
            rest = next;
        }
        records.incomplete = rest.len();
        records
    }

    /// Records of that content type.
    pub fn count(&self, kind: u8) -> usize {
        self.by_type.get(&kind).copied().unwrap_or_default()
    }
}

fn server_hello(body: &[u8]) -> Option<ServerHello> {
    const SERVER_HELLO: u8 = 2;
    const SUPPORTED_VERSIONS: u16 = 43;
    let mut reader = Reader(body);
    if reader.byte()? != SERVER_HELLO {
        return None;
    }
    reader.take(3 + 2 + 32)?;
    let session_id = reader.byte()?;
    reader.take(session_id.into())?;
    let cipher_suite = reader.word()?;
    reader.take(1)?;
    let mut hello = ServerHello {
        version: 0x0303,
        cipher_suite,
    };
    let length = reader.word()?;
    let mut extensions = Reader(reader.take(length.into())?);
    while let (Some(kind), Some(length)) = (extensions.word(), extensions.word()) {
        let mut content = Reader(extensions.take(length.into())?);
        if kind == SUPPORTED_VERSIONS {
            hello.version = content.word()?;
        }
    }
    Some(hello)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn record(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut record = vec![kind, 3, 3];
        record.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        record.extend(body);
        record
    }

    fn hello(extension: &[u8]) -> Vec<u8> {
        let mut body = vec![2, 0, 0, 0, 3, 3];
        body.extend([7; 32]);
        body.extend([0, 0x13, 0x01, 0]);
        body.extend(u16::try_from(extension.len()).unwrap().to_be_bytes());
        body.extend(extension);
        body
    }

    #[test]
    fn a_tls13_server_hello_is_recognised_by_its_extension() {
        let stream = record(HANDSHAKE, &hello(&[0, 43, 0, 2, 3, 4]));
        let hello = Records::parse(&stream).server_hello.unwrap();
        assert!(hello.is_tls13());
        assert_eq!(hello.cipher_name(), "TLS_AES_128_GCM_SHA256");
    }

    #[test]
    fn a_server_hello_without_the_extension_is_not_tls13() {
        let stream = record(HANDSHAKE, &hello(&[]));
        assert!(!Records::parse(&stream).server_hello.unwrap().is_tls13());
    }

    #[test]
    fn plaintext_is_a_violation() {
        let records = Records::parse(b"GET / HTTP/1.1\r\n\r\n");
        assert!(records.violation.is_some());
    }

    #[test]
    fn plaintext_after_records_is_a_violation_at_its_place() {
        let mut stream = record(APPLICATION_DATA, b"sealed");
        stream.extend(b"plain text");
        let records = Records::parse(&stream);
        assert_eq!(records.count(APPLICATION_DATA), 1);
        assert!(records.violation.unwrap().starts_with("byte 11 "));
    }

    #[test]
    fn a_record_that_is_not_complete_is_no_violation() {
        let mut stream = record(APPLICATION_DATA, b"sealed");
        stream.extend(record(APPLICATION_DATA, b"half").get(..7).unwrap());
        let records = Records::parse(&stream);
        assert_eq!((records.violation, records.incomplete), (None, 7));
    }
}
