//! TLS 1.3 record protection in software (RFC 8446 §5.2, §5.3): pure, in place.

use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use rustls::ConnectionTrafficSecrets;

use super::{MAX_PLAINTEXT, MAX_RECORDS, TYPE_DATA};
use crate::error::TunnelError;
use crate::sys::Wiped;

/// Length of the outer record header.
pub(crate) const HEADER: usize = 5;
/// Length of the authentication tag; the same for all three suites.
pub(crate) const TAG: usize = 16;
/// Bytes a record adds to its plaintext: header, inner content type, tag.
pub(crate) const OVERHEAD: usize = HEADER + 1 + TAG;
/// Longest record on the wire.
pub(crate) const MAX_RECORD: usize = MAX_PLAINTEXT + OVERHEAD;

/// Records left for closing a tunnel whose data has reached the limit.
const CLOSING_RECORDS: u64 = 1024;

/// The secrets are of a suite the software layer does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UnsupportedSuite;

/// Key, nonce base and sequence number of one direction.
#[derive(Debug)]
pub(crate) struct RecordKey {
    key: Wiped<LessSafeKey>,
    iv: Wiped<[u8; 12]>,
    sequence: u64,
}

impl RecordKey {
    pub(crate) fn new(
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, UnsupportedSuite> {
        // The key bytes inside `secrets` are zeroized by rustls when it is dropped here.
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(UnsupportedSuite),
        };
        let iv: [u8; 12] = iv.as_ref().try_into().map_err(|_| UnsupportedSuite)?;
        Self::from_parts(algorithm, key.as_ref(), iv, sequence)
    }

    fn from_parts(
        algorithm: &'static Algorithm,
        key: &[u8],
        iv: [u8; 12],
        sequence: u64,
    ) -> Result<Self, UnsupportedSuite> {
        let key = UnboundKey::new(algorithm, key).map_err(|_| UnsupportedSuite)?;
        Ok(Self {
            key: Wiped::new(LessSafeKey::new(key)),
            iv: Wiped::new(iv),
            sequence,
        })
    }

    /// Number of the next record.
    pub(crate) const fn sequence(&self) -> u64 {
        self.sequence
    }

    fn nonce(&self) -> Nonce {
        let mut nonce = *self.iv.get();
        for (n, s) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *n ^= s;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Seals the `len` plaintext bytes at `slot[HEADER..]` in place. `slot` must have
    /// [`OVERHEAD`] bytes more than the plaintext. Returns the record's length.
    ///
    /// Stops for good a little behind [`MAX_RECORDS`], which the callers that send data
    /// respect: what is left is for `RESET` and close_notify.
    pub(crate) fn seal(
        &mut self,
        record_type: u8,
        slot: &mut [u8],
        len: usize,
    ) -> Result<usize, TunnelError> {
        if self.sequence >= MAX_RECORDS + CLOSING_RECORDS {
            return Err(TunnelError::RecordLimit);
        }
        debug_assert!(len <= MAX_PLAINTEXT);
        let total = len + OVERHEAD;
        let header = header((len + 1 + TAG) as u16);
        let Some((head, body)) = slot
            .get_mut(..total)
            .and_then(|s| s.split_first_chunk_mut::<HEADER>())
        else {
            return Err(TunnelError::OversizedRecord);
        };
        *head = header;
        let (inner, tag_room) = body.split_at_mut(len + 1);
        if let Some(last) = inner.last_mut() {
            *last = record_type;
        }
        let tag = self
            .key
            .get()
            .seal_in_place_separate_tag(self.nonce(), Aad::from(header), inner)
            // ring refuses only inputs longer than the algorithm's limit (2^36 bytes).
            .map_err(|_| TunnelError::RecordLimit)?;
        tag_room.copy_from_slice(tag.as_ref());
        self.sequence += 1;
        Ok(total)
    }

    /// Opens `record` (header and body) in place. Returns the inner content type and the
    /// length of the plaintext, which starts at `record[HEADER]`.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<(u8, usize), TunnelError> {
        let nonce = self.nonce();
        let Some((header, body)) = record.split_first_chunk_mut::<HEADER>() else {
            return Err(TunnelError::BadRecord);
        };
        let inner = self
            .key
            .get()
            .open_in_place(nonce, Aad::from(*header), body)
            .map_err(|_| TunnelError::BadRecord)?;
        self.sequence = self
            .sequence
            .checked_add(1)
            .ok_or(TunnelError::RecordLimit)?;
        // TLSInnerPlaintext is at most 2^14 + 1 bytes, padding included.
        if inner.len() > MAX_PLAINTEXT + 1 {
            return Err(TunnelError::OversizedRecord);
        }
        // The content type is the last byte that is not padding; a record of nothing but
        // padding is malformed (RFC 8446 §5.4).
        let at = inner
            .iter()
            .rposition(|b| *b != 0)
            .ok_or(TunnelError::BadRecord)?;
        let record_type = inner.get(at).copied().ok_or(TunnelError::BadRecord)?;
        Ok((record_type, at))
    }
}

/// Looks at the header at the front of `bytes`: the whole record's length, or `None` if
/// the header is not complete yet.
pub(crate) fn record_len(bytes: &[u8]) -> Result<Option<usize>, TunnelError> {
    let Some(&[outer, major, minor, hi, lo]) = bytes.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    // After the handshake every record is outwardly application data of version 3.3. The
    // kernel insists on the same.
    if outer != TYPE_DATA || (major, minor) != (3, 3) {
        return Err(TunnelError::BadRecord);
    }
    let body = usize::from(u16::from_be_bytes([hi, lo]));
    if body > MAX_PLAINTEXT + 1 + TAG {
        return Err(TunnelError::OversizedRecord);
    }
    if body < 1 + TAG {
        return Err(TunnelError::BadRecord);
    }
    Ok(Some(HEADER + body))
}

const fn header(body: u16) -> [u8; HEADER] {
    let [hi, lo] = body.to_be_bytes();
    [TYPE_DATA, 3, 3, hi, lo]
}

#[cfg(test)]
mod tests;
