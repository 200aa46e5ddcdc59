//! The decision alone, for tests, measurements and explanations: answers the questions in
//! a packet. Run by `BPF_PROG_RUN`, never attached.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext, bindings::__sk_buff, helpers::generated::bpf_loop, macros::classifier,
    programs::TcContext,
};
use ringfence_bpf_common::{JUDGE_BATCH, JUDGE_HEADER, Question};

use crate::authorize::judge;

const _: () = assert!(JUDGE_BATCH.is_power_of_two());

/// Returns how many questions were answered.
#[classifier]
#[inline(always)]
pub fn ringfence_judge(ctx: TcContext) -> i32 {
    let mut packet = Packet {
        skb: ctx.as_ptr().cast(),
        answered: 0,
    };
    // SAFETY: `answer` has the signature that the helper wants, and `packet` outlives it.
    // A loop of ours would multiply what the verifier walks.
    unsafe {
        bpf_loop(
            JUDGE_BATCH as u32,
            answer as *mut c_void,
            (&raw mut packet).cast(),
            0,
        );
    }
    packet.answered
}

struct Packet {
    skb: *mut __sk_buff,
    answered: i32,
}

/// Answers question `index`; 1 ends the loop.
extern "C" fn answer(index: u32, packet: *mut Packet) -> u64 {
    // The helper counts to JUDGE_BATCH - 1; the verifier has to see it.
    let index = index as usize & (JUDGE_BATCH - 1);
    let place = JUDGE_HEADER + index * size_of::<Question>();
    // SAFETY: the helper passes on what it was given. What is read and written lies inside
    // the packet, as the comparison has shown, which is what the verifier goes by; any
    // bytes are a question.
    unsafe {
        let skb = (*packet).skb;
        let (start, end) = ((*skb).data as usize, (*skb).data_end as usize);
        if start + place + size_of::<Question>() > end {
            return 1;
        }
        let question = (start + place) as *mut Question;
        let verdict = judge(&question.read().query());
        (*question).reason = verdict.reason as u16;
        (*question).term = verdict.term;
        (*packet).answered += 1;
    }
    0
}
