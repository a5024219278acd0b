//! A login that a server refuses is held until it is corrected. But the login of a link is changed at two places, the
//! server and the link, and one of them comes first. So for a moment the replications of a link only try again. Pure.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    config::Replication,
    copy::{Error, ErrorKind},
};

/// How long after the first refusal.
const GRACE: Duration = Duration::from_secs(60);

/// Since when a login is refused.
#[derive(Debug, Default)]
pub(super) struct LoginGrace(Option<Instant>);

impl LoginGrace {
    /// What an error of an attempt means that began at `begun`.
    pub(super) fn judge(&mut self, mut error: Error, replication: &Replication, begun: Instant) -> Error {
        if !error.login_refused || !replication.linked {
            self.0 = None;
            return error;
        }
        let since = *self.0.get_or_insert(begun);
        if begun.saturating_duration_since(since) < GRACE {
            error.kind = ErrorKind::Retry;
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config;

    #[test]
    fn a_refused_login_of_a_link_is_tried_again_for_a_moment() {
        let document = json!({"stream": "S", "source_url": "a", "target_url": "b"});
        let single = config::parse_value(&document, "SITE").unwrap();
        let linked = Replication { linked: true, ..single.clone() };
        let refused = || {
            let mut error = Error::new(ErrorKind::Hold, "no");
            error.login_refused = true;
            error
        };
        let start = Instant::now();
        let mut grace = LoginGrace::default();
        let mut check = |error: Error, replication: &Replication, seconds: u64, expect: ErrorKind| {
            let judged = grace.judge(error, replication, start + Duration::from_secs(seconds));
            assert_eq!(judged.kind, expect, "after {seconds} s");
        };
        check(refused(), &single, 0, ErrorKind::Hold);
        check(refused(), &linked, 1, ErrorKind::Retry);
        check(refused(), &linked, 60, ErrorKind::Retry);
        check(refused(), &linked, 61, ErrorKind::Hold);
        check(Error::new(ErrorKind::Hold, "full"), &linked, 70, ErrorKind::Hold);
        check(refused(), &linked, 80, ErrorKind::Retry);
    }
}
