//! What the end-to-end and attack tests in `tests/` are made of: a harness that runs them in
//! order on one lab, and the other side of every attack: certificates of all kinds, a TLS
//! peer without manners, servers that misbehave.
//!
//! The peer seals its own records and shares no code with the tunnels under test but the
//! encoding of well-formed control messages.

pub mod authority;
pub mod edits;
pub mod harness;
pub mod hello;
pub mod load;
pub mod operator;
pub mod peer;
pub mod server;
pub mod spire;
pub mod stage;
pub mod volume;
pub mod withheld;
