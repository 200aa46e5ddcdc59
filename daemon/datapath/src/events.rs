//! Verdicts as they happen.

use std::{fmt, io, path::Path};

use aya::maps::{Map, MapData, RingBuf};
use ringfence_bpf_common::{Addr, Endpoint, Event};
use tokio::io::unix::AsyncFd;

use crate::{DatapathError, pins::path_error, sys, table::table_error};

const EVENTS: &str = "EVENTS";

/// The stream of events. What the ring buffer had no room for is lost and counted
/// (`events_lost`); no verdict depends on it.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl Events {
    pub(crate) fn open(pin: &Path) -> Result<Self, DatapathError> {
        let ring = MapData::from_pin(pin)
            .and_then(Map::from_map_data)
            .and_then(RingBuf::try_from)
            .map_err(|e| table_error("open", EVENTS, e))?;
        let ring = sys::watch(ring).map_err(|source| path_error("wait for", pin, source))?;
        Ok(Events { ring })
    }

    /// The next event; waits for one. Cancel safe. Must run on a tokio runtime, and so
    /// must [`Datapath::events`](crate::Datapath::events).
    pub async fn next(&mut self) -> io::Result<Event> {
        loop {
            let mut ready = self.ring.readable_mut().await?;
            if let Some(event) = pop(ready.get_inner_mut()) {
                return Ok(event);
            }
            ready.clear_ready();
        }
    }

    /// The next event, if there is one already.
    pub fn try_next(&mut self) -> Option<Event> {
        pop(self.ring.get_mut())
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

/// The next record that has the size of an event: the kernel's programs write no other.
fn pop(ring: &mut RingBuf<MapData>) -> Option<Event> {
    loop {
        let item = ring.next()?;
        if let Some(event) = parse(&item) {
            return Some(event);
        }
    }
}

/// Reads the fields in their order: the same machine wrote them.
fn parse(mut bytes: &[u8]) -> Option<Event> {
    fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
        let (head, tail) = bytes.split_first_chunk()?;
        *bytes = tail;
        Some(*head)
    }
    fn endpoint(bytes: &mut &[u8]) -> Option<Endpoint> {
        Some(Endpoint {
            addr: Addr(take(bytes)?),
            port: u16::from_ne_bytes(take(bytes)?),
            pad: u16::from_ne_bytes(take(bytes)?),
        })
    }
    let event = Event {
        netns: u64::from_ne_bytes(take(&mut bytes)?),
        source: endpoint(&mut bytes)?,
        destination: endpoint(&mut bytes)?,
        identity: u32::from_ne_bytes(take(&mut bytes)?),
        reason: u16::from_ne_bytes(take(&mut bytes)?),
        term: u16::from_ne_bytes(take(&mut bytes)?),
        hook: u32::from_ne_bytes(take(&mut bytes)?),
        set: u32::from_ne_bytes(take(&mut bytes)?),
    };
    bytes.is_empty().then_some(event)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn event_is_read_in_its_layout() {
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&7u64.to_ne_bytes());
        bytes[24..26].copy_from_slice(&1234u16.to_ne_bytes());
        bytes[44..46].copy_from_slice(&80u16.to_ne_bytes());
        bytes[48..52].copy_from_slice(&9u32.to_ne_bytes());
        bytes[52..54].copy_from_slice(&18u16.to_ne_bytes());
        bytes[54..56].copy_from_slice(&u16::MAX.to_ne_bytes());
        bytes[56..60].copy_from_slice(&2u32.to_ne_bytes());
        bytes[60..64].copy_from_slice(&5u32.to_ne_bytes());
        let event = parse(&bytes).unwrap();
        assert_eq!(
            (event.netns, event.source.port, event.destination.port),
            (7, 1234, 80)
        );
        assert_eq!(
            (event.identity, event.reason, event.term, event.hook),
            (9, 18, u16::MAX, 2)
        );
        assert_eq!(event.set, 5);
    }

    #[test]
    fn record_of_another_size_is_no_event() {
        assert_eq!(parse(&[0; 63]), None);
        assert_eq!(parse(&[0; 65]), None);
        assert_eq!(parse(&[]), None);
    }
}
