//! The counter of each direction: repeated messages are dropped, gaps refused.

use super::{Encoded, Message, ProtocolError, decode, encode};

/// Duplicates a receiver drops before it calls the sender abusive. A sender
/// resends at most the last message of each direction after each restart.
pub const MAX_DUPLICATES: u32 = 1024;

/// The sending side's counter of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sender {
    next: u64,
}

impl Sender {
    /// Rebuilds the counter: `next` is the number the next new message gets.
    pub const fn resume(next: u64) -> Self {
        Self { next }
    }

    pub const fn next(&self) -> u64 {
        self.next
    }

    /// Encodes the next message of the direction.
    pub fn encode(&mut self, message: &Message) -> Result<Encoded, ProtocolError> {
        let counter = self.next;
        self.next = counter
            .checked_add(1)
            .ok_or(ProtocolError::CounterExhausted)?;
        Ok(encode(message, counter))
    }
}

/// The receiving side's counter of one direction: drops what was seen, refuses gaps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Receiver {
    next: u64,
    duplicates: u32,
}

impl Receiver {
    /// Rebuilds the counter: `next` is the number the next new message must have.
    pub const fn resume(next: u64) -> Self {
        Self {
            next,
            duplicates: 0,
        }
    }

    pub const fn next(&self) -> u64 {
        self.next
    }

    /// Decodes one control record. `None`: a repetition of a message already taken.
    pub fn accept(&mut self, record: &[u8]) -> Result<Option<Message>, ProtocolError> {
        let (message, counter) = decode(record)?;
        if counter < self.next {
            self.duplicates += 1;
            if self.duplicates > MAX_DUPLICATES {
                return Err(ProtocolError::TooManyDuplicates);
            }
            return Ok(None);
        }
        if counter > self.next {
            return Err(ProtocolError::CounterGap {
                expected: self.next,
                got: counter,
            });
        }
        self.next = counter
            .checked_add(1)
            .ok_or(ProtocolError::CounterExhausted)?;
        Ok(Some(message))
    }
}
