//! The kernel record layer: payload moves by `splice(2)` and never enters our memory.
//!
//! Facts of Linux 6.1 to 7.2 this rests on: a splice from a kTLS socket whose next record
//! is not application data fails with `EINVAL` and leaves the record queued; splices move
//! at most what the pipe takes, and a pipe that is empty beforehand always takes a whole
//! record; `EAGAIN` with an empty pipe therefore means that the socket has nothing.

use std::io;

use rustls::{ExtractedSecrets, SupportedCipherSuite};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;

use super::{AppEnd, CopyError, Inbound, Incoming, MAX_PLAINTEXT, MAX_RECORDS, TYPE_DATA};
use crate::error::TunnelError;
use crate::pool::{Buffer, PipeSlot};
use crate::protocol::ProtocolError;
use crate::stream::Counters;
use crate::sys::{self, Direction, KeyError, fd};

/// More records than one splice of `n` bytes can make, not counting full ones: a pipe has
/// 64 slots and a record takes at least 16 of them before it is closed early.
const RECORDS_PER_SPLICE: u64 = 6;

/// What to wait for before receiving. An error alone counts: kernels with a TLS-aware poll
/// (6.2 on) report a malformed record as `EPOLLERR` without `EPOLLIN`.
const RECEIVABLE: Interest = Interest::READABLE.add(Interest::ERROR);

/// Bytes offered to one `recvmsg`.
const RECV: usize = 32 * 1024;

/// Hands the keys to the kernel. From here on the socket speaks records in both directions.
pub(crate) fn install(
    sock: &TcpStream,
    suite: SupportedCipherSuite,
    secrets: ExtractedSecrets,
) -> Result<(Tx, Rx), TunnelError> {
    let key_error = |during: &'static str| {
        move |e: KeyError| TunnelError::Local {
            during,
            source: match e {
                KeyError::Os(source) => source,
                unsupported @ KeyError::Unsupported(_) => {
                    io::Error::new(io::ErrorKind::Unsupported, unsupported)
                }
            },
        }
    };
    sys::set_ulp_tls(fd(sock)).map_err(|source| TunnelError::Local {
        during: "attaching kernel TLS to the tunnel socket",
        source,
    })?;
    sys::set_tls_key(fd(sock), Direction::Tx, suite, secrets.tx)
        .map_err(key_error("giving the kernel the sending key"))?;
    sys::set_tls_key(fd(sock), Direction::Rx, suite, secrets.rx)
        .map_err(key_error("giving the kernel the receiving key"))?;
    Ok((Tx::default(), Rx::default()))
}

/// Sending half.
#[derive(Debug)]
pub(crate) struct Tx {
    pipe: PipeSlot,
    /// Never below the number of records sent.
    estimate: u64,
    /// Ask the kernel for the true number when the estimate gets here.
    ask_at: u64,
}

impl Default for Tx {
    fn default() -> Self {
        Self {
            pipe: PipeSlot::default(),
            estimate: 0,
            ask_at: MAX_RECORDS / 4,
        }
    }
}

impl Tx {
    pub(crate) const fn records(&self) -> u64 {
        self.estimate
    }

    fn count(&mut self, sock: &TcpStream, records: u64) -> Result<(), TunnelError> {
        self.estimate = self.estimate.saturating_add(records);
        if self.estimate < self.ask_at {
            return Ok(());
        }
        let sent =
            sys::record_sequence(fd(sock), Direction::Tx).map_err(|source| TunnelError::Local {
                during: "reading the kernel's record number",
                source,
            })?;
        self.estimate = sent;
        // Half of what is left, so that the estimate cannot pass the limit unasked.
        let left = MAX_RECORDS.saturating_sub(sent);
        self.ask_at = sent + left / 2;
        if left < 4096 {
            return Err(TunnelError::RecordLimit);
        }
        Ok(())
    }

    pub(crate) async fn send(
        &mut self,
        sock: &TcpStream,
        record_type: u8,
        payload: &[u8],
    ) -> Result<(), TunnelError> {
        self.estimate += 1;
        loop {
            match sock.try_io(Interest::WRITABLE, || {
                sys::send_record(fd(sock), record_type, payload)
            }) {
                Ok(n) if n == payload.len() => return Ok(()),
                // The kernel takes a small record whole or not at all.
                Ok(_) => {
                    return Err(TunnelError::Local {
                        during: "sending a control record",
                        source: io::ErrorKind::WriteZero.into(),
                    });
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    sock.writable().await.map_err(sending)?;
                }
                Err(e) => return Err(sending(e)),
            }
        }
    }

    pub(crate) async fn copy_from(
        &mut self,
        app: &TcpStream,
        sock: &TcpStream,
        counters: &Counters,
    ) -> Result<AppEnd, CopyError> {
        loop {
            consume_budget().await;
            self.drain(sock, counters).await?;
            let pipe = self.pipe.get().map_err(no_pipe)?;
            match app.try_io(Interest::READABLE, || {
                sys::splice(fd(app), fd(&pipe.write), sys::SPLICE_MAX)
            }) {
                Ok(0) => {
                    self.pipe.release();
                    return Ok(AppEnd::Eof);
                }
                Ok(n) => self.pipe.filled += n,
                // The pipe is empty, so it is the socket that has nothing.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.pipe.release();
                    app.readable().await.map_err(CopyError::App)?;
                }
                Err(e) => return Err(CopyError::App(e)),
            }
        }
    }

    /// Moves all that is in the pipe into records.
    async fn drain(&mut self, sock: &TcpStream, counters: &Counters) -> Result<(), TunnelError> {
        while self.pipe.filled > 0 {
            consume_budget().await;
            let filled = self.pipe.filled;
            let pipe = self.pipe.get().map_err(no_pipe)?;
            // Exactly what is in the pipe: asking for more would leave a record open.
            match sock.try_io(Interest::WRITABLE, || {
                sys::splice(fd(&pipe.read), fd(sock), filled)
            }) {
                Ok(0) => {
                    return Err(TunnelError::Local {
                        during: "splicing into the tunnel",
                        source: io::ErrorKind::WriteZero.into(),
                    });
                }
                Ok(n) => {
                    self.pipe.filled -= n;
                    counters.add_tx(n);
                    self.count(sock, (n / MAX_PLAINTEXT) as u64 + RECORDS_PER_SPLICE)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // A splice that stops half-way has told TCP that more will follow at once,
                    // and TCP (up to Linux 6.4) then holds back what it has. If that alone
                    // fills the send buffer, as it can when memory pressure has shrunk it
                    // below two records, nothing would ever go out.
                    sock.set_nodelay(true).map_err(sending)?;
                    sock.writable().await.map_err(sending)?;
                }
                Err(e) => return Err(sending(e)),
            }
        }
        Ok(())
    }
}

/// Receiving half.
#[derive(Debug, Default)]
pub(crate) struct Rx {
    pipe: PipeSlot,
    /// Where control records are received, and data that came where a splice could not
    /// tell end of file from an empty record.
    spill: SpillBuffer,
}

#[derive(Debug)]
struct SpillBuffer {
    buf: Buffer,
    start: usize,
    end: usize,
}

impl Default for SpillBuffer {
    fn default() -> Self {
        Self {
            buf: Buffer::empty(),
            start: 0,
            end: 0,
        }
    }
}

/// What one `recvmsg` came to.
enum Step {
    Nothing,
    Incoming(Incoming),
    /// Data now lies in the spill buffer, or a record of no consequence was taken.
    Progress,
}

impl Rx {
    pub(crate) async fn recv(
        &mut self,
        sock: &TcpStream,
        inbound: &mut Inbound,
    ) -> Result<Incoming, TunnelError> {
        loop {
            consume_budget().await;
            match self.recv_step(sock, inbound)? {
                Step::Incoming(incoming) => {
                    self.spill.buf.release();
                    return Ok(incoming);
                }
                Step::Progress if self.spill.start < self.spill.end => {
                    return Err(ProtocolError::DataOutsideStream.into());
                }
                Step::Progress => {}
                Step::Nothing => {
                    self.spill.buf.release();
                    sock.ready(RECEIVABLE).await.map_err(receiving)?;
                }
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
            self.drain(app, counters).await?;
            let pipe = self.pipe.get().map_err(no_pipe)?;
            match try_receive(sock, || {
                sys::splice(fd(sock), fd(&pipe.write), sys::SPLICE_MAX)
            }) {
                Ok(n) if n > 0 => {
                    self.pipe.filled += n;
                    inbound.data_seen();
                    continue;
                }
                Ok(_) => {
                    // End of file, or an empty record (already taken): recvmsg can tell.
                    match self.recv_step(sock, inbound)? {
                        Step::Incoming(Incoming::Eof) => {
                            self.release();
                            return Ok(Incoming::Eof);
                        }
                        Step::Incoming(incoming) => {
                            self.release();
                            return Ok(incoming);
                        }
                        Step::Nothing | Step::Progress => inbound.empty_record()?,
                    }
                }
                // The pipe is empty, so it is the socket that has nothing.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.release();
                    sock.ready(RECEIVABLE).await.map_err(receiving)?;
                }
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EIO)) => {
                    match self.recv_step(sock, inbound)? {
                        Step::Incoming(incoming) => {
                            self.release();
                            return Ok(incoming);
                        }
                        Step::Progress => {}
                        // No record of another type is there, so the error was about a
                        // malformed header; telling it once has cleared it in the kernel.
                        Step::Nothing => return Err(TunnelError::BadRecord.into()),
                    }
                }
                Err(e) => return Err(receiving(e).into()),
            }
        }
    }

    fn release(&mut self) {
        self.pipe.release();
        self.spill.buf.release();
    }

    /// Hands everything in the pipe and the spill buffer to the application.
    async fn drain(&mut self, app: &TcpStream, counters: &Counters) -> Result<(), CopyError> {
        while self.pipe.filled > 0 {
            consume_budget().await;
            let filled = self.pipe.filled;
            let pipe = self.pipe.get().map_err(no_pipe)?;
            match app.try_io(Interest::WRITABLE, || {
                sys::splice(fd(&pipe.read), fd(app), filled)
            }) {
                Ok(0) => return Err(CopyError::App(io::ErrorKind::WriteZero.into())),
                Ok(n) => {
                    self.pipe.filled -= n;
                    counters.add_rx(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    app.writable().await.map_err(CopyError::App)?;
                }
                Err(e) => return Err(CopyError::App(e)),
            }
        }
        while self.spill.start < self.spill.end {
            let bytes = self.spill.buf.held();
            let bytes = bytes.get(self.spill.start..self.spill.end).unwrap_or(&[]);
            match app.try_write(bytes) {
                Ok(n) => {
                    self.spill.start += n;
                    counters.add_rx(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    app.writable().await.map_err(CopyError::App)?;
                }
                Err(e) => return Err(CopyError::App(e)),
            }
        }
        Ok(())
    }

    fn recv_step(&mut self, sock: &TcpStream, inbound: &mut Inbound) -> Result<Step, TunnelError> {
        let buffer = self.spill.buf.get();
        let buffer = buffer.get_mut(..RECV).unwrap_or(&mut []);
        let received = match try_receive(sock, || sys::recv_record(fd(sock), buffer)) {
            Ok(received) => received,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Nothing),
            Err(e) => return Err(receiving(e)),
        };
        let payload = buffer.get(..received.len).unwrap_or(&[]);
        match received.record_type {
            None if received.len == 0 => Ok(Step::Incoming(Incoming::Eof)),
            None | Some(TYPE_DATA) if received.len > 0 => {
                inbound.data_seen();
                (self.spill.start, self.spill.end) = (0, received.len);
                Ok(Step::Progress)
            }
            None | Some(TYPE_DATA) => {
                inbound.empty_record()?;
                Ok(Step::Progress)
            }
            Some(_) if !received.end_of_record => Err(TunnelError::OversizedRecord),
            Some(other) => Ok(match inbound.interpret(other, payload)? {
                Some(incoming) => Step::Incoming(incoming),
                None => Step::Progress,
            }),
        }
    }

    pub(crate) async fn discard(&mut self, sock: &TcpStream) {
        (self.spill.start, self.spill.end) = (0, 0);
        loop {
            consume_budget().await;
            let buffer = self.spill.buf.get();
            match try_receive(sock, || sys::recv_record(fd(sock), buffer)) {
                Ok(r) if r.len == 0 && r.record_type.is_none() => return,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.spill.buf.release();
                    if sock.ready(RECEIVABLE).await.is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }
}

/// Runs `receive` if the socket may have something, an error included.
fn try_receive<R>(sock: &TcpStream, mut receive: impl FnMut() -> io::Result<R>) -> io::Result<R> {
    // tokio's try_io takes one interest at a time.
    match sock.try_io(Interest::READABLE, &mut receive) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => sock.try_io(Interest::ERROR, receive),
        done => done,
    }
}

fn no_pipe(source: io::Error) -> TunnelError {
    TunnelError::Local {
        during: "opening a pipe",
        source,
    }
}

fn sending(e: io::Error) -> TunnelError {
    TunnelError::io("sending records", e)
}

/// The kernel names what is wrong with a record by `errno` (`net/tls/tls_sw.c`).
fn receiving(e: io::Error) -> TunnelError {
    match e.raw_os_error() {
        Some(libc::EBADMSG | libc::EINVAL) => TunnelError::BadRecord,
        Some(libc::EMSGSIZE) => TunnelError::OversizedRecord,
        Some(libc::EKEYEXPIRED) => TunnelError::KeyUpdate,
        _ => TunnelError::io("receiving records", e),
    }
}
