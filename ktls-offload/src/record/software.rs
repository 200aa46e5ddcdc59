//! The software record layer: sealed and opened in place, several records a system call.

use std::io::{self, IoSlice, IoSliceMut};

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;

use super::aead::{HEADER, MAX_RECORD, OVERHEAD, RecordKey, record_len};
use super::{AppEnd, CopyError, Inbound, Incoming, MAX_PLAINTEXT, MAX_RECORDS, TYPE_DATA};
use crate::error::TunnelError;
use crate::pool::{BUFFER, Buffer};
use crate::stream::Counters;
use crate::sys::{self, fd};

/// Full records that fit into one buffer: one `readv` fills them, one `write` sends them.
const SLOTS: usize = BUFFER / MAX_RECORD;

/// Plaintext runs handed to the application in one `writev`.
const RUNS: usize = 16;

/// Sending half: key and the sealed bytes that the socket has not taken yet.
#[derive(Debug)]
pub(crate) struct Tx {
    key: RecordKey,
    out: Buffer,
    start: usize,
    end: usize,
}

impl Tx {
    pub(crate) fn new(key: RecordKey) -> Self {
        Self {
            key,
            out: Buffer::empty(),
            start: 0,
            end: 0,
        }
    }

    pub(crate) const fn records(&self) -> u64 {
        self.key.sequence()
    }

    async fn flush(&mut self, sock: &TcpStream) -> Result<(), TunnelError> {
        while self.start < self.end {
            let pending = self.out.held().get(self.start..self.end).unwrap_or(&[]);
            match sock.try_write(pending) {
                Ok(n) => self.start += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    sock.writable().await.map_err(sending)?;
                }
                Err(e) => return Err(sending(e)),
            }
        }
        (self.start, self.end) = (0, 0);
        Ok(())
    }

    pub(crate) async fn send(
        &mut self,
        sock: &TcpStream,
        record_type: u8,
        payload: &[u8],
    ) -> Result<(), TunnelError> {
        self.flush(sock).await?;
        let buffer = self.out.get();
        let Some(room) = buffer.get_mut(HEADER..HEADER + payload.len()) else {
            return Err(TunnelError::OversizedRecord);
        };
        room.copy_from_slice(payload);
        self.end = self.key.seal(record_type, buffer, payload.len())?;
        self.flush(sock).await?;
        self.out.release();
        Ok(())
    }

    pub(crate) async fn copy_from(
        &mut self,
        app: &TcpStream,
        sock: &TcpStream,
        counters: &Counters,
    ) -> Result<AppEnd, CopyError> {
        loop {
            consume_budget().await;
            self.flush(sock).await?;
            if self.key.sequence() >= MAX_RECORDS {
                return Err(TunnelError::RecordLimit.into());
            }
            match self.read_and_seal(app) {
                Ok(Ok(0)) => {
                    self.out.release();
                    return Ok(AppEnd::Eof);
                }
                Ok(Ok(n)) => counters.add_tx(n),
                Ok(Err(e)) => return Err(e.into()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // Nothing under way: an idle stream holds no buffer.
                    self.out.release();
                    app.readable().await.map_err(CopyError::App)?;
                }
                Err(e) => return Err(CopyError::App(e)),
            }
        }
    }

    /// One `readv` into the payload rooms of up to [`SLOTS`] records, then seals each where
    /// it lies. All but the last are full, so the records are contiguous.
    fn read_and_seal(&mut self, app: &TcpStream) -> io::Result<Result<usize, TunnelError>> {
        let buffer = self.out.get();
        let mut slots = buffer.chunks_exact_mut(MAX_RECORD);
        let mut rooms: [IoSliceMut<'_>; SLOTS] = std::array::from_fn(|_| {
            IoSliceMut::new(
                slots
                    .next()
                    .and_then(|slot| slot.get_mut(HEADER..HEADER + MAX_PLAINTEXT))
                    .unwrap_or(&mut []),
            )
        });
        let n = read(app, &mut rooms)?;
        (self.start, self.end) = (0, 0);
        let mut left = n;
        for slot in buffer.chunks_exact_mut(MAX_RECORD) {
            let len = left.min(MAX_PLAINTEXT);
            if len == 0 {
                break;
            }
            match self.key.seal(TYPE_DATA, slot, len) {
                Ok(sealed) => self.end += sealed,
                Err(e) => return Ok(Err(e)),
            }
            left -= len;
        }
        Ok(Ok(n))
    }
}

/// A record that is not data, decrypted and waiting behind the data before it.
#[derive(Debug, Clone, Copy)]
struct Held {
    record_type: u8,
    at: usize,
    len: usize,
}

/// Receiving half: key, sealed bytes not yet opened, opened bytes not yet written.
#[derive(Debug)]
pub(crate) struct Rx {
    key: RecordKey,
    buf: Buffer,
    /// Sealed bytes are `buf[start..end]`.
    start: usize,
    end: usize,
    /// Opened data, as (offset, length) in `buf`, in order: `runs[first..last]`.
    runs: [(usize, usize); RUNS],
    first: usize,
    last: usize,
    held: Option<Held>,
    eof: bool,
}

impl Rx {
    pub(crate) fn new(key: RecordKey) -> Self {
        Self {
            key,
            buf: Buffer::empty(),
            start: 0,
            end: 0,
            runs: [(0, 0); RUNS],
            first: 0,
            last: 0,
            held: None,
            eof: false,
        }
    }

    pub(crate) const fn buffered(&self) -> usize {
        self.end - self.start
    }

    const fn has_runs(&self) -> bool {
        self.first < self.last
    }

    pub(crate) async fn recv(
        &mut self,
        sock: &TcpStream,
        inbound: &mut Inbound,
    ) -> Result<Incoming, TunnelError> {
        loop {
            consume_budget().await;
            if self.has_runs() {
                return Err(crate::protocol::ProtocolError::DataOutsideStream.into());
            }
            if let Some(incoming) = self.next_step(sock, inbound).await? {
                return Ok(incoming);
            }
        }
    }

    pub(crate) async fn copy_to(
        &mut self,
        sock: &TcpStream,
        app: &TcpStream,
        inbound: &mut Inbound,
        counters: &Counters,
    ) -> Result<Incoming, CopyError> {
        loop {
            consume_budget().await;
            while self.has_runs() {
                match self.write_runs(app) {
                    Ok(n) => {
                        counters.add_rx(n);
                        self.advance(n);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        app.writable().await.map_err(CopyError::App)?;
                    }
                    Err(e) => return Err(CopyError::App(e)),
                }
            }
            if let Some(incoming) = self.next_step(sock, inbound).await? {
                return Ok(incoming);
            }
        }
    }

    /// With no opened data waiting: takes the held record, opens what is here, or reads.
    async fn next_step(
        &mut self,
        sock: &TcpStream,
        inbound: &mut Inbound,
    ) -> Result<Option<Incoming>, TunnelError> {
        if let Some(held) = self.held.take() {
            let payload = self
                .buf
                .held()
                .get(held.at..held.at + held.len)
                .unwrap_or(&[]);
            let incoming = inbound.interpret(held.record_type, payload)?;
            self.release_if_idle();
            return Ok(incoming);
        }
        if self.open_batch(inbound)? {
            return Ok(None);
        }
        if self.eof {
            // Also with half a record here: cut off either way.
            return Ok(Some(Incoming::Eof));
        }
        self.read(sock).await?;
        Ok(None)
    }

    /// Opens records until the runs are full or something other than data comes. `false`:
    /// not one whole record is here.
    fn open_batch(&mut self, inbound: &mut Inbound) -> Result<bool, TunnelError> {
        (self.first, self.last) = (0, 0);
        if self.start == self.end {
            return Ok(false);
        }
        let mut progress = false;
        let buffer = self.buf.get();
        while self.last < RUNS && self.held.is_none() {
            let sealed = buffer.get_mut(self.start..self.end).unwrap_or(&mut []);
            let Some(len) = record_len(sealed)? else {
                break;
            };
            let Some(record) = sealed.get_mut(..len) else {
                break;
            };
            let (record_type, plain) = self.key.open(record)?;
            let at = self.start + HEADER;
            self.start += len;
            progress = true;
            if record_type == TYPE_DATA && plain > 0 {
                inbound.data_seen();
                if let Some(run) = self.runs.get_mut(self.last) {
                    *run = (at, plain);
                    self.last += 1;
                }
            } else {
                self.held = Some(Held {
                    record_type,
                    at,
                    len: plain,
                });
            }
        }
        Ok(progress)
    }

    async fn read(&mut self, sock: &TcpStream) -> Result<(), TunnelError> {
        // Opened data is gone by now, so the front of the buffer is free.
        if self.start > 0 {
            if self.start < self.end {
                let (start, end) = (self.start, self.end);
                self.buf.get().copy_within(start..end, 0);
            }
            self.end -= self.start;
            self.start = 0;
        }
        loop {
            let end = self.end;
            let room = self.buf.get().get_mut(end..).unwrap_or(&mut []);
            // A whole record always fits: MAX_RECORD is far below BUFFER.
            match read(sock, &mut [IoSliceMut::new(room)]) {
                Ok(0) => {
                    self.eof = true;
                    return Ok(());
                }
                Ok(n) => {
                    self.end += n;
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.release_if_idle();
                    sock.readable().await.map_err(receiving)?;
                }
                Err(e) => return Err(receiving(e)),
            }
        }
    }

    fn release_if_idle(&mut self) {
        if self.start == self.end && !self.has_runs() && self.held.is_none() {
            (self.start, self.end) = (0, 0);
            self.buf.release();
        }
    }

    fn write_runs(&self, app: &TcpStream) -> io::Result<usize> {
        let buffer = self.buf.held();
        let mut slices = [IoSlice::new(&[]); RUNS];
        let mut used = 0;
        let runs = self.runs.get(self.first..self.last).unwrap_or(&[]);
        for (slice, (at, len)) in slices.iter_mut().zip(runs) {
            *slice = IoSlice::new(buffer.get(*at..*at + *len).unwrap_or(&[]));
            used += 1;
        }
        app.try_write_vectored(slices.get(..used).unwrap_or(&[]))
    }

    fn advance(&mut self, mut n: usize) {
        while n > 0 {
            let Some((at, len)) = self.runs.get_mut(self.first) else {
                return;
            };
            if n < *len {
                *at += n;
                *len -= n;
                return;
            }
            n -= *len;
            self.first += 1;
        }
    }

    pub(crate) async fn discard(&mut self, sock: &TcpStream) {
        (self.start, self.end, self.first, self.last) = (0, 0, 0, 0);
        self.held = None;
        loop {
            consume_budget().await;
            match sock.try_read(self.buf.get()) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.buf.release();
                    if sock.readable().await.is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }
}

/// One `readv`. A read that leaves room has emptied the socket, so the next one waits for
/// an event instead of asking the kernel in vain: a message costs one read and not two.
///
/// Sound with edge-triggered events: what comes after the read raises a new one, and an end
/// of file or a reset that came before it stays in the readiness that tokio keeps.
fn read(sock: &TcpStream, rooms: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    let room: usize = rooms.iter().map(|r| r.len()).sum();
    let mut got = 0;
    let read = sock.try_io(Interest::READABLE, || {
        got = sys::readv(fd(sock), rooms)?;
        if got > 0 && got < room {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(got)
    });
    match read {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock && got > 0 => Ok(got),
        read => read,
    }
}

// A sealed record is never longer than its slot.
const _: () = assert!(MAX_RECORD == MAX_PLAINTEXT + OVERHEAD && SLOTS >= 4);

fn sending(e: io::Error) -> TunnelError {
    TunnelError::io("sending records", e)
}

fn receiving(e: io::Error) -> TunnelError {
    TunnelError::io("receiving records", e)
}
