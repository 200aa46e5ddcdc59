use std::path::PathBuf;

/// Why there is no stream to the control plane at the moment.
///
/// Every variant is retried: files appear, servers come back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    // The operator's to fix.
    #[error("control plane address `{address}` is not https://host:port: {reason}")]
    Address { address: String, reason: String },
    #[error("cannot read the {what} {}: {source}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the {what} {} is empty or cannot be sent in a header", path.display())]
    Unusable { what: &'static str, path: PathBuf },
    #[error("the cluster id `{0}` cannot be sent in a header")]
    ClusterId(String),

    // The network's, or the server is down.
    #[error("cannot connect to {address}: {reason}")]
    Unreachable { address: String, reason: String },
    #[error("no answer from {address} within {seconds} s")]
    Timeout { address: String, seconds: u64 },

    // The server's answer.
    #[error("the control plane ended the stream: {code:?}: {message}")]
    Refused { code: tonic::Code, message: String },
    #[error("the control plane closed the stream")]
    Closed,
}

/// The whole chain of causes in one line; transport errors say little without it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
