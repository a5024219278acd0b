//! What each kind of refusal is, in one table: transient, or permanent until an operator acts, and then what ends it.
//! Pure. A refusal is judged by what it says, whichever call or connection it came from.

use std::io;

use crate::{ApiError, Error, ErrorKind, error::excerpt};

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// What the caller can do.
    pub(crate) kind: ErrorKind,
    /// What an operator can do; empty where nothing has to be done, or where the text says it already.
    pub(crate) remedy: &'static str,
}

const fn retry() -> Refusal {
    Refusal { kind: ErrorKind::Retry, remedy: "" }
}

const fn hold(remedy: &'static str) -> Refusal {
    Refusal { kind: ErrorKind::Hold, remedy }
}

const fn plain(kind: ErrorKind) -> Refusal {
    Refusal { kind, remedy: "" }
}

const ACCOUNT_STORAGE: &str = "raise the JetStream limits of the account, or let its streams hold less";
const SERVER_STORAGE: &str = "give the server more room (`max_file_store`, `max_memory_store`, its disk), or let its \
                              streams hold less";
const CONSUMERS: &str = "remove consumers that are not needed, or raise `max_consumers` of the stream or the account";
const CONSUMER_LIMITS: &str = "raise `consumer_limits` of the stream, or the limits of the account";
const OLDER_SERVER: &str = "start its server in the version that wrote it, or a later one";
const STREAM_BYTES: &str = "create the stream by hand with a `max_bytes` that the account allows, or raise the \
                            limits of the account";

/// An error of the JetStream API, or the refusal of a message. The codes are those of the server's `errors.json`.
pub(crate) fn api(error: &ApiError) -> Refusal {
    let says = |text: &str| error.description.contains(text);
    match error.err_code {
        10014 | 10037 | 10059 => plain(ErrorKind::NotFound),
        // With and without the sequence in the text.
        10071 | 10164 => plain(ErrorKind::ChainBroken),
        // Errors of the store share one code. "maximum messages per subject exceeded" is about one message, "maximum
        // messages exceeded" about the stream, and others pass.
        10077 if says("per subject") => plain(ErrorKind::Poison),
        10077 if says("maximum") => hold("raise the limits of the stream, or remove messages from it"),
        10077 if says("no space left") => hold(SERVER_STORAGE),
        // Sealed, not the stream that was expected (a second stream takes the subject), no JetStream for this account.
        10109 | 10060 | 10039 | 10076 | 10120 => hold(""),
        // Message or headers too large, a header that this stream does not take.
        10054 | 10097 | 10111 | 10165 | 10166 | 10168 | 10188 | 10212 | 10227 => plain(ErrorKind::Poison),
        10002 => hold(ACCOUNT_STORAGE),
        10023 | 10028 | 10047 => hold(SERVER_STORAGE),
        10026 => hold(CONSUMERS),
        10027 => hold("remove streams that are not needed, or raise the limit of streams of the account"),
        10113 => hold(STREAM_BYTES),
        10122 => hold(STREAM_BYTES),
        // Written by a later version. Without that word it is offline for a moment.
        10194 | 10195 if says("unsupported") => hold(OLDER_SERVER),
        10121 | 10125 | 10126 | 10153 => hold(CONSUMER_LIMITS),
        _ if error.code == 403 || error.code == 401 => hold(""),
        _ => retry(),
    }
}

/// The texts of `-ERR` lines (`server/errors.go`), in lower case. `let_in`: the connection was in use already. Then the
/// end of a login may only mean that credentials were rotated; the next login reads them again and shows the truth.
pub(crate) fn err_line(text: &str, let_in: bool) -> Refusal {
    let lower = text.to_ascii_lowercase();
    let says = |part: &str| lower.contains(part);
    if says("permissions violation") {
        hold("")
    } else if says("authentication timeout") {
        // A busy server or a slow network, not the credentials.
        retry()
    } else if ends_login(text) {
        if let_in { retry() } else { hold("") }
    } else if says("maximum subscriptions exceeded") {
        hold("raise the limit of subscriptions (`max_subscriptions`) of the server, the account or the user")
    } else if says("maximum connections exceeded") {
        hold("raise `max_connections` of the server, or close connections that are not needed")
    } else if says("maximum account active connections exceeded") {
        hold("raise the limit of connections of the account, or close connections that are not needed")
    } else if says("maximum control line exceeded") {
        hold("raise `max_control_line` of the server")
    } else if says("attempted to connect to") {
        hold("name the port for clients")
    } else {
        retry()
    }
}

/// Whether the text of an `-ERR` line is the refusal, or the end, of a login.
pub(crate) fn ends_login(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    let says = |part: &str| lower.contains(part);
    let of_login = says("authorization") || says("authentication") || says("expired") || says("revoked");
    of_login && !says("authentication timeout") && !says("permissions violation")
}

/// A failed TLS handshake: a certificate or a key that does not fit stays so, a connection that broke does not.
pub(crate) fn tls(error: &io::Error) -> Refusal {
    match error.kind() {
        io::ErrorKind::InvalidData => hold("check the certificates of both ends, and `ca`, `cert` and `key`"),
        _ => retry(),
    }
}

/// A status that ends a pull or a consumer, by its code and its text.
pub(crate) fn status(code: u16, text: &str) -> Refusal {
    match code {
        409 if text.contains("Exceeded Max") => {
            hold("raise the limits of the consumer's requests, or remove the consumer")
        }
        _ => retry(),
    }
}

/// Between a server and the text of its `-ERR` line.
const SAYS: &str = " says: ";

impl Error {
    /// An `-ERR` line; `let_in`: of a connection that was in use already.
    pub(crate) fn of_err_line(address: &str, text: &str, let_in: bool) -> Self {
        let verdict = err_line(text, let_in);
        Self {
            kind: verdict.kind,
            message: with_remedy(format!("`{address}`{SAYS}{}", excerpt(text)), verdict.remedy),
            api: None,
        }
    }

    /// A failed TLS handshake.
    pub(crate) fn of_tls(error: &io::Error) -> Self {
        let Refusal { kind, remedy } = tls(error);
        Self { kind, message: with_remedy(format!("TLS handshake failed: {error}"), remedy), api: None }
    }

    /// A consumer or a pull ended with a status.
    pub fn of_status(stream: &str, code: u16, text: &str) -> Self {
        let Refusal { kind, remedy } = status(code, text);
        let message = format!("consumer of stream `{stream}` ended: {code} {}", excerpt(text));
        Self { kind, message: with_remedy(message, remedy), api: None }
    }

    /// Whether a server ended the login of a connection that was in use, as it does when the login expires or is revoked.
    pub fn login_ended(&self) -> bool {
        let said = self.message.rsplit_once(SAYS).map(|(_, text)| text);
        self.kind == ErrorKind::Retry && said.is_some_and(ends_login)
    }

    /// Whether the server refused the login of a new connection.
    pub fn login_refused(&self) -> bool {
        let said = self.message.rsplit_once(SAYS).map(|(_, text)| text);
        self.kind == ErrorKind::Hold && said.is_some_and(ends_login)
    }
}

impl ApiError {
    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        api(self).kind
    }
}

impl From<ApiError> for Error {
    fn from(api: ApiError) -> Self {
        let Refusal { kind, remedy } = self::api(&api);
        let message = format!("{} ({})", excerpt(&api.description), api.err_code);
        Self { kind, message: with_remedy(message, remedy), api: Some(api) }
    }
}

fn with_remedy(message: String, remedy: &str) -> String {
    if remedy.is_empty() { message } else { format!("{message}: {remedy}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn is_api(code: u32, err_code: u32, description: &str, expect: ErrorKind) {
        let verdict = api(&ApiError { code, err_code, description: description.to_owned() });
        assert_eq!(verdict.kind, expect, "{err_code} {description}");
    }

    #[test]
    fn refusals_of_the_api_by_what_they_are() {
        // An id whose message is in flight, too many open batches, a batch that was forgotten, an election.
        for err_code in [10158, 10211, 10208, 10008, 10009] {
            is_api(503, err_code, "", ErrorKind::Retry);
        }
        for (err_code, description) in [
            (10002, "resource limits exceeded for account"),
            (10047, "insufficient storage resources available"),
            (10028, "insufficient memory resources available"),
            (10023, "insufficient resources"),
            (10194, "stream is offline: unsupported - required API level: 2, current API level: 1"),
            (10195, "consumer is offline: unsupported - config error: unknown field \"x\""),
            (10026, "maximum consumers limit reached"),
            (10027, "maximum number of streams reached"),
            (10113, "account requires a stream config to have max bytes set"),
            (10121, "consumer max ack pending exceeds system limit of 100"),
            (10153, "consumer inactive threshold exceeds system limit of 5s"),
            (10077, "maximum bytes exceeded"),
            (10077, "write x.blk: no space left on device"),
            (10060, "expected stream does not match"),
            (10109, "invalid operation on sealed stream"),
        ] {
            is_api(400, err_code, description, ErrorKind::Hold);
        }
        is_api(503, 10077, "maximum messages per subject exceeded", ErrorKind::Poison);
        is_api(503, 10077, "stream store EOF", ErrorKind::Retry);
        is_api(500, 10194, "stream is offline: stopped", ErrorKind::Retry);
        is_api(400, 10071, "wrong last sequence: 5", ErrorKind::ChainBroken);
        is_api(404, 10059, "stream not found", ErrorKind::NotFound);
        is_api(403, 1, "", ErrorKind::Hold);
    }

    #[test]
    fn err_lines_by_what_they_are() {
        let check = |text: &str, at_login: ErrorKind, later: ErrorKind| {
            let kinds = (err_line(text, false).kind, err_line(text, true).kind);
            assert_eq!(kinds, (at_login, later), "{text}");
        };
        use ErrorKind::{Hold, Retry};
        check("Authorization Violation", Hold, Retry);
        check("User Authentication Expired", Hold, Retry);
        check("User Authentication Revoked", Hold, Retry);
        check("Account Authentication Expired", Hold, Retry);
        check("Authentication Timeout", Retry, Retry);
        check("Permissions Violation for Publish to \"a\"", Hold, Hold);
        check("maximum subscriptions exceeded", Hold, Hold);
        check("maximum connections exceeded", Hold, Hold);
        check("maximum account active connections exceeded", Hold, Hold);
        check("Maximum Control Line Exceeded", Hold, Hold);
        check("Attempted To Connect To Leaf Node Port", Hold, Hold);
        check("Stale Connection", Retry, Retry);
        check("Server Shutdown", Retry, Retry);
    }

    #[test]
    fn statuses_and_handshakes_by_what_they_are() {
        assert_eq!(status(409, "Exceeded MaxRequestBatch of 10").kind, ErrorKind::Hold);
        for (code, text) in [(409, "Consumer Deleted"), (409, "Leadership Change"), (503, ""), (408, "Timeout")] {
            assert_eq!(status(code, text).kind, ErrorKind::Retry, "{text}");
        }
        assert_eq!(tls(&io::Error::new(io::ErrorKind::InvalidData, "UnknownIssuer")).kind, ErrorKind::Hold);
        assert_eq!(tls(&io::Error::from(io::ErrorKind::ConnectionReset)).kind, ErrorKind::Retry);
        assert_eq!(tls(&io::Error::from(io::ErrorKind::UnexpectedEof)).kind, ErrorKind::Retry);
    }

    #[test]
    fn what_an_operator_has_to_end_says_how() {
        for err_code in [10002, 10023, 10026, 10027, 10028, 10047, 10113, 10121, 10122, 10153] {
            let verdict = api(&ApiError { code: 400, err_code, description: String::new() });
            assert!(!verdict.remedy.is_empty(), "{err_code}");
        }
        let told = Error::from(ApiError { code: 400, err_code: 10026, description: "full".to_owned() });
        assert!(told.message.starts_with("full (10026): remove consumers"), "{told}");
    }

    #[test]
    fn the_end_of_a_login_is_told_from_other_refusals() {
        let error = |text: &str, let_in| Error::of_err_line("expired:4222", text, let_in).context("source");
        let ended = |text: &str, let_in| error(text, let_in).login_ended();
        let refused = |text: &str, let_in| error(text, let_in).login_refused();
        for text in ["Authorization Violation", "User Authentication Expired"] {
            assert!(refused(text, false) && !refused(text, true), "{text}");
        }
        assert!(!refused("maximum connections exceeded", false) && !refused("Authentication Timeout", false));
        for text in ["User Authentication Expired", "User Authentication Revoked", "Account Authentication Expired"] {
            assert!(ended(text, true) && !ended(text, false), "{text}");
        }
        for text in ["Authentication Timeout", "Stale Connection", "Permissions Violation for Publish to \"expired\""] {
            assert!(!ended(text, true) && !ended(text, false), "{text}");
        }
    }

    #[test]
    fn what_passes_is_tried_again() {
        let check = |err_code, expect| {
            let error = ApiError { code: 400, err_code, description: String::new() };
            assert_eq!(error.kind(), expect, "{err_code}");
        };
        // An id whose message is still on its way, too many open batches, a batch that was forgotten.
        for err_code in [10158, 10211, 10208] {
            check(err_code, ErrorKind::Retry);
        }
        check(10071, ErrorKind::ChainBroken);
        check(10060, ErrorKind::Hold);
    }
}
