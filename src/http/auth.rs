//! The login of the monitor: one user, and a bcrypt hash of the password.

use std::{fmt, str::FromStr, sync::Mutex, sync::PoisonError, time::Duration};

use axum::http::HeaderValue;
use base64::{Engine, prelude::BASE64_STANDARD};
use bcrypt::HashParts;
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};

/// A hash that costs more would take seconds of a core for each login: 2 to the power of this rounds.
const HIGHEST_COST: u32 = 14;
/// Passwords that cannot be checked within this are not checked: each takes a core for a tenth of a second.
const WAIT: Duration = Duration::from_secs(2);
/// Bytes of a header that is checked.
const LONGEST: usize = 1_024;

/// Who may see the monitor: `user:hash`.
#[derive(Clone, PartialEq, Eq)]
pub struct MonitorAuth {
    user: String,
    hash: String,
}

impl fmt::Debug for MonitorAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MonitorAuth({:?})", self.user)
    }
}

impl FromStr for MonitorAuth {
    type Err = String;

    /// An error does not quote the hash.
    fn from_str(text: &str) -> Result<Self, String> {
        const HOW: &str = "make one with `htpasswd -nB USER` or `nats server passwd`";
        let Some((user, hash)) = text.split_once(':').filter(|(user, _)| !user.is_empty()) else {
            return Err(format!("it must be `USER:HASH` with a bcrypt hash: {HOW}"));
        };
        if user.chars().any(char::is_control) {
            return Err("the user has characters that cannot be typed".to_owned());
        }
        let parts: HashParts = hash
            .parse()
            .map_err(|_| format!("what is after `{user}:` is not a bcrypt hash such as `$2a$11$...`: {HOW}"))?;
        match parts.get_cost() {
            cost @ 4..=HIGHEST_COST => {
                let _ = cost;
                Ok(Self { user: user.to_owned(), hash: hash.to_owned() })
            }
            cost => Err(format!("the cost of the hash is {cost}; it must be from 4 to {HIGHEST_COST}")),
        }
    }
}

/// Whether a request may be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// It may.
    Granted,
    /// Without a login, or with a wrong one.
    Refused,
    /// Too many passwords are being checked.
    Busy,
}

/// Checks logins, one at a time, and remembers the last that was right: a browser and Prometheus send theirs with each request.
#[derive(Debug)]
pub(super) struct LoginGate {
    auth: MonitorAuth,
    known: Mutex<Option<KnownLogin>>,
    checks: Semaphore,
}

/// The header of a login that was right.
struct KnownLogin(Vec<u8>);

impl fmt::Debug for KnownLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl LoginGate {
    pub(super) fn new(auth: MonitorAuth) -> Self {
        Self { auth, known: Mutex::default(), checks: Semaphore::new(1) }
    }

    /// Judges the `Authorization` header of a request.
    pub(super) async fn admit(&self, header: Option<&HeaderValue>) -> Admission {
        let Some(header) = header.map(HeaderValue::as_bytes).filter(|header| header.len() <= LONGEST) else {
            return Admission::Refused;
        };
        if self.is_known(header) {
            return Admission::Granted;
        }
        let Some((user, password)) = credentials(header) else { return Admission::Refused };
        let Ok(Ok(_permit)) = timeout(WAIT, self.checks.acquire()).await else { return Admission::Busy };
        let hash = self.auth.hash.clone();
        // For a wrong user too: the time that it takes does not show which of both is wrong.
        let matches = spawn_blocking(move || bcrypt::verify(password, &hash).unwrap_or_default()).await;
        if !(matches.unwrap_or_default() & is_same(user.as_bytes(), self.auth.user.as_bytes())) {
            return Admission::Refused;
        }
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(KnownLogin(header.to_vec()));
        Admission::Granted
    }

    fn is_known(&self, header: &[u8]) -> bool {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().is_some_and(|known| is_same(&known.0, header))
    }
}

/// User and password of a `Basic` header.
fn credentials(header: &[u8]) -> Option<(String, Vec<u8>)> {
    let (scheme, rest) = header.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"Basic ") {
        return None;
    }
    let decoded = BASE64_STANDARD.decode(rest.trim_ascii()).ok()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    let user = String::from_utf8(decoded[..colon].to_vec()).ok()?;
    Some((user, decoded[colon + 1..].to_vec()))
}

/// Compares in a time that depends on the lengths only.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |differs, (one, other)| differs | (one ^ other)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(user: &str, password: &str) -> HeaderValue {
        let text = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")));
        HeaderValue::from_str(&text).unwrap()
    }

    fn auth(password: &str) -> MonitorAuth {
        format!("ops:{}", bcrypt::hash(password, 4).unwrap()).parse().unwrap()
    }

    #[tokio::test]
    async fn only_the_right_login_is_admitted() {
        let gate = LoginGate::new(auth("s3:cret"));
        let check = async |header: Option<HeaderValue>, expect| {
            assert_eq!(gate.admit(header.as_ref()).await, expect, "{header:?}");
        };
        check(None, Admission::Refused).await;
        for _ in 0..2 {
            check(Some(header("ops", "s3:cret")), Admission::Granted).await;
            check(Some(header("ops", "s3:cre")), Admission::Refused).await;
            check(Some(header("op", "s3:cret")), Admission::Refused).await;
            check(Some(header("ops", "")), Admission::Refused).await;
        }
        for garbage in ["Basic", "Basic !", "Basic b3Bz", "Bearer b3BzOnMzOmNyZXQ=", "", "Basic \u{e4}"] {
            check(HeaderValue::from_bytes(garbage.as_bytes()).ok(), Admission::Refused).await;
        }
        check(Some(header("ops", &"x".repeat(5_000))), Admission::Refused).await;
    }

    #[tokio::test]
    async fn hashes_of_other_programs_are_taken() {
        // Of `htpasswd` and of PHP, which write another letter for the same algorithm.
        let hash = bcrypt::hash("right", 4).unwrap();
        for version in ["$2a$", "$2b$", "$2y$"] {
            let gate = LoginGate::new(format!("ops:{version}{}", &hash[4..]).parse().unwrap());
            assert_eq!(gate.admit(Some(&header("ops", "right"))).await, Admission::Granted, "{version}");
        }
    }

    #[test]
    fn a_wrong_setting_is_refused_without_its_hash() {
        let check = |text: &str, expect: &str| {
            let error = text.parse::<MonitorAuth>().unwrap_err();
            assert!(error.contains(expect) && !error.contains("hunter2"), "{error}");
        };
        check("hunter2", "`USER:HASH`");
        check(":hunter2", "`USER:HASH`");
        check("ops:hunter2", "is not a bcrypt hash");
        check("ops:", "is not a bcrypt hash");
        let costly = bcrypt::hash("x", 4).unwrap().replace("$04$", "$20$");
        check(&format!("ops:{costly}"), "the cost of the hash is 20");
        assert!(!format!("{:?}", auth("x")).contains('$'));
    }
}
