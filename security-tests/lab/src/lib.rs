//! The lab: network namespaces as nodes and pods, real programs in them, and the means to
//! observe from outside what happens between them.
//!
//! [`Lab::up`] makes a routed network of two to four nodes, starts nginx, redis and iperf3
//! where they belong, the control plane, and one agent per node. What it leaves running is
//! recorded under one folder, so that [`Lab::open`] finds it again and [`down`] removes all
//! of it, also after a crash. The `demo`, `lab` and `bench` commands and the end-to-end
//! tests use the same functions.
//!
//! Not simulated: a container runtime (pods are bare namespaces, their processes stay in
//! the host's mount and PID namespaces), address assignment, DNS.

pub mod capture;
pub mod kernel_view;
mod lab;
pub mod mesh;
pub mod netns;
pub mod probe;
pub mod process;
pub mod programs;
pub mod status;
mod sys;
pub mod tcp;
pub mod tls;
pub mod topology;

pub use lab::{Lab, LabConfig, LabId, RecordLayer, down};
