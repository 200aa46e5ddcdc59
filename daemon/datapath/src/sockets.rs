//! The agent's own sockets, and the connections that were redirected to it.

use std::os::fd::BorrowedFd;

use aya::maps::MapError;
use ringfence_bpf_common::{AgentSocket, Flow, OriginalDst};

use crate::{Datapath, DatapathError};

impl Datapath {
    /// Says what the agent's socket with this cookie ([`crate::socket_cookie`]) is for,
    /// before it connects. The entry lasts as long as the guard; `connect(2)` has read it
    /// when it returns, also with `EINPROGRESS`.
    pub fn register_socket(
        &self,
        cookie: u64,
        socket: AgentSocket,
    ) -> Result<RegisteredSocket<'_>, DatapathError> {
        self.agent_sockets.put(&cookie, &socket)?;
        Ok(RegisteredSocket {
            datapath: self,
            cookie,
        })
    }

    /// Where the connection of an accepted socket was going before it was redirected: what
    /// the application asked for and which workload was chosen for it. The kernel keeps it
    /// with the socket, so it is there until the socket is closed, also for another agent.
    ///
    /// `None`: nobody redirected this connection, or the kernel had no room to note that
    /// (counted as `no_room`). It must be reset.
    pub fn original_destination(&self, accepted: BorrowedFd<'_>) -> Option<OriginalDst> {
        match self.accepted.get(&accepted, 0) {
            Ok(record) => Some(record),
            Err(MapError::KeyNotFound) => None,
            Err(error) => {
                tracing::warn!(%error, "the original destination cannot be read");
                None
            }
        }
    }

    /// The last hops that are connected now, each with the cookie of the agent's socket.
    pub fn last_hops(&self) -> Result<Vec<(Flow, u64)>, DatapathError> {
        self.last_hops.entries()
    }
}

/// Keeps a socket registered; see [`Datapath::register_socket`].
#[derive(Debug)]
#[must_use = "dropping it ends the registration"]
pub struct RegisteredSocket<'a> {
    datapath: &'a Datapath,
    cookie: u64,
}

impl Drop for RegisteredSocket<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.datapath.agent_sockets.remove(&self.cookie) {
            // Cookies are not given twice: the entry is dead weight, no hole.
            tracing::warn!(%error, "an agent socket stays registered");
        }
    }
}
