//! First flights, made by hand.

/// A ClientHello of a client that knows nothing newer than TLS 1.2 (RFC 5246), in a record:
/// no supported_versions extension. It offers `alpn`, and suites and groups that any server
/// of its time would take.
pub fn tls12_client_hello(alpn: &[u8]) -> Vec<u8> {
    let mut protocol = vec![length8(alpn)];
    protocol.extend(alpn);
    let extensions: [(u16, Vec<u8>); 5] = [
        // supported_groups: x25519, secp256r1
        (10, vec![0, 4, 0x00, 0x1d, 0x00, 0x17]),
        // ec_point_formats: uncompressed
        (11, vec![1, 0]),
        // signature_algorithms: ecdsa_secp256r1_sha256, rsa_pss_rsae_sha256
        (13, vec![0, 4, 0x04, 0x03, 0x08, 0x04]),
        // application_layer_protocol_negotiation
        (16, with_length16(&protocol)),
        // extended_master_secret
        (23, Vec::new()),
    ];
    let mut encoded = Vec::new();
    for (kind, content) in extensions {
        encoded.extend(kind.to_be_bytes());
        encoded.extend(with_length16(&content));
    }
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]);
    body.push(0);
    // ECDHE-ECDSA and ECDHE-RSA with AES-128-GCM
    body.extend(with_length16(&[0xc0, 0x2b, 0xc0, 0x2f]));
    body.extend([1, 0]);
    body.extend(with_length16(&encoded));
    let mut message = vec![1, 0];
    message.extend(with_length16(&body));
    record(22, &message)
}

/// A plaintext record of version 3.1, as a first record is.
pub fn record(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut record = vec![kind, 3, 1];
    record.extend(with_length16(body));
    record
}

fn with_length16(content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes(), content].concat()
}

fn length8(content: &[u8]) -> u8 {
    u8::try_from(content.len()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_tls_stack_reads_the_old_hello_as_one_without_tls13() {
        let mut acceptor = rustls::server::Acceptor::default();
        acceptor
            .read_tls(&mut tls12_client_hello(b"ringfence/1").as_slice())
            .unwrap();
        let accepted = acceptor.accept().unwrap().unwrap();
        let hello = accepted.client_hello();
        assert_eq!(hello.alpn().unwrap().collect::<Vec<_>>(), [b"ringfence/1"]);
        assert_eq!(hello.cipher_suites().len(), 2);
    }
}
