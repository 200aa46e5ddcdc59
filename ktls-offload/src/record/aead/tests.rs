#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

/// RFC 8448 §3, "Simple 1-RTT Handshake": the client's application data.
const KEY: [u8; 16] = hex("17422dda596ed5d9acd890e3c63f5051");
const IV: [u8; 12] = hex("5b78923dee08579033e523d9");
const RECORD: [u8; 72] = hex(
    "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b\
     9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2977014bd1e3deae63aee\
     bb21694915e4",
);

const fn hex<const N: usize>(text: &str) -> [u8; N] {
    const fn digit(c: u8) -> u8 {
        if c <= b'9' { c - b'0' } else { c - b'a' + 10 }
    }
    let text = text.as_bytes();
    assert!(text.len() == 2 * N);
    let mut out = [0; N];
    let mut i = 0;
    while i < N {
        out[i] = digit(text[2 * i]) << 4 | digit(text[2 * i + 1]);
        i += 1;
    }
    out
}

fn key() -> RecordKey {
    RecordKey::from_parts(&AES_128_GCM, &KEY, IV, 0).unwrap()
}

#[test]
fn sealing_gives_the_record_of_rfc_8448() {
    let mut slot = [0; 72];
    for (i, byte) in slot[HEADER..HEADER + 50].iter_mut().enumerate() {
        *byte = i as u8;
    }
    assert_eq!(key().seal(TYPE_DATA, &mut slot, 50).unwrap(), 72);
    assert_eq!(slot, RECORD);
}

#[test]
fn the_record_of_rfc_8448_opens() {
    let mut record = RECORD;
    assert_eq!(record_len(&record).unwrap(), Some(72));
    assert_eq!(key().open(&mut record).unwrap(), (TYPE_DATA, 50));
    assert!(
        record[HEADER..HEADER + 50]
            .iter()
            .enumerate()
            .all(|(i, b)| *b == i as u8)
    );
}

#[test]
fn a_record_with_any_bit_flipped_is_refused() {
    for byte in 0..RECORD.len() {
        let mut record = RECORD;
        record[byte] ^= 1;
        assert!(
            key().open(&mut record).is_err() || byte == 1,
            "byte {byte} is not protected"
        );
    }
}

#[test]
fn a_record_out_of_order_is_refused() {
    let mut receiver = key();
    let mut first = RECORD;
    receiver.open(&mut first).unwrap();
    let mut again = RECORD;
    assert!(matches!(
        receiver.open(&mut again),
        Err(TunnelError::BadRecord)
    ));
}

#[test]
fn padding_is_removed_and_nothing_but_padding_is_refused() {
    // Sealing with content type 0 lets us write the inner plaintext by hand.
    let seal = |inner: &[u8]| {
        let mut slot = vec![0; inner.len() + OVERHEAD];
        slot[HEADER..HEADER + inner.len()].copy_from_slice(inner);
        key().seal(0, &mut slot, inner.len()).unwrap();
        slot
    };
    assert_eq!(key().open(&mut seal(b"abc\x17\0\0\0")).unwrap(), (23, 3));
    assert_eq!(key().open(&mut seal(b"\x17\0")).unwrap(), (23, 0));
    assert!(matches!(
        key().open(&mut seal(b"\0\0\0")),
        Err(TunnelError::BadRecord)
    ));
}

#[test]
fn record_headers_that_are_too_long_too_short_or_foreign_are_refused() {
    assert_eq!(record_len(&[23, 3, 3, 0x40]).unwrap(), None);
    assert_eq!(
        record_len(&[23, 3, 3, 0x40, 0x11]).unwrap(),
        Some(MAX_RECORD)
    );
    assert!(matches!(
        record_len(&[23, 3, 3, 0x40, 0x12]),
        Err(TunnelError::OversizedRecord)
    ));
    assert_eq!(record_len(&[23, 3, 3, 0, 17]).unwrap(), Some(22));
    for header in [
        [23, 3, 3, 0, 16],
        [22, 3, 3, 0, 30],
        [21, 3, 3, 0, 30],
        [23, 3, 1, 0, 30],
    ] {
        assert!(
            matches!(record_len(&header), Err(TunnelError::BadRecord)),
            "{header:?}"
        );
    }
}

#[test]
fn sealing_stops_at_the_record_limit() {
    let limit = MAX_RECORDS + CLOSING_RECORDS;
    let mut key = RecordKey::from_parts(&AES_128_GCM, &KEY, IV, limit - 1).unwrap();
    let mut slot = [0; 64];
    assert!(key.seal(TYPE_DATA, &mut slot, 1).is_ok());
    assert!(matches!(
        key.seal(TYPE_DATA, &mut slot, 1),
        Err(TunnelError::RecordLimit)
    ));
}

#[test]
fn keys_do_not_show_in_debug_output() {
    let text = format!("{:?}", key());
    assert!(text.contains("Wiped(..)") && !text.contains("23"), "{text}");
}
