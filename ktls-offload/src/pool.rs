//! Pipes and buffers that a stream borrows while bytes are under way.
//!
//! An idle stream holds neither, so idle memory is the socket's own. Both pools
//! are bounded; beyond the bound a returned object is simply freed. The lock is
//! held for a `Vec` push or pop only.

use std::fmt;
use std::io;
use std::sync::Mutex;

use ring::rand::{SecureRandom, SystemRandom};

use crate::protocol::RandomUnavailable;
use crate::sys;

/// Bytes in a pooled buffer. Sized for seven full records read in one call.
pub(crate) const BUFFER: usize = 128 * 1024;

/// Objects each pool keeps for later.
const KEEP: usize = 64;

static BUFFERS: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());
static PIPES: Mutex<Vec<sys::Pipe>> = Mutex::new(Vec::new());

/// A buffer of [`BUFFER`] bytes on loan. Its first content is arbitrary.
pub(crate) struct Buffer(Option<Box<[u8]>>);

impl Buffer {
    /// Holds nothing until [`Buffer::get`].
    pub(crate) const fn empty() -> Self {
        Self(None)
    }

    /// The buffer, borrowed from the pool on first use.
    pub(crate) fn get(&mut self) -> &mut [u8] {
        self.0.get_or_insert_with(|| {
            lock(&BUFFERS)
                .pop()
                .unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice())
        })
    }

    /// The buffer if it is on loan, else an empty slice.
    pub(crate) fn held(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }

    /// Gives it back. The content is lost.
    pub(crate) fn release(&mut self) {
        if let Some(buffer) = self.0.take() {
            let mut pool = lock(&BUFFERS);
            if pool.len() < KEEP {
                pool.push(buffer);
            }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.release();
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the content: it may be plaintext.
        f.debug_struct("Buffer")
            .field("held", &self.0.is_some())
            .finish()
    }
}

/// A pipe on loan, and how many bytes are in it.
#[derive(Debug, Default)]
pub(crate) struct PipeSlot {
    pipe: Option<sys::Pipe>,
    /// Bytes in the pipe. Only splice in and splice out change it.
    pub(crate) filled: usize,
}

impl PipeSlot {
    pub(crate) fn get(&mut self) -> io::Result<&sys::Pipe> {
        let pipe = match self.pipe.take() {
            Some(pipe) => pipe,
            None => match lock(&PIPES).pop() {
                Some(pipe) => pipe,
                None => sys::Pipe::new()?,
            },
        };
        Ok(self.pipe.insert(pipe))
    }

    /// Gives an empty pipe back; one with bytes in it is closed with its slot.
    pub(crate) fn release(&mut self) {
        if self.filled != 0 {
            return;
        }
        if let Some(pipe) = self.pipe.take() {
            let mut pool = lock(&PIPES);
            if pool.len() < KEEP {
                pool.push(pipe);
            }
        }
    }
}

impl Drop for PipeSlot {
    fn drop(&mut self) {
        self.release();
    }
}

pub(crate) fn random_bytes(out: &mut [u8]) -> Result<(), RandomUnavailable> {
    SystemRandom::new().fill(out).map_err(|_| RandomUnavailable)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic between push and pop cannot leave a Vec torn.
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
