//! IP prefixes that keep the two families apart.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use ringfence_bpf_common::Addr;
use serde::Serialize;

use crate::ValueError;

/// An IP prefix. Bits behind the prefix length are dropped (`10.1.2.3/8` is
/// `10.0.0.0/8`), as everybody does.
///
/// An IPv4 prefix contains IPv4 addresses only and an IPv6 prefix IPv6 addresses only:
/// `::/0` does not contain `10.0.0.1`, however that address is written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize)]
#[serde(into = "String")]
pub struct Cidr {
    family: Family,
    /// The network; IPv4 as the IPv4-mapped address.
    bits: u128,
    /// Counts from the first bit of `bits`: IPv4 prefixes have 96 more than written.
    length: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Family {
    V4,
    V6,
}

impl Cidr {
    /// `length` in bits: 0 to 32 for IPv4, 0 to 128 for IPv6. An IPv4-mapped IPv6
    /// prefix is an error: nothing would ever match it.
    pub fn new(address: IpAddr, length: u32) -> Result<Self, ValueError> {
        let (family, bits, max, extra) = match address {
            IpAddr::V4(v4) => (Family::V4, v4.to_ipv6_mapped().to_bits(), 32, 96),
            IpAddr::V6(v6) => (Family::V6, v6.to_bits(), 128, 0),
        };
        let length = u8::try_from(length)
            .ok()
            .filter(|length| *length <= max)
            .ok_or(ValueError::PrefixLength { length, max })?;
        let bits = bits & network_mask(length + extra);
        if family == Family::V6 && length >= 96 && bits & network_mask(96) == MAPPED {
            return Err(ValueError::MappedPrefix(format!("{address}/{length}")));
        }
        Ok(Cidr {
            family,
            bits,
            length: length + extra,
        })
    }

    /// From the wire: 4 or 16 bytes in network byte order, and the length in bits.
    pub fn from_bytes(address: &[u8], length: u32) -> Result<Self, ValueError> {
        let address = if let Ok(v4) = <[u8; 4]>::try_from(address) {
            IpAddr::from(v4)
        } else if let Ok(v6) = <[u8; 16]>::try_from(address) {
            IpAddr::from(v6)
        } else {
            return Err(ValueError::AddressBytes(address.len()));
        };
        Cidr::new(address, length)
    }

    /// The prefix's first address.
    pub fn address(&self) -> IpAddr {
        let address = Ipv6Addr::from_bits(self.bits);
        match self.family {
            Family::V4 => address.to_canonical(),
            Family::V6 => address.into(),
        }
    }

    /// How many bits of [`Cidr::address`] count: at most 32 for IPv4, 128 for IPv6.
    pub fn prefix_length(&self) -> u8 {
        match self.family {
            Family::V4 => self.length - 96,
            Family::V6 => self.length,
        }
    }

    /// Whether `address` lies in the prefix. An IPv4-mapped address counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (family, bits) = match address.to_canonical() {
            IpAddr::V4(v4) => (Family::V4, v4.to_ipv6_mapped().to_bits()),
            IpAddr::V6(v6) => (Family::V6, v6.to_bits()),
        };
        self.family == family && bits & network_mask(self.length) == self.bits
    }

    /// Whether every address of `other` lies in this prefix.
    pub fn covers(&self, other: &Cidr) -> bool {
        self.family == other.family
            && self.length <= other.length
            && other.bits & network_mask(self.length) == self.bits
    }

    /// The first address, IPv4 as the IPv4-mapped one, and how many bits of that count (0
    /// to 128; IPv4 prefixes 96 to 128).
    pub(crate) fn mapped(&self) -> (Addr, u8) {
        (Addr(self.bits.to_be_bytes()), self.length)
    }
}

impl FromStr for Cidr {
    type Err = ValueError;

    /// `10.0.0.0/8`, `fd00::/8`, or an address alone for a single host.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let wrong = || ValueError::NotAPrefix(text.to_owned());
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let length = match length {
            // `u32::from_str` would take "+8" too.
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                digits.parse().map_err(|_| wrong())?
            }
            Some(_) => return Err(wrong()),
            None if address.is_ipv4() => 32,
            None => 128,
        };
        Cidr::new(address, length)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address(), self.prefix_length())
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> String {
        cidr.to_string()
    }
}

/// `::ffff:0:0`, the network of the IPv4-mapped addresses (RFC 4291 §2.5.5.2).
const MAPPED: u128 = 0xffff_0000_0000;

fn network_mask(length: u8) -> u128 {
    u128::MAX
        .checked_shl(128 - u32::from(length.min(128)))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn prefix_contains_its_addresses_and_no_others() {
        for (prefix, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("10.1.2.3/8", "10.0.0.1", "9.255.255.255"),
            ("10.1.2.3", "10.1.2.3", "10.1.2.2"),
            ("10.1.2.2/31", "10.1.2.3", "10.1.2.4"),
            ("0.0.0.0/0", "255.255.255.255", "::1"),
            ("::/0", "fd00::1", "10.0.0.1"),
            ("fd00::/8", "fdff::1", "fe00::"),
            ("fd00::1", "fd00::1", "fd00::2"),
        ] {
            assert!(cidr(prefix).contains(ip(inside)), "{prefix} {inside}");
            assert!(!cidr(prefix).contains(ip(outside)), "{prefix} {outside}");
        }
    }

    #[test]
    fn mapped_address_is_judged_as_ipv4() {
        assert!(cidr("10.0.0.0/8").contains(ip("::ffff:10.0.0.1")));
        assert!(!cidr("::/0").contains(ip("::ffff:10.0.0.1")));
        assert!(!cidr("10.0.0.0/8").contains(ip("::10.0.0.1")));
    }

    #[test]
    fn prefix_that_does_not_parse_is_an_error() {
        for text in [
            "",
            "10.0.0.0/",
            "10.0.0/8",
            "10.0.0.0/33",
            "::/129",
            "10.0.0.0/+8",
            "10.0.0.0/-1",
            "10.0.0.0/8/8",
            "fd00::/4294967304",
            "010.0.0.0/8",
            "host",
            "*",
            " 10.0.0.0/8",
            "10.0.0.0/99999999999999999999",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }

    #[test]
    fn mapped_prefix_is_refused_and_a_shorter_one_is_not() {
        assert!(matches!(
            "::ffff:10.0.0.0/104".parse::<Cidr>(),
            Err(ValueError::MappedPrefix(_))
        ));
        assert!(matches!(
            "::ffff:0:0/96".parse::<Cidr>(),
            Err(ValueError::MappedPrefix(_))
        ));
    }

    #[test]
    fn wire_form_is_checked() {
        assert_eq!(
            Cidr::from_bytes(&[10, 0, 0, 0], 8).unwrap(),
            cidr("10.0.0.0/8")
        );
        assert_eq!(Cidr::from_bytes(&[0; 16], 0).unwrap(), cidr("::/0"));
        assert_eq!(Cidr::from_bytes(&[], 0), Err(ValueError::AddressBytes(0)));
        assert_eq!(
            Cidr::from_bytes(&[10, 0, 0], 8),
            Err(ValueError::AddressBytes(3))
        );
        // 264 is 8 in eight bits.
        assert!(Cidr::from_bytes(&[10, 0, 0, 0], 264).is_err());
        assert!(Cidr::from_bytes(&[10, 0, 0, 0], 33).is_err());
    }

    #[test]
    fn covering_needs_family_length_and_bits() {
        assert!(cidr("10.0.0.0/8").covers(&cidr("10.1.0.0/16")));
        assert!(cidr("10.0.0.0/8").covers(&cidr("10.0.0.0/8")));
        assert!(!cidr("10.1.0.0/16").covers(&cidr("10.0.0.0/8")));
        assert!(!cidr("11.0.0.0/8").covers(&cidr("10.1.0.0/16")));
        assert!(!cidr("::/0").covers(&cidr("10.1.0.0/16")));
    }

    #[test]
    fn shows_itself_as_written() {
        for text in [
            "10.0.0.0/8",
            "0.0.0.0/0",
            "10.1.2.3/32",
            "::/0",
            "fd00::/8",
            "::1/128",
        ] {
            assert_eq!(cidr(text).to_string(), text);
        }
    }
}
