//! Which node is calling: bearer tokens.

use ring::hmac;
use tonic::metadata::MetadataMap;
use zeroize::Zeroizing;

use crate::config::Node;

/// The tokens of all nodes, not readable any more: only tags under a key of
/// this process are kept, and comparing tags of a secret key leaks nothing
/// about the token through time.
#[derive(Clone)]
pub(crate) struct Tokens {
    key: hmac::Key,
    nodes: Vec<(String, hmac::Tag)>,
}

/// Why a caller is not known. For the log: the caller is told nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AuthError {
    #[error("no authorization header")]
    Missing,
    #[error("the authorization header is not `Bearer <token>`")]
    NotBearer,
    #[error("the token is not a known node's")]
    Unknown,
    #[error("the clusterid header names another cluster")]
    OtherCluster,
}

/// A caller that has proved to be a node.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) node: String,
    tag: hmac::Tag,
}

/// Makes [`Tokens`] that can be compared across reloads.
pub(crate) struct TokenHasher(hmac::Key);

impl TokenHasher {
    pub(crate) fn new() -> Self {
        let secret = Zeroizing::new(rand::random::<[u8; 32]>());
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret.as_slice()))
    }

    pub(crate) fn tokens(&self, nodes: &[Node]) -> Tokens {
        let tagged = nodes.iter().map(|node| {
            (
                node.name.clone(),
                hmac::sign(&self.0, node.token.as_bytes()),
            )
        });
        Tokens {
            key: self.0.clone(),
            nodes: tagged.collect(),
        }
    }
}

impl Tokens {
    pub(crate) fn authenticate(&self, metadata: &MetadataMap) -> Result<Caller, AuthError> {
        let header = metadata.get("authorization").ok_or(AuthError::Missing)?;
        let token = header
            .to_str()
            .ok()
            .and_then(|text| text.strip_prefix("Bearer "))
            .ok_or(AuthError::NotBearer)?;
        let tag = hmac::sign(&self.key, token.as_bytes());
        let node = self
            .nodes
            .iter()
            .find(|(_, known)| known.as_ref() == tag.as_ref());
        let (node, _) = node.ok_or(AuthError::Unknown)?;
        Ok(Caller {
            node: node.clone(),
            tag,
        })
    }

    /// Is the token that this caller came with still its node's?
    pub(crate) fn admits(&self, caller: &Caller) -> bool {
        self.nodes
            .iter()
            .any(|(name, tag)| *name == caller.node && tag.as_ref() == caller.tag.as_ref())
    }
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens")
            .field("nodes", &self.nodes.len())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for TokenHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenHasher")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn token_of_a_node_is_that_node_and_any_other_header_is_nobody() {
        let tokens = tokens(&[("a", "token-a"), ("b", "token-b")]);
        assert_eq!(
            tokens.authenticate(&header("Bearer token-b")).unwrap().node,
            "b"
        );
        for (text, expected) in [
            ("Bearer token-c", AuthError::Unknown),
            ("Bearer token-a ", AuthError::Unknown),
            ("Bearer ", AuthError::Unknown),
            ("Basic token-a", AuthError::NotBearer),
            ("token-a", AuthError::NotBearer),
        ] {
            assert_eq!(
                tokens.authenticate(&header(text)).unwrap_err(),
                expected,
                "{text}"
            );
        }
        assert_eq!(
            tokens.authenticate(&MetadataMap::new()).unwrap_err(),
            AuthError::Missing
        );
    }

    #[test]
    fn caller_is_no_longer_admitted_when_its_token_was_replaced() {
        let hasher = TokenHasher::new();
        let before = hasher.tokens(&[node("a", "old")]);
        let caller = before.authenticate(&header("Bearer old")).unwrap();
        assert!(before.admits(&caller));
        assert!(!hasher.tokens(&[node("a", "new")]).admits(&caller));
        assert!(!hasher.tokens(&[node("b", "old")]).admits(&caller));
    }

    fn tokens(nodes: &[(&str, &str)]) -> Tokens {
        TokenHasher::new().tokens(
            &nodes
                .iter()
                .map(|(name, token)| node(name, token))
                .collect::<Vec<_>>(),
        )
    }

    fn node(name: &str, token: &str) -> Node {
        Node {
            name: name.into(),
            token: Zeroizing::new(token.into()),
            token_file: "".into(),
        }
    }

    fn header(text: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert("authorization", text.parse().unwrap());
        metadata
    }
}
