//! Counters and events. Nothing here can change a verdict.

use ringfence_bpf_common::{Counter, Endpoint, Event, Verdict};

use crate::maps::{COUNTERS, EVENTS};

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot belongs to this CPU and the map is never resized. A program
        // that interrupts this one here may cost a count, nothing else.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}

/// One judged connection.
pub struct Judged<'a> {
    pub netns: u64,
    pub hook: u32,
    pub source: &'a Endpoint,
    pub destination: &'a Endpoint,
    pub identity: u32,
    /// The policy set that was asked; 0 for none.
    pub set: u32,
    pub verdict: Verdict,
}

#[inline(always)]
pub fn event(judged: &Judged<'_>) {
    let Some(mut slot) = EVENTS.reserve::<Event>(0) else {
        count(Counter::EventsLost);
        return;
    };
    slot.write(Event {
        netns: judged.netns,
        source: *judged.source,
        destination: *judged.destination,
        identity: judged.identity,
        reason: judged.verdict.reason as u16,
        term: judged.verdict.term,
        hook: judged.hook,
        set: judged.set,
    });
    slot.submit(0);
}
