//! Single values: what they may look like.

use std::net::IpAddr;
use std::time::Duration;

use super::{Cidr, ServerName, TextMatch};

/// A DNS-style name as Kubernetes uses for objects: it also fits in a SPIFFE ID path.
pub(super) fn object_name(text: &str) -> Result<(), String> {
    let ok = (1..=253).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric());
    if ok {
        Ok(())
    } else {
        Err(format!(
            "`{text}` is not a name: expected lower-case letters, digits, `-` and `.`, at most 253"
        ))
    }
}

/// SPIFFE ID specification, section 2.1.
pub(super) fn trust_domain(text: &str) -> Result<(), String> {
    let ok = (1..=255).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b));
    if ok {
        Ok(())
    } else {
        Err(format!(
            "`{text}` is not a trust domain: expected lower-case letters, digits, `.`, `-` and `_`"
        ))
    }
}

/// An address that one host can have.
pub(super) fn host_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text
        .parse()
        .map_err(|_| format!("`{text}` is not an IP address: expected like 10.0.0.1 or fd00::1"))?;
    let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    if mapped {
        return Err(format!(
            "`{text}` is an IPv4-mapped address: write it as {}",
            address.to_canonical()
        ));
    }
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() || broadcast {
        return Err(format!(
            "`{text}` is not the address of one host: expected a unicast address"
        ));
    }
    Ok(address)
}

pub(super) fn server_name(text: &str) -> Result<ServerName, String> {
    if let Ok(address) = text.parse() {
        return Ok(ServerName::Ip(address));
    }
    object_name(text).map_err(|_| format!("`{text}` is neither a DNS name nor an IP address"))?;
    Ok(ServerName::Dns(text.to_owned()))
}

pub(super) fn port(number: i64) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("{number} is not a port: expected 1 to 65535")),
    }
}

/// Like `24h`, `90m`, `1h30m`, `3600s`; units d, h, m, s.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("`{text}` is not a duration: expected like 24h, 90m or 1h30m, from 1s to 365d");
    let mut seconds = 0u64;
    let mut digits = String::new();
    for c in text.chars() {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        let unit = match c {
            'd' => 86_400,
            'h' => 3_600,
            'm' => 60,
            's' => 1,
            _ => return Err(wrong()),
        };
        let number: u64 = std::mem::take(&mut digits).parse().map_err(|_| wrong())?;
        seconds = number
            .checked_mul(unit)
            .and_then(|part| seconds.checked_add(part))
            .ok_or_else(wrong)?;
    }
    if !digits.is_empty() || !(1..=365 * 86_400).contains(&seconds) {
        return Err(wrong());
    }
    Ok(Duration::from_secs(seconds))
}

/// A block, or a single address. The flag says that bits beyond the prefix were
/// set and have been cleared.
pub(super) fn cidr(text: &str) -> Result<(Cidr, bool), String> {
    let wrong = || {
        format!("`{text}` is not an IP block: expected like 10.0.0.0/8, fd00::/16 or one address")
    };
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    if matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
        return Err(format!(
            "`{text}` is an IPv4-mapped block: write it as IPv4"
        ));
    }
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let length: u8 = match length {
        None => bits,
        // `u8::from_str` would take a sign.
        Some(length) if length.bytes().all(|b| b.is_ascii_digit()) => {
            length.parse().map_err(|_| wrong())?
        }
        Some(_) => return Err(wrong()),
    };
    if length > bits {
        return Err(wrong());
    }
    let masked = match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            IpAddr::from((v4.to_bits() & mask).to_be_bytes())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            IpAddr::from((v6.to_bits() & mask).to_be_bytes())
        }
    };
    Ok((
        Cidr {
            address: masked,
            length,
        },
        masked != address,
    ))
}

/// Exact, `prefix*`, `*suffix` or `*`.
pub(super) fn text_match(text: &str) -> Result<TextMatch, String> {
    let inner = |rest: &str| {
        if rest.contains('*') {
            Err(format!(
                "`{text}` has `*` inside: expected it at the start or at the end only"
            ))
        } else {
            Ok(rest.to_owned())
        }
    };
    if text.is_empty() {
        Err("is empty: expected a name, `prefix*`, `*suffix` or `*`".to_owned())
    } else if text == "*" {
        Ok(TextMatch::Presence)
    } else if let Some(suffix) = text.strip_prefix('*') {
        inner(suffix).map(TextMatch::Suffix)
    } else if let Some(prefix) = text.strip_suffix('*') {
        inner(prefix).map(TextMatch::Prefix)
    } else {
        inner(text).map(TextMatch::Exact)
    }
}

/// Principals are written without the scheme.
pub(super) fn principal(text: &str) -> Result<TextMatch, String> {
    if let Some(bare) = text.strip_prefix("spiffe://") {
        return Err(format!(
            "`{text}` would never match: write principals without the scheme, as `{bare}`"
        ));
    }
    text_match(text)
}
