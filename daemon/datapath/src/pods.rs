//! Enrolment of network namespaces, and the workloads that they talk to.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd},
};

use ringfence_bpf_common::{Addr, Pod, Workload};

use crate::{
    Datapath, DatapathError, attach,
    pins::{path_error, remove_link},
    sys,
};

impl Datapath {
    /// Enrols the network namespace `netns`, whose cookie is `cookie`: from here on its
    /// connects are classified and plaintext from the wire is judged. Enrolling again
    /// replaces the entry and the program.
    pub fn enrol(
        &self,
        netns: BorrowedFd<'_>,
        cookie: u64,
        pod: &Pod,
    ) -> Result<(), DatapathError> {
        // The entry first: the program refuses everything without one.
        self.pods.put(&cookie, pod)?;
        attach::attach_pod(&self.pins, netns, cookie)
    }

    /// Changes what is known of an enrolled pod, in one step.
    pub fn update_pod(&self, cookie: u64, pod: &Pod) -> Result<(), DatapathError> {
        self.pods.put(&cookie, pod)
    }

    /// Ends the enrolment: the namespace's traffic is its own again.
    pub fn withdraw(&self, cookie: u64) -> Result<(), DatapathError> {
        self.unguard(cookie)?;
        remove_link(&self.pins.pod(cookie))?;
        self.pods.remove(&cookie)?;
        for handshake in self.original_destinations.keys()? {
            if handshake.flow.netns == cookie {
                self.original_destinations.remove(&handshake)?;
            }
        }
        for flow in self.last_hops.keys()? {
            if flow.netns == cookie {
                self.last_hops.remove(&flow)?;
            }
        }
        for flow in self.plaintext.keys()? {
            if flow.netns == cookie {
                self.plaintext.remove(&flow)?;
            }
        }
        Ok(())
    }

    /// The entry of an enrolled pod.
    pub fn pod(&self, cookie: u64) -> Result<Option<Pod>, DatapathError> {
        self.pods.get(&cookie)
    }

    /// The cookies of all enrolled namespaces.
    pub fn pods(&self) -> Result<Vec<u64>, DatapathError> {
        self.pods.keys()
    }

    /// Withdraws the pods whose namespace has ended, and returns their cookies: the
    /// kernel detaches a link then, and leaves its pin.
    pub fn collect_dead_pods(&self) -> Result<Vec<u64>, DatapathError> {
        let folder = self.pins.pods();
        let mut dead = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|e| path_error("read", &folder, e))? {
            let path = entry.map_err(|e| path_error("read", &folder, e))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Ok(cookie) = name.parse::<u64>() else {
                continue;
            };
            let link = match sys::open_pin(&path) {
                Ok(link) => link,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(path_error("open the pinned link", &path, source)),
            };
            let alive = sys::netns_link_is_alive(link.as_fd())
                .map_err(|source| path_error("inspect the pinned link", &path, source))?;
            if !alive {
                dead.push(cookie);
            }
        }
        for cookie in &dead {
            self.withdraw(*cookie)?;
        }
        Ok(dead)
    }

    /// Says how connections to `addr` go.
    pub fn put_workload(&self, addr: Addr, workload: Workload) -> Result<(), DatapathError> {
        self.workloads.put(&addr, &workload)
    }

    /// Forgets the workload: connections to `addr` go directly.
    pub fn remove_workload(&self, addr: &Addr) -> Result<(), DatapathError> {
        self.workloads.remove(addr)
    }

    /// All workloads, also those that an earlier agent wrote.
    pub fn workloads(&self) -> Result<Vec<(Addr, Workload)>, DatapathError> {
        self.workloads.entries()
    }
}
