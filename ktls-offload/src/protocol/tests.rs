#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

fn stream_id() -> impl Strategy<Value = StreamId> {
    any::<[u8; 16]>().prop_map(StreamId)
}

/// Two addresses of the same family that the protocol can carry.
fn addresses() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
    let v4 = (1u32..0xe000_0000, 1u16..).prop_map(|(ip, port)| (Ipv4Addr::from(ip), port).into());
    let v6 = (1u128..1 << 96, 1u16..)
        .prop_map(|(ip, port)| (Ipv6Addr::from(0x2001 << 112 | ip), port).into());
    prop_oneof![(v4.clone(), v4), (v6.clone(), v6)]
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        Just(Message::Ready),
        (stream_id(), addresses(), any::<u32>()).prop_map(
            |(stream, (destination, source), flags)| Message::Open(Open {
                stream,
                destination,
                source,
                flags
            })
        ),
        stream_id().prop_map(|stream| Message::Opened { stream }),
        stream_id().prop_map(|stream| Message::End { stream }),
        (stream_id(), any::<u16>()).prop_map(|(stream, code)| Message::Refused {
            stream,
            reason: RefuseReason::from_code(code)
        }),
        (stream_id(), any::<u16>()).prop_map(|(stream, code)| Message::Reset {
            stream,
            reason: ResetReason::from_code(code)
        }),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_decodes_to_the_same(message in message(), counter: u64) {
        let bytes = encode(&message, counter);
        prop_assert!(bytes.as_bytes().len() <= MAX_SENT);
        prop_assert_eq!(decode(bytes.as_bytes()), Ok((message, counter)));
    }

    #[test]
    fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn a_spoiled_message_is_refused_or_has_one_encoding(
        message in message(),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let mut bytes = encode(&message, 5).as_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok((other, counter)) = decode(&bytes) {
            // OPEN without its optional flags re-encodes with them; all else is canonical.
            if !matches!(other, Message::Open(_)) {
                let again = encode(&other, counter);
                prop_assert_eq!(again.as_bytes(), &bytes[..]);
            }
        }
    }

    #[test]
    fn a_cut_message_is_refused(message in message(), at in any::<prop::sample::Index>()) {
        let bytes = encode(&message, 5);
        let bytes = bytes.as_bytes();
        prop_assert!(decode(&bytes[..at.index(bytes.len())]).is_err());
    }
}

fn raw(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 0];
    bytes.extend((body.len() as u16).to_be_bytes());
    bytes.extend(0u64.to_be_bytes());
    bytes.extend(body);
    bytes
}

fn field(number: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = number.to_be_bytes().to_vec();
    bytes.extend((value.len() as u16).to_be_bytes());
    bytes.extend(value);
    bytes
}

const ID: [u8; 16] = [7; 16];
const V4: [u8; 6] = [10, 0, 0, 1, 0, 80];

fn open_with(destination: &[u8], source: &[u8]) -> Vec<u8> {
    raw(
        2,
        &[field(1, &ID), field(2, destination), field(3, source)].concat(),
    )
}

#[test]
fn the_smallest_open_is_accepted() {
    let (message, _) = decode(&open_with(&V4, &V4)).unwrap();
    assert!(matches!(message, Message::Open(open) if open.flags == 0));
}

#[test]
fn an_unknown_field_is_skipped_only_if_it_says_so() {
    let end = |number| raw(5, &[field(1, &ID), field(number, b"x")].concat());
    assert!(decode(&end(0x8007)).is_ok());
    assert_eq!(decode(&end(7)), Err(ProtocolError::UnknownField(7)));
}

#[test]
fn malformed_messages_are_refused_with_the_right_reason() {
    use ProtocolError as E;
    let v6 = |ip: &str, port: u16| {
        let mut value = ip.parse::<Ipv6Addr>().unwrap().octets().to_vec();
        value.extend(port.to_be_bytes());
        value
    };
    let mut wrong_length = raw(5, &field(1, &ID));
    wrong_length[3] += 1;
    let mut trailing = raw(5, &field(1, &ID));
    trailing.push(0);
    let mut zero = raw(1, &[]);
    zero[1] = 1;
    let table: Vec<(&str, Vec<u8>, E)> = vec![
        ("empty", vec![], E::Truncated { len: 0 }),
        ("short header", vec![1; 11], E::Truncated { len: 11 }),
        ("too long", vec![0; MAX_MESSAGE + 1], E::TooLong),
        ("type 0", raw(0, &[]), E::UnknownType(0)),
        ("type 11", raw(11, &[]), E::UnknownType(11)),
        ("MOVE", raw(7, &[]), E::Reserved("MOVE")),
        ("ATTACH", raw(8, &[]), E::Reserved("ATTACH")),
        ("ATTACHED", raw(9, &[]), E::Reserved("ATTACHED")),
        ("REAUTH", raw(10, &[]), E::Reserved("REAUTH")),
        ("header byte 1", zero, E::HeaderNotZero(1)),
        (
            "length too big",
            wrong_length,
            E::LengthMismatch {
                announced: 21,
                actual: 20,
            },
        ),
        (
            "trailing byte",
            trailing,
            E::LengthMismatch {
                announced: 20,
                actual: 21,
            },
        ),
        ("half a field header", raw(5, &[0, 1, 0]), E::FieldOverrun),
        ("field overrun", raw(5, &[0, 1, 0, 17, 0]), E::FieldOverrun),
        (
            "duplicate field",
            raw(5, &[field(1, &ID), field(1, &ID)].concat()),
            E::FieldOrder(1),
        ),
        (
            "fields out of order",
            raw(4, &[field(5, &[0, 1]), field(1, &ID)].concat()),
            E::FieldOrder(1),
        ),
        (
            "READY with a stream",
            raw(1, &field(1, &ID)),
            E::UnknownField(1),
        ),
        (
            "END with a reason",
            raw(5, &[field(1, &ID), field(5, &[0, 1])].concat()),
            E::UnknownField(5),
        ),
        ("END without a stream", raw(5, &[]), E::MissingField(1)),
        (
            "RESET without reason",
            raw(6, &field(1, &ID)),
            E::MissingField(5),
        ),
        (
            "short stream id",
            raw(5, &field(1, &[7; 15])),
            E::FieldLength { field: 1, len: 15 },
        ),
        (
            "five-byte address",
            open_with(&V4[..5], &V4),
            E::FieldLength { field: 2, len: 5 },
        ),
        (
            "empty address",
            open_with(&V4, &[]),
            E::FieldLength { field: 3, len: 0 },
        ),
        (
            "port 0",
            open_with(&[10, 0, 0, 1, 0, 0], &V4),
            E::BadAddress("port 0"),
        ),
        (
            "0.0.0.0",
            open_with(&[0, 0, 0, 0, 0, 80], &V4),
            E::BadAddress("unspecified address"),
        ),
        (
            "multicast",
            open_with(&V4, &[224, 0, 0, 1, 0, 80]),
            E::BadAddress("not a unicast address"),
        ),
        (
            "broadcast",
            open_with(&[255, 255, 255, 255, 0, 80], &V4),
            E::BadAddress("not a unicast address"),
        ),
        (
            "IPv4-mapped",
            open_with(&v6("::ffff:10.0.0.1", 80), &v6("2001:db8::1", 9)),
            E::BadAddress("IPv4-mapped IPv6 address (must be written as IPv4)"),
        ),
        (
            "two families",
            open_with(&V4, &v6("2001:db8::1", 9)),
            E::BadAddress("destination and source are of different IP versions"),
        ),
        (
            "OPEN without source",
            raw(2, &[field(1, &ID), field(2, &V4)].concat()),
            E::MissingField(3),
        ),
    ];
    for (name, bytes, error) in table {
        assert_eq!(decode(&bytes), Err(error), "{name}");
    }
}

#[test]
fn repeated_messages_are_dropped_and_gaps_are_refused() {
    let message = Message::End {
        stream: StreamId(ID),
    };
    let mut sender = Sender::default();
    let mut receiver = Receiver::default();
    let first = sender.encode(&message).unwrap();
    assert_eq!(receiver.accept(first.as_bytes()), Ok(Some(message)));
    assert_eq!(receiver.accept(first.as_bytes()), Ok(None));
    let _lost = sender.encode(&message).unwrap();
    let third = sender.encode(&message).unwrap();
    assert_eq!(
        receiver.accept(third.as_bytes()),
        Err(ProtocolError::CounterGap {
            expected: 1,
            got: 2
        })
    );
    // A restarted receiver that knows where it was goes on.
    let mut restarted = Receiver::resume(2);
    assert_eq!(restarted.accept(third.as_bytes()), Ok(Some(message)));
    assert_eq!(restarted.next(), 3);
}

#[test]
fn endless_repetition_is_refused() {
    let bytes = encode(&Message::Ready, 0);
    let mut receiver = Receiver::default();
    receiver.accept(bytes.as_bytes()).unwrap();
    for _ in 0..MAX_DUPLICATES {
        assert_eq!(receiver.accept(bytes.as_bytes()), Ok(None));
    }
    assert_eq!(
        receiver.accept(bytes.as_bytes()),
        Err(ProtocolError::TooManyDuplicates)
    );
}

#[test]
fn a_used_up_counter_is_an_error() {
    assert_eq!(
        Sender::resume(u64::MAX)
            .encode(&Message::Ready)
            .unwrap_err(),
        ProtocolError::CounterExhausted
    );
    let last = encode(&Message::Ready, u64::MAX);
    assert_eq!(
        Receiver::resume(u64::MAX).accept(last.as_bytes()),
        Err(ProtocolError::CounterExhausted)
    );
}

/// The vectors of `docs/protocol.md`.
#[test]
fn the_documented_vectors_hold() {
    let text = include_str!("../../../docs/protocol.md");
    let vectors: Vec<Vec<u8>> = text
        .split("```hex\n")
        .skip(1)
        .map(|block| {
            let digits: String = block
                .split("```")
                .next()
                .unwrap()
                .chars()
                .filter(char::is_ascii_hexdigit)
                .collect();
            (0..digits.len())
                .step_by(2)
                .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
                .collect()
        })
        .collect();
    let stream = StreamId::from_bytes(std::array::from_fn(|i| i as u8));
    let expected = [
        (Message::Ready, 0),
        (
            Message::Open(Open {
                stream,
                destination: "10.1.2.3:8080".parse().unwrap(),
                source: "10.9.8.7:40000".parse().unwrap(),
                flags: 0,
            }),
            0,
        ),
        (Message::Opened { stream }, 1),
        (Message::End { stream }, 1),
        (
            Message::Open(Open {
                stream,
                destination: "[2001:db8::2]:443".parse().unwrap(),
                source: "[2001:db8::1]:50000".parse().unwrap(),
                flags: 0,
            }),
            2,
        ),
        (
            Message::Refused {
                stream,
                reason: RefuseReason::PolicyDenied,
            },
            3,
        ),
        (
            Message::Reset {
                stream,
                reason: ResetReason::AppReset,
            },
            3,
        ),
    ];
    assert_eq!(vectors.len(), expected.len(), "vectors in docs/protocol.md");
    for (bytes, (message, counter)) in vectors.iter().zip(expected) {
        assert_eq!(
            encode(&message, counter).as_bytes(),
            &bytes[..],
            "{message:?}"
        );
        assert_eq!(decode(bytes), Ok((message, counter)));
    }
}
