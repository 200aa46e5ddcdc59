//! What the program `ringfence_judge` reads and writes: questions to the policy maps, for
//! tests, measurements and explanations. It is never attached.

use crate::{Addr, Query, Reason, Verdict};

/// One question and its answer, in the packet of a run.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Question {
    pub set: u32,
    pub identity: u32,
    pub source: Addr,
    pub port: u16,
    /// 1 for the pod's IPv4 address, 0 for its IPv6 address.
    pub destination_v4: u16,
    /// The answer: a [`Reason`] as a number.
    pub reason: u16,
    /// The answer: the term that decided, or `u16::MAX`.
    pub term: u16,
}

/// Bytes in front of the first question: a packet has an Ethernet header (14 bytes), which
/// the kernel reads.
pub const JUDGE_HEADER: usize = 16;
/// Questions of one run: the kernel takes somewhat less than a page.
pub const JUDGE_BATCH: usize = 64;

impl Question {
    /// A question without an answer yet: no [`Reason`] has this number.
    pub fn new(query: &Query) -> Self {
        Question {
            set: query.set,
            identity: query.identity,
            source: query.source,
            port: query.port,
            destination_v4: query.destination_v4.into(),
            reason: u16::MAX,
            term: Verdict::NO_TERM,
        }
    }

    /// The question as it stands in a packet.
    pub const fn to_bytes(self) -> [u8; size_of::<Question>()] {
        // SAFETY: the same size, and there is no padding (asserted below).
        unsafe { core::mem::transmute::<Question, [u8; size_of::<Question>()]>(self) }
    }

    /// The question of a packet.
    pub const fn from_bytes(bytes: [u8; size_of::<Question>()]) -> Self {
        // SAFETY: the same size, and any bytes are a question.
        unsafe { core::mem::transmute::<[u8; size_of::<Question>()], Question>(bytes) }
    }

    /// What is asked.
    #[inline(always)]
    pub fn query(&self) -> Query {
        Query {
            set: self.set,
            identity: self.identity,
            source: self.source,
            port: self.port,
            destination_v4: self.destination_v4 != 0,
        }
    }

    /// The answer, once there is one.
    pub fn verdict(&self) -> Option<Verdict> {
        Some(Verdict {
            reason: Reason::from_number(self.reason)?,
            term: self.term,
        })
    }
}

const _: () = {
    assert!(size_of::<Question>() == 32);
    assert!(JUDGE_HEADER + JUDGE_BATCH * size_of::<Question>() <= 3072);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn question_keeps_the_query_and_has_no_answer_yet() {
        let query = Query {
            set: 7,
            identity: 8,
            source: Addr::v4([10, 0, 0, 1]),
            port: 65_535,
            destination_v4: true,
        };
        let mut question = Question::new(&query);
        let back = question.query();
        assert_eq!((back.set, back.identity, back.port), (7, 8, 65_535));
        assert!(back.source == query.source && back.destination_v4);
        assert_eq!(question.verdict(), None);
        question.reason = Reason::Denied as u16;
        question.term = 3;
        question = Question::from_bytes(question.to_bytes());
        let verdict = question.verdict().map(|v| (v.reason, v.term));
        assert_eq!(verdict, Some((Reason::Denied, 3)));
    }
}
