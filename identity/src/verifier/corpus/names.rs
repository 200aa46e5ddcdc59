//! Who a certificate says it is for.

use super::{ACCEPTED, Corpus};
use crate::testing::{LeafParams, tlv};

pub(super) fn add(corpus: &mut Corpus) {
    by_uri(corpus);
    by_encoding(corpus);
}

fn by_uri(corpus: &mut Corpus) {
    let me = "spiffe://td/ns/shop/sa/cart";
    let longest = format!("spiffe://td/{}", "a".repeat(2036));
    let too_long = format!("{longest}a");
    let long_domain = format!("spiffe://{}/a", "d".repeat(256));
    let invalid = "invalid-spiffe-id";
    for (verdict, name, uris) in [
        (ACCEPTED, "plain", vec![me]),
        (
            ACCEPTED,
            "upper case in the path",
            vec!["spiffe://td/Ns/A.b_c-d"],
        ),
        (ACCEPTED, "2048 bytes", vec![longest.as_str()]),
        ("no-uri-san", "no SAN", vec![]),
        (
            "several-uri-sans",
            "two SPIFFE IDs",
            vec![me, "spiffe://td/ns/shop/sa/admin"],
        ),
        ("several-uri-sans", "the same SPIFFE ID twice", vec![me, me]),
        (
            "several-uri-sans",
            "a web address besides",
            vec![me, "https://td/"],
        ),
        (
            "several-uri-sans",
            "a web address first",
            vec!["https://td/", me],
        ),
        (invalid, "a web address", vec!["https://td/ns/shop/sa/cart"]),
        (
            invalid,
            "upper-case scheme",
            vec!["SPIFFE://td/ns/shop/sa/cart"],
        ),
        (
            invalid,
            "upper-case trust domain",
            vec!["spiffe://TD/ns/shop/sa/cart"],
        ),
        (invalid, "no path", vec!["spiffe://td"]),
        (invalid, "root path", vec!["spiffe://td/"]),
        (
            invalid,
            "trailing slash",
            vec!["spiffe://td/ns/shop/sa/cart/"],
        ),
        (
            invalid,
            "empty segment",
            vec!["spiffe://td/ns//shop/sa/cart"],
        ),
        (invalid, "dot segment", vec!["spiffe://td/ns/./sa/cart"]),
        (
            invalid,
            "dot dot segment",
            vec!["spiffe://td/ns/shop/sa/../admin"],
        ),
        (
            invalid,
            "userinfo",
            vec!["spiffe://user@td/ns/shop/sa/cart"],
        ),
        (invalid, "port", vec!["spiffe://td:443/ns/shop/sa/cart"]),
        (invalid, "query", vec!["spiffe://td/ns/shop/sa/cart?a=b"]),
        (invalid, "fragment", vec!["spiffe://td/ns/shop/sa/cart#a"]),
        (
            invalid,
            "percent encoding",
            vec!["spiffe://td/ns/shop/sa/c%61rt"],
        ),
        (invalid, "2049 bytes", vec![too_long.as_str()]),
        (
            invalid,
            "trust domain of 256 bytes",
            vec![long_domain.as_str()],
        ),
        (invalid, "empty URI", vec![""]),
        (
            invalid,
            "NUL in the URI",
            vec!["spiffe://td/ns/shop/sa/cart\0.evil"],
        ),
        (
            invalid,
            "NUL behind the URI",
            vec!["spiffe://td/ns/shop/sa/cart\0"],
        ),
        (
            invalid,
            "space before the URI",
            vec![" spiffe://td/ns/shop/sa/cart"],
        ),
        (
            invalid,
            "line break in the URI",
            vec!["spiffe://td/ns/shop/sa/cart\n"],
        ),
        (invalid, "backslash", vec!["spiffe://td\\ns/shop"]),
        (invalid, "no authority", vec!["spiffe:/td/ns/shop/sa/cart"]),
        (
            invalid,
            "empty trust domain",
            vec!["spiffe:///ns/shop/sa/cart"],
        ),
        (
            "unknown-trust-domain",
            "another trust domain",
            vec!["spiffe://other/ns/shop/sa/cart"],
        ),
        (
            "unknown-trust-domain",
            "ours is a prefix",
            vec!["spiffe://td.evil/ns/shop/sa/cart"],
        ),
        (
            "unknown-trust-domain",
            "trailing dot",
            vec!["spiffe://td./ns/shop/sa/cart"],
        ),
    ] {
        corpus.leaf(verdict, name, |leaf| {
            leaf.uri_sans = uris.into_iter().map(str::to_owned).collect();
        });
    }
}

/// SANs whose bytes are not what a decent CA writes.
fn by_encoding(corpus: &mut Corpus) {
    const URI: u8 = 0x86;
    let me = b"spiffe://td/ns/shop/sa/cart".as_slice();
    let utf16: Vec<u8> = me.iter().flat_map(|&byte| [0, byte]).collect();
    let uri = tlv(URI, me);
    let san = |names: &[&[u8]]| tlv(0x30, &names.concat());
    let alone = san(&[&uri]);
    // UTF8String inside an otherName of type id-on-dnsSRV.
    let oid = tlv(0x06, &[0x2b, 6, 1, 5, 5, 7, 8, 7]);
    let other_name = tlv(0xa0, &[oid, tlv(0xa0, &tlv(0x0c, me))].concat());
    let dns = tlv(0x82, b"cart.shop.svc");
    let cases: Vec<(&'static str, &str, Vec<u8>)> = vec![
        (ACCEPTED, "SAN written by hand", alone.clone()),
        (ACCEPTED, "DNS name besides", san(&[&dns, &uri])),
        (
            ACCEPTED,
            "IPv4 address besides",
            san(&[&uri, &tlv(0x87, &[127, 0, 0, 1])]),
        ),
        (
            ACCEPTED,
            "mail address besides",
            san(&[&uri, &tlv(0x81, b"a@example.org")]),
        ),
        (ACCEPTED, "otherName besides", san(&[&uri, &other_name])),
        ("no-uri-san", "DNS name only", san(&[&dns])),
        (
            "no-uri-san",
            "SPIFFE ID as a DNS name",
            san(&[&tlv(0x82, me)]),
        ),
        (
            "no-uri-san",
            "SPIFFE ID as a mail address",
            san(&[&tlv(0x81, me)]),
        ),
        (
            "no-uri-san",
            "SPIFFE ID in an otherName",
            san(&[&other_name]),
        ),
        ("no-uri-san", "no name at all", san(&[])),
        (
            "invalid-spiffe-id",
            "UTF-16, as in a BMPString",
            san(&[&tlv(URI, &utf16)]),
        ),
        (
            "invalid-spiffe-id",
            "UTF-8 beyond ASCII",
            san(&[&tlv(URI, "spiffe://td/\u{e9}".as_bytes())]),
        ),
        (
            "malformed",
            "Latin-1",
            san(&[&tlv(URI, b"spiffe://td/\xe9")]),
        ),
        (
            "malformed",
            "bytes behind the names",
            [alone.as_slice(), &[0]].concat(),
        ),
        ("malformed", "not a sequence", uri.clone()),
        (
            "malformed",
            "names cut short",
            alone[..alone.len() - 1].to_vec(),
        ),
        (
            "malformed",
            "length beyond the end",
            vec![0x30, 0x7f, URI, 1, b'a'],
        ),
        (
            "malformed",
            "unknown kind of name",
            san(&[&uri, &tlv(0x89, b"x")]),
        ),
        (
            "invalid-spiffe-id",
            "constructed URI",
            san(&[&tlv(0xa6, &tlv(0x16, me))]),
        ),
        ("malformed", "empty extension", Vec::new()),
    ];
    for (verdict, name, content) in cases {
        corpus.leaf(verdict, name, |leaf| raw_san(leaf, content, false));
    }
    corpus.leaf(ACCEPTED, "critical SAN", |leaf| {
        raw_san(leaf, alone.clone(), true)
    });
    corpus.leaf("malformed", "two SAN extensions", |leaf| {
        raw_san(leaf, alone.clone(), false);
        leaf.extensions.push((SAN.to_vec(), alone.clone(), false));
    });
    corpus.leaf("malformed", "two SAN extensions of different IDs", |leaf| {
        leaf.extensions.push((SAN.to_vec(), alone, false));
    });
}

fn raw_san(leaf: &mut LeafParams, content: Vec<u8>, critical: bool) {
    leaf.uri_sans.clear();
    leaf.extensions.push((SAN.to_vec(), content, critical));
}

const SAN: [u64; 4] = [2, 5, 29, 17];
