//! Reason codes of `REFUSED` and `RESET`, and their stable names.

use std::fmt;

macro_rules! reasons {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal, $label:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
            /// A code this version has no name for.
            Other(u16),
        }

        impl $name {
            pub const fn code(self) -> u16 {
                match self {
                    $(Self::$variant => $code,)*
                    Self::Other(code) => code,
                }
            }

            pub const fn from_code(code: u16) -> Self {
                match code {
                    $($code => Self::$variant,)*
                    other => Self::Other(other),
                }
            }

            /// Stable name for logs, metrics and status.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $label,)*
                    Self::Other(_) => "other",
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    Self::Other(code) => write!(f, "other({code})"),
                    known => f.write_str(known.as_str()),
                }
            }
        }
    };
}

reasons! {
    /// Why a server did not open a stream.
    RefuseReason {
        PolicyDenied = 1, "policy-denied";
        /// The destination is not an address of a workload behind this server.
        NotLocal = 2, "not-local";
        /// The original source is not an address of the peer's workload.
        SourceForged = 3, "source-forged";
        /// The destination is one of the agent's own ports.
        AgentPort = 4, "agent-port";
        /// The application refused the connection (RST to our SYN).
        ConnectionRefused = 5, "connection-refused";
        /// No answer from the application in time.
        ConnectTimeout = 6, "connect-timeout";
        /// No route, or another failure of the last hop.
        Unreachable = 7, "unreachable";
        ShuttingDown = 8, "shutting-down";
        Overloaded = 9, "overloaded";
        Internal = 10, "internal";
        /// The client's certificate has expired since the handshake: dial anew.
        CertificateExpired = 11, "certificate-expired";
        /// The client's certificate was revoked.
        CertificateRevoked = 12, "certificate-revoked";
    }
}

reasons! {
    /// Why a stream was cut.
    ResetReason {
        /// The application on the sender's side sent RST or vanished.
        AppReset = 1, "app-reset";
        /// Policy no longer admits the stream.
        PolicyChanged = 2, "policy-changed";
        /// The sender's agent is stopping.
        ShuttingDown = 3, "shutting-down";
        /// The tunnel reached its record limit.
        RecordLimit = 4, "record-limit";
        /// A protocol rule was broken.
        Protocol = 5, "protocol";
        /// The workload was removed.
        WorkloadGone = 6, "workload-gone";
        Internal = 7, "internal";
        /// The certificate of one side was revoked.
        Revoked = 8, "revoked";
    }
}
