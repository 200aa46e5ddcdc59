//! Servers of our own in a pod: each connection is served by a closure, whose result the
//! test gets.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use ringfence_lab::netns::Netns;

/// A listener on both families. Dropping it closes the listener and waits for the closures.
#[derive(Debug)]
pub struct Server<T> {
    results: Receiver<Result<T>>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Server<T> {
    /// Listens on `port` in `netns`. Reads and writes of the served streams fail after
    /// `patience`.
    pub fn start(
        netns: &Netns,
        port: u16,
        patience: Duration,
        serve: impl Fn(TcpStream) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let any = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
        let listener = netns
            .run(|| TcpListener::bind(any))?
            .with_context(|| format!("listening on port {port} in {}", netns.name()))?;
        listener.set_nonblocking(true)?;
        let (stop, stopped) = UnixStream::pair()?;
        let (sender, results) = channel();
        let serve = Arc::new(serve);
        let thread = std::thread::spawn(move || {
            let mut workers = Vec::new();
            while wait_for_connection(&listener, &stopped) {
                while let Ok((stream, _)) = listener.accept() {
                    let (sender, serve) = (sender.clone(), serve.clone());
                    workers.push(std::thread::spawn(move || {
                        let result = patient(&stream, patience)
                            .map_err(Into::into)
                            .and_then(|()| serve(stream));
                        let _ = sender.send(result);
                    }));
                }
            }
            drop(listener);
            workers.into_iter().for_each(|worker| drop(worker.join()));
        });
        Ok(Server {
            results,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The result of the next connection that is done with.
    pub fn next(&self, patience: Duration) -> Result<T> {
        self.results
            .recv_timeout(patience)
            .context("the server has not been done with a connection")?
    }

    /// Whether no connection has come, as far as is known now.
    pub fn is_untouched(&self) -> bool {
        self.results.try_recv().is_err()
    }
}

impl<T> Drop for Server<T> {
    fn drop(&mut self) {
        // The other end sees the close.
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// `false` when it is time to stop.
fn wait_for_connection(listener: &TcpListener, stopped: &UnixStream) -> bool {
    let mut ready = [
        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
    ];
    poll(&mut ready, PollTimeout::NONE).is_ok()
        && !ready.last().and_then(PollFd::any).unwrap_or(true)
}

/// A stream that blocks, but not for ever.
pub fn patient(stream: &TcpStream, patience: Duration) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}

/// Closes with RST instead of FIN.
pub fn reset(stream: TcpStream) -> Result<()> {
    let at_once = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, sockopt::Linger, &at_once)?;
    Ok(())
}

/// Sends back what comes until the end of the stream; returns how much that was.
pub fn echo(mut stream: TcpStream) -> Result<u64> {
    let mut back = stream.try_clone()?;
    let count = std::io::copy(&mut stream, &mut back)?;
    back.shutdown(std::net::Shutdown::Write)?;
    Ok(count)
}
