//! What can be wrong with a control message.

use super::{MAX_DUPLICATES, MAX_MESSAGE};

/// What is wrong with a control message. Always the peer's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error("control message of {len} bytes is shorter than its header")]
    Truncated { len: usize },
    #[error("control message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("control message of unknown type {0:#04x}")]
    UnknownType(u8),
    #[error("{0} is reserved for a later version")]
    Reserved(&'static str),
    #[error("header byte 1 is {0:#04x}, must be zero")]
    HeaderNotZero(u8),
    #[error("header announces {announced} body bytes, the record holds {actual}")]
    LengthMismatch { announced: usize, actual: usize },
    #[error("a field runs past the end of the message")]
    FieldOverrun,
    #[error("field {0:#06x} is repeated or out of order")]
    FieldOrder(u16),
    #[error("field {0:#06x} is critical and unknown here")]
    UnknownField(u16),
    #[error("field {field:#06x} has {len} bytes")]
    FieldLength { field: u16, len: usize },
    #[error("field {0:#06x} is missing")]
    MissingField(u16),
    #[error("an address is unusable: {0}")]
    BadAddress(&'static str),
    #[error("counter is {got}, expected {expected}: a message is missing")]
    CounterGap { expected: u64, got: u64 },
    #[error("more than {MAX_DUPLICATES} repeated messages")]
    TooManyDuplicates,
    #[error("{got} is not allowed here (expected {expected})")]
    Unexpected {
        got: &'static str,
        expected: &'static str,
    },
    #[error("message names another stream")]
    WrongStream,
    #[error("application data outside a stream")]
    DataOutsideStream,
    #[error("the direction counter is used up")]
    CounterExhausted,
}

impl ProtocolError {
    /// Stable name for metrics.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Truncated { .. } => "truncated-message",
            Self::TooLong => "message-too-long",
            Self::UnknownType(_) => "unknown-message",
            Self::Reserved(_) => "reserved-message",
            Self::HeaderNotZero(_) => "bad-header",
            Self::LengthMismatch { .. } => "length-mismatch",
            Self::FieldOverrun => "field-overrun",
            Self::FieldOrder(_) => "field-order",
            Self::UnknownField(_) => "unknown-field",
            Self::FieldLength { .. } => "field-length",
            Self::MissingField(_) => "missing-field",
            Self::BadAddress(_) => "bad-address",
            Self::CounterGap { .. } => "counter-gap",
            Self::TooManyDuplicates => "too-many-duplicates",
            Self::Unexpected { .. } => "unexpected-message",
            Self::WrongStream => "wrong-stream",
            Self::DataOutsideStream => "data-outside-stream",
            Self::CounterExhausted => "counter-exhausted",
        }
    }
}
