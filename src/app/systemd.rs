//! Notifications of a unit of `Type=notify`, see sd_notify(3) and sd_watchdog_enabled(3). Outside of such a unit nothing
//! happens.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use crate::http::Sources;

/// How often the state is checked.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Says that the unit has started: its settings are valid, its port is open, and it connects to the control server, however
/// long that takes. From now on the status line of the unit says what is missing, and the watchdog is fed while the process
/// is alive.
pub(super) fn start(sources: Sources) {
    notify(&[NotifyState::Ready]);
    // Fed three times in its time, so that one late check does not end the process.
    let every = sd_notify::watchdog_enabled().map_or(CHECK_EVERY, |time| (time / 3).min(CHECK_EVERY));
    tokio::spawn(async move {
        let mut checks = interval(every);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reported = None;
        loop {
            checks.tick().await;
            if sources.alive().is_ok() {
                notify(&[NotifyState::Watchdog]);
            }
            let ready = sources.ready();
            if reported.as_ref() != Some(&ready) {
                let text = ready.as_ref().map_or_else(|missing| format!("waiting: {missing}"), |()| "ready".to_owned());
                notify(&[NotifyState::Status(&text)]);
                reported = Some(ready);
            }
        }
    });
}

/// Says that the process stops, which takes up to `grace`.
pub(super) fn stopping(grace: Duration) {
    let text = format!("stopping, at most {grace:?}");
    notify(&[NotifyState::Stopping, NotifyState::Status(&text)]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("cannot notify systemd of {states:?}: {error}");
    }
}
