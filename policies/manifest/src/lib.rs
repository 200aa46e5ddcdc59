//! `AuthorizationPolicy` and `PeerAuthentication` as Kubernetes users write them, read
//! and turned into the L4 policies of [`ringfence_policies`].
//!
//! - [`parse`] reads a file of any number of documents. It reports everything that is
//!   wrong, each with file, line, column, resource and field; a file with an error gives
//!   nothing. [`Manifests::merge`] joins the files of a directory.
//! - [`convert`] makes of them what Istiod sends to ambient nodes
//!   (`pilot/pkg/serviceregistry/ambient/authorization.go`), and says in [`Warning`]s
//!   what got lost on the way; [`Converted::attached`] says which policies a workload
//!   names.
//!
//! # Where this is not what Istiod does
//!
//! The rule: where Istiod is *stricter* than what is written, so is this, with a warning.
//! Where Istiod is more *open* than what is written, this is not.
//!
//! - A CIDR, port or pattern that cannot be used is an error. Istiod leaves it out, and a
//!   list that lost its last value matches everything.
//! - A list without values is an error, so is an empty selector, for the same reason.
//! - `trustDomains` is a condition that this API cannot carry. Istiod drops it, which
//!   widens an ALLOW rule; here the rule is left out like one with HTTP conditions.
//! - A `portLevelMtls` whose parents' modes Istiod mixes up (it then names a policy that
//!   it never sends) gets the policy that was meant.
//!
//! # Not in this crate
//!
//! Reading files, talking to a Kubernetes API, `RequestAuthentication`, and policies for
//! waypoints (`targetRef`): those are left out with a warning.

mod authorization;
mod convert;
mod error;
mod model;
mod node;
mod parse;
mod peer_authentication;
mod reader;
mod value;

pub use convert::{Converted, ConvertedPolicy, L7Handling, convert};
pub use error::{LostCondition, ManifestError, NotSent, Place, Problem, Warning, WarningKind};
pub use model::{AuthorizationPolicy, Manifests, MtlsMode, PeerAuthentication, Selector};
pub use parse::{OtherKinds, parse};
