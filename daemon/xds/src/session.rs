//! What one client knows across streams: names and versions per type, and how
//! a response turns into updates and an ACK or NACK. No I/O here.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;

use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, ErrorDetail, Node};
use crate::proto::security::Authorization;
use crate::proto::workload::Address;
use crate::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

/// Receives what the control plane sends, one call per response.
pub trait Handler: Send + 'static {
    /// Applies one response and returns the resources that could not be applied.
    ///
    /// Everything that is not returned counts as applied. A rejection does not
    /// undo the rest of the response; whether an older version of a rejected
    /// resource stays in force is the handler's decision.
    fn apply(&mut self, update: Update) -> Vec<Rejection>;
}

/// One response of the control plane.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// Workloads and services. Names are the workload's uid or the service's `namespace/hostname`.
    Addresses(Delta<Address>),
    /// Policies. Names are `namespace/name`.
    Authorizations(Delta<Authorization>),
}

/// What changed. Removals are to be applied before `upserted`.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta<T> {
    pub removed: Vec<String>,
    pub upserted: Vec<Named<T>>,
    /// First response of this type on this stream: once it is applied the
    /// handler has all that the server had, so the type is synced.
    pub complete: bool,
}

/// A resource under the name by which it will be updated and removed.
#[derive(Debug, Clone, PartialEq)]
pub struct Named<T> {
    pub name: String,
    pub value: T,
}

/// A resource that was not applied, and why (sent to the control plane).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    pub name: String,
    pub reason: String,
}

/// State that outlives a stream.
#[derive(Debug, Default)]
pub(crate) struct Session {
    addresses: Known,
    authorizations: Known,
}

/// Names of one type.
#[derive(Debug, Default)]
struct Known {
    /// Applied: name to version.
    accepted: BTreeMap<String, String>,
    /// Sent by the server, not applied. They are left out of
    /// `initial_resource_versions`, so that a reconnect brings them again.
    rejected: BTreeSet<String>,
    /// A response of this type has been seen on this stream.
    answered: bool,
}

impl Session {
    /// Starts a stream: the subscriptions to send first. Only the first one carries the node.
    pub(crate) fn start_stream(&mut self, node: Node) -> [DeltaDiscoveryRequest; 2] {
        [
            DeltaDiscoveryRequest {
                node: Some(node),
                ..self.addresses.subscribe(ADDRESS_TYPE)
            },
            self.authorizations.subscribe(AUTHORIZATION_TYPE),
        ]
    }

    /// Hands a response to the handler; returns the ACK or NACK to send.
    ///
    /// `None`: a type that was never asked for, which has no subscription that
    /// an acknowledgement could belong to.
    pub(crate) fn respond(
        &mut self,
        response: DeltaDiscoveryResponse,
        handler: &mut dyn Handler,
    ) -> Option<DeltaDiscoveryRequest> {
        match response.type_url.as_str() {
            ADDRESS_TYPE => Some(self.addresses.respond(response, check_address, |delta| {
                handler.apply(Update::Addresses(delta))
            })),
            AUTHORIZATION_TYPE => Some(self.authorizations.respond(
                response,
                |_| Ok(()),
                |delta| handler.apply(Update::Authorizations(delta)),
            )),
            other => {
                tracing::warn!(
                    type_url = other,
                    "control plane sent a type that was not asked for; ignored"
                );
                None
            }
        }
    }
}

impl Known {
    fn subscribe(&mut self, type_url: &str) -> DeltaDiscoveryRequest {
        self.answered = false;
        DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            // An empty subscribe list in the first request of a type is the wildcard.
            initial_resource_versions: self.accepted.clone().into_iter().collect(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    fn respond<T: Message + Default>(
        &mut self,
        response: DeltaDiscoveryResponse,
        check: impl Fn(&T) -> Result<(), &'static str>,
        apply: impl FnOnce(Delta<T>) -> Vec<Rejection>,
    ) -> DeltaDiscoveryRequest {
        let complete = !std::mem::replace(&mut self.answered, true);
        let mut rejections = Vec::new();
        let mut versions = BTreeMap::new();
        let mut upserted = Vec::with_capacity(response.resources.len());
        for resource in response.resources {
            let (name, version) = (resource.name, resource.version);
            let decoded = match resource.resource {
                Some(any) if any.type_url == response.type_url => {
                    T::decode(any.value.as_slice()).map_err(|e| e.to_string())
                }
                Some(any) => Err(format!(
                    "holds a {} where {} was expected",
                    any.type_url, response.type_url
                )),
                None => Err("has no content".to_owned()),
            };
            match decoded.and_then(|value| check(&value).map(|()| value).map_err(str::to_owned)) {
                Ok(value) => {
                    versions.insert(name.clone(), version);
                    upserted.push(Named { name, value });
                }
                Err(reason) => rejections.push(Rejection { name, reason }),
            }
        }

        let mut removed = response.removed_resources;
        if complete {
            // A name left out of `initial_resource_versions` that the server does
            // not send again is one it no longer has. It cannot say so itself: it
            // was not told that we know the name.
            let gone = self.rejected.iter().filter(|name| {
                !versions.contains_key(*name) && !rejections.iter().any(|r| r.name == **name)
            });
            removed.extend(gone.cloned());
        }
        for name in &removed {
            self.accepted.remove(name);
            self.rejected.remove(name);
        }

        rejections.extend(apply(Delta {
            removed,
            upserted,
            complete,
        }));
        for (name, version) in versions {
            self.rejected.remove(&name);
            self.accepted.insert(name, version);
        }
        for rejection in &rejections {
            self.accepted.remove(&rejection.name);
            self.rejected.insert(rejection.name.clone());
        }

        DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            error_detail: error_detail(&rejections),
            ..DeltaDiscoveryRequest::default()
        }
    }
}

fn check_address(address: &Address) -> Result<(), &'static str> {
    match address.r#type {
        Some(_) => Ok(()),
        None => Err("is neither a workload nor a service"),
    }
}

/// A NACK's detail, or `None` for an ACK.
fn error_detail(rejections: &[Rejection]) -> Option<ErrorDetail> {
    if rejections.is_empty() {
        return None;
    }
    let mut message = String::new();
    for (index, rejection) in rejections.iter().enumerate() {
        if message.len() > MAX_DETAIL_BYTES {
            message.push_str(&format!("; and {} more", rejections.len() - index));
            break;
        }
        if !message.is_empty() {
            message.push_str("; ");
        }
        message.push_str(&format!("{}: {}", rejection.name, rejection.reason));
    }
    Some(ErrorDetail {
        code: tonic::Code::InvalidArgument as i32,
        message,
    })
}

/// Enough to name several resources; the rest is in our own log.
const MAX_DETAIL_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use prost_types::Any;

    use super::*;
    use crate::proto::discovery::Resource;
    use crate::proto::workload::{Workload, address};

    #[test]
    fn good_resources_of_a_response_with_a_bad_one_are_applied() {
        let (mut session, mut seen) = (started(), Recorder::default());
        let bad = Resource {
            name: "bad".into(),
            resource: Some(any(vec![0xff])),
            ..Resource::default()
        };
        let answer = session
            .respond(response(vec![workload("good", "1"), bad], &[]), &mut seen)
            .unwrap();

        assert_eq!(seen.names, ["good"]);
        assert_eq!(answer.response_nonce, "n");
        let detail = answer.error_detail.unwrap();
        assert_eq!(detail.code, 3);
        assert!(detail.message.starts_with("bad: "), "{}", detail.message);
    }

    #[test]
    fn all_good_response_is_acknowledged() {
        let (mut session, mut seen) = (started(), Recorder::default());
        let answer = session
            .respond(response(vec![workload("good", "1")], &[]), &mut seen)
            .unwrap();
        assert_eq!(answer.error_detail, None);
        assert_eq!(answer.type_url, ADDRESS_TYPE);
    }

    #[test]
    fn what_the_handler_rejects_is_nacked_and_asked_for_again() {
        let (mut session, mut seen) = (
            started(),
            Recorder {
                reject: Some("b"),
                ..Recorder::default()
            },
        );
        let answer = session
            .respond(
                response(vec![workload("a", "1"), workload("b", "1")], &[]),
                &mut seen,
            )
            .unwrap();
        assert_eq!(answer.error_detail.unwrap().message, "b: no");

        let [again, _] = session.start_stream(Node::default());
        assert_eq!(
            again.initial_resource_versions,
            [("a".to_owned(), "1".to_owned())].into()
        );
    }

    #[test]
    fn removed_resources_are_not_claimed_at_the_next_stream() {
        let (mut session, mut seen) = (started(), Recorder::default());
        session
            .respond(
                response(vec![workload("a", "1"), workload("b", "2")], &[]),
                &mut seen,
            )
            .unwrap();
        session
            .respond(response(vec![], &["a"]), &mut seen)
            .unwrap();
        assert_eq!(seen.removed, ["a"]);
        let [again, _] = session.start_stream(Node::default());
        assert_eq!(
            again.initial_resource_versions,
            [("b".to_owned(), "2".to_owned())].into()
        );
    }

    #[test]
    fn rejected_resource_that_is_gone_after_a_reconnect_is_removed() {
        let (mut session, mut seen) = (
            started(),
            Recorder {
                reject: Some("b"),
                ..Recorder::default()
            },
        );
        session
            .respond(response(vec![workload("b", "1")], &[]), &mut seen)
            .unwrap();
        session.start_stream(Node::default());
        session.respond(response(vec![], &[]), &mut seen).unwrap();
        assert_eq!(seen.removed, ["b"]);
    }

    #[test]
    fn rejected_resource_that_comes_back_after_a_reconnect_is_not_removed() {
        let (mut session, mut seen) = (
            started(),
            Recorder {
                reject: Some("b"),
                ..Recorder::default()
            },
        );
        session
            .respond(response(vec![workload("b", "1")], &[]), &mut seen)
            .unwrap();
        session.start_stream(Node::default());
        seen.reject = None;
        session
            .respond(response(vec![workload("b", "2")], &[]), &mut seen)
            .unwrap();
        assert!(seen.removed.is_empty());
    }

    #[test]
    fn only_the_first_response_of_a_stream_is_complete() {
        let (mut session, mut seen) = (started(), Recorder::default());
        session.respond(response(vec![], &[]), &mut seen).unwrap();
        session.respond(response(vec![], &[]), &mut seen).unwrap();
        session.start_stream(Node::default());
        session.respond(response(vec![], &[]), &mut seen).unwrap();
        assert_eq!(seen.complete, [true, false, true]);
    }

    #[test]
    fn content_of_another_type_is_nacked() {
        let (mut session, mut seen) = (started(), Recorder::default());
        let mut resource = workload("a", "1");
        resource.resource.as_mut().unwrap().type_url = AUTHORIZATION_TYPE.into();
        let answer = session
            .respond(response(vec![resource], &[]), &mut seen)
            .unwrap();
        assert!(
            answer
                .error_detail
                .unwrap()
                .message
                .contains("was expected")
        );
        assert!(seen.names.is_empty());
    }

    #[test]
    fn address_that_is_neither_workload_nor_service_is_nacked() {
        let (mut session, mut seen) = (started(), Recorder::default());
        let empty = Resource {
            name: "a".into(),
            resource: Some(any(vec![])),
            ..Resource::default()
        };
        let answer = session
            .respond(response(vec![empty], &[]), &mut seen)
            .unwrap();
        assert_eq!(
            answer.error_detail.unwrap().message,
            "a: is neither a workload nor a service"
        );
    }

    #[test]
    fn type_that_was_not_asked_for_is_ignored() {
        let (mut session, mut seen) = (started(), Recorder::default());
        let response = DeltaDiscoveryResponse {
            type_url: "other".into(),
            ..response(vec![], &[])
        };
        assert_eq!(session.respond(response, &mut seen), None);
        assert!(seen.complete.is_empty());
    }

    #[test]
    fn detail_of_a_nack_is_bounded() {
        let many: Vec<_> = (0..10_000)
            .map(|i| Rejection {
                name: format!("name-{i}"),
                reason: "x".repeat(50),
            })
            .collect();
        let detail = error_detail(&many).unwrap();
        assert!(detail.message.len() < MAX_DETAIL_BYTES + 200);
        assert!(detail.message.ends_with("more"));
    }

    #[derive(Default)]
    struct Recorder {
        names: Vec<String>,
        removed: Vec<String>,
        complete: Vec<bool>,
        reject: Option<&'static str>,
    }

    impl Handler for Recorder {
        fn apply(&mut self, update: Update) -> Vec<Rejection> {
            let Update::Addresses(delta) = update else {
                panic!("only addresses are sent")
            };
            self.complete.push(delta.complete);
            self.removed.extend(delta.removed);
            let mut rejected = Vec::new();
            for named in delta.upserted {
                if self.reject == Some(named.name.as_str()) {
                    rejected.push(Rejection {
                        name: named.name,
                        reason: "no".into(),
                    });
                } else {
                    self.names.push(named.name);
                }
            }
            rejected
        }
    }

    fn started() -> Session {
        let mut session = Session::default();
        let [first, second] = session.start_stream(Node {
            id: "n".into(),
            ..Node::default()
        });
        assert!(first.node.is_some() && second.node.is_none());
        assert!(
            first.resource_names_subscribe.is_empty() && first.initial_resource_versions.is_empty()
        );
        session
    }

    fn any(value: Vec<u8>) -> Any {
        Any {
            type_url: ADDRESS_TYPE.into(),
            value,
        }
    }

    fn workload(name: &str, version: &str) -> Resource {
        let address = Address {
            r#type: Some(address::Type::Workload(Workload {
                uid: name.into(),
                ..Workload::default()
            })),
        };
        Resource {
            name: name.into(),
            version: version.into(),
            resource: Some(any(address.encode_to_vec())),
            ..Resource::default()
        }
    }

    fn response(resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            resources,
            removed_resources: removed.iter().map(|s| (*s).to_owned()).collect(),
            type_url: ADDRESS_TYPE.into(),
            nonce: "n".into(),
            ..DeltaDiscoveryResponse::default()
        }
    }
}
