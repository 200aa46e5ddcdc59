//! The agent's own sockets, and the connections that were redirected to it.

use std::net::SocketAddr;

use ringfence_bpf_common::{Addr, AgentSocket, Endpoint, Flow, OriginalDst};

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

    /// Takes the record of a redirected connection: where the application wanted to go
    /// and which workload was chosen for it. `source` and `listener` are the two ends as
    /// the agent sees them at accept (use the address that `accept` returned:
    /// `getpeername` fails once the peer has reset the connection).
    ///
    /// `None`: nobody redirected this connection, or nobody can say any more which of two
    /// it was. It must be reset.
    pub fn take_original_destination(
        &self,
        netns: u64,
        source: SocketAddr,
        listener: SocketAddr,
    ) -> Option<OriginalDst> {
        let flow = Flow {
            netns,
            source: endpoint(source),
            listener: endpoint(listener),
        };
        let taken = self.original_destinations.get(&flow).and_then(|record| {
            if record.is_some() {
                self.original_destinations.remove(&flow)?;
            }
            Ok(record)
        });
        match taken {
            // Cookie 0: two connections claimed the record.
            Ok(record) => record.filter(|record| record.cookie != 0),
            Err(error) => {
                tracing::warn!(%error, %source, "the original destination cannot be read");
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

fn endpoint(addr: SocketAddr) -> Endpoint {
    Endpoint::new(Addr::from(addr.ip()), addr.port())
}
