//! Streams that live for as long as a test wants them to, and count what they carry.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use ring::digest::{self, SHA256};

/// What a stream does all day. The other end is an [`echo`](crate::server::echo).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Both directions at once, as two streams of bytes.
    Bulk,
    /// A request, its answer, a pause.
    Requests,
    /// A word at the beginning and one at the end.
    Idle,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Bulk, Kind::Requests, Kind::Idle];
}

/// Live streams, each served by threads of its own.
#[derive(Debug)]
pub struct Load {
    bell: Arc<Bell>,
    ends: Receiver<(String, Result<u64>)>,
    sender: Sender<(String, Result<u64>)>,
    threads: Vec<JoinHandle<()>>,
}

/// What the streams of a [`Load`] carried, all of it there and back.
#[derive(Clone, Copy, Debug, Default)]
pub struct Carried {
    pub streams: usize,
    /// One way.
    pub bytes: u64,
}

impl Load {
    pub fn new() -> Self {
        let (sender, ends) = channel();
        Load {
            bell: Arc::default(),
            ends,
            sender,
            threads: Vec::new(),
        }
    }

    /// Puts a stream to work. `seed` tells its bytes from those of others.
    pub fn add(&mut self, name: String, kind: Kind, stream: TcpStream, seed: u64) {
        let (bell, sender) = (self.bell.clone(), self.sender.clone());
        self.threads.push(std::thread::spawn(move || {
            let bytes = Bytes::new(seed);
            let carried = match kind {
                Kind::Bulk => bulk(stream, bytes, &bell),
                Kind::Requests => requests(stream, bytes, &bell, PAUSE),
                Kind::Idle => requests(stream, bytes, &bell, Duration::MAX),
            };
            let _ = sender.send((name, carried));
        }));
    }

    /// Waits that long; a stream that ends meanwhile is an error.
    pub fn watch(&self, wait: Duration) -> Result<()> {
        match self.ends.recv_timeout(wait) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => Err(anyhow!("no stream is left")),
            Ok((name, Ok(bytes))) => Err(anyhow!("{name} ended by itself after {bytes} bytes")),
            Ok((name, Err(error))) => Err(error.context(name)),
        }
    }

    /// Ends all streams, each after its last word, and counts.
    pub fn end(self, patience: Duration) -> Result<Carried> {
        self.bell.ring();
        let mut carried = Carried::default();
        for _ in &self.threads {
            let (name, bytes) = self
                .ends
                .recv_timeout(patience)
                .context("a stream does not end")?;
            carried.streams += 1;
            carried.bytes += bytes.context(name)?;
        }
        Ok(carried)
    }
}

impl Default for Load {
    fn default() -> Self {
        Self::new()
    }
}

/// Between a request's answer and the next request, and between two chunks of bulk: enough
/// streams of it keep a guest without hardware virtualization busy.
const PAUSE: Duration = Duration::from_millis(100);
const CHUNK: usize = 16 * 1024;

fn bulk(stream: TcpStream, mut bytes: Bytes, bell: &Arc<Bell>) -> Result<u64> {
    let mut sending = stream.try_clone()?;
    let stop = bell.clone();
    let sender = std::thread::spawn(move || -> Result<(u64, digest::Digest)> {
        let (mut count, mut hash) = (0, digest::Context::new(&SHA256));
        loop {
            let chunk = bytes.next(CHUNK);
            sending.write_all(&chunk).context("sending")?;
            hash.update(&chunk);
            count += u64::try_from(chunk.len())?;
            if stop.wait(PAUSE) {
                break;
            }
        }
        sending.shutdown(Shutdown::Write)?;
        Ok((count, hash.finish()))
    });
    let received = digest_of(stream);
    let sent = sender.join().map_err(|_| anyhow!("the sender panicked"))?;
    // Whoever failed first says more; a reset fails both.
    let ((sent, sent_hash), (received, received_hash)) = (sent?, received?);
    ensure!(sent == received, "sent {sent} bytes, got back {received}");
    ensure!(
        sent_hash.as_ref() == received_hash.as_ref(),
        "{sent} bytes came back changed"
    );
    Ok(sent)
}

fn digest_of(mut stream: TcpStream) -> Result<(u64, digest::Digest)> {
    let (mut count, mut hash) = (0, digest::Context::new(&SHA256));
    let mut buffer = vec![0u8; 65536];
    loop {
        let length = stream.read(&mut buffer).context("receiving")?;
        let Some(chunk) = buffer.get(..length).filter(|chunk| !chunk.is_empty()) else {
            return Ok((count, hash.finish()));
        };
        hash.update(chunk);
        count += u64::try_from(length)?;
    }
}

fn requests(mut stream: TcpStream, mut bytes: Bytes, bell: &Bell, pause: Duration) -> Result<u64> {
    let mut count = 0;
    loop {
        // Before the look at what it answers: the last exchange comes after the end was rung.
        let last = count > 0 && bell.wait(pause);
        let request = bytes.next(1 + usize::try_from(count % 2000)?);
        stream.write_all(&request).context("sending a request")?;
        let mut answer = vec![0; request.len()];
        stream
            .read_exact(&mut answer)
            .context("waiting for an answer")?;
        ensure!(answer == request, "an answer differs from its request");
        count += u64::try_from(request.len())?;
        if last {
            break;
        }
    }
    stream.shutdown(Shutdown::Write)?;
    let rest = digest_of(stream)?.0;
    ensure!(rest == 0, "{rest} bytes too many");
    Ok(count)
}

/// Rung once, for everybody.
#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Whether it was rung before `wait` was over.
    fn wait(&self, wait: Duration) -> bool {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(rung, wait, |rung| !*rung);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Bytes that never repeat within a test (xorshift64).
#[derive(Debug)]
struct Bytes(u64);

impl Bytes {
    fn new(seed: u64) -> Self {
        // Zero would stay zero.
        Bytes(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            bytes.extend(self.0.to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::server::echo;
    use std::net::TcpListener;

    fn against(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Load {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serve = Arc::new(serve);
        let mut load = Load::new();
        for (kind, seed) in Kind::ALL.into_iter().zip(1..) {
            let stream = TcpStream::connect(address).unwrap();
            load.add(format!("{kind:?}"), kind, stream, seed);
            let (accepted, serve) = (listener.accept().unwrap().0, serve.clone());
            std::thread::spawn(move || serve(accepted));
        }
        load
    }

    #[test]
    fn what_comes_back_unchanged_is_counted() {
        let load = against(|stream| drop(echo(stream)));
        load.watch(Duration::from_millis(300)).unwrap();
        let carried = load.end(Duration::from_secs(30)).unwrap();
        assert_eq!(carried.streams, 3);
        assert!(carried.bytes > u64::try_from(CHUNK).unwrap());
    }

    #[test]
    fn a_changed_byte_and_a_lost_one_are_noticed() {
        for lost in [false, true] {
            let load = against(move |mut stream| {
                let mut first = [0];
                stream.read_exact(&mut first).unwrap();
                if !lost {
                    stream.write_all(&[first[0] ^ 1]).unwrap();
                }
                let _ = echo(stream);
            });
            let watched = load.watch(Duration::from_millis(300));
            assert!(watched.is_err() || load.end(Duration::from_secs(2)).is_err());
        }
    }

    #[test]
    fn a_stream_that_is_cut_is_noticed_at_once() {
        let load = against(drop);
        assert!(load.watch(Duration::from_secs(30)).is_err());
    }
}
