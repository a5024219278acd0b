//! Logins that end: a run logs in again in time where the files have a successor.

use nats_lane::{Dial, ServerRef, entropy};
use tokio::time::{Duration, Instant};

/// A run logs in again this long before its login ends, if the files have a newer one by then.
const AHEAD_SECS: i64 = 30;
/// How often the files are read while they have none.
const EVERY: Duration = Duration::from_secs(1);

/// When the files were read last.
#[derive(Debug, Default)]
pub(crate) struct LoginWatch {
    next: Option<Instant>,
}

impl LoginWatch {
    /// Whether one of these logins is about to end, and the files have a newer one. `sides`: when the login of a connection
    /// ends, in seconds since the Unix epoch, and the server that it is to.
    pub(crate) fn has_newer(&mut self, dial: &dyn Dial, sides: &[(Option<i64>, &ServerRef)], now: Instant) -> bool {
        let soon = entropy::now().timestamp() + AHEAD_SECS;
        let mut ending =
            sides.iter().filter_map(|(ends, server)| Some(((*ends)?, server))).filter(|(at, _)| *at <= soon);
        if ending.clone().next().is_none() || self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.next = Some(now + EVERY);
        ending.any(|(at, server)| dial.login_expires(server) > Some(at))
    }
}
