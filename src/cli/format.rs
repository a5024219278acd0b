//! Numbers, sizes and times as people write and read them.

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use nats_lane::parse_duration;

/// `1,234,567`
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// `1 message`, `2 messages`
pub(super) fn counted(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {what}{plural}", count(number))
}

/// `512 B`, `1.5 MiB`
pub(super) fn bytes(number: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if number < 1024 {
        return format!("{number} B");
    }
    let mut size = number as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next().unwrap_or(&"KiB");
    while size >= 1024.0
        && let Some(next) = units.next()
    {
        size /= 1024.0;
        unit = next;
    }
    format!("{size:.1} {unit}")
}

/// `0s`, `350ms`, `12.3s`, `5m12s`, `3h5m`, `12d4h`
pub(super) fn seconds(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        _ if seconds < 0.0005 => "0s".to_owned(),
        0 => format!("{:.0}ms", seconds * 1000.0),
        1..60 => format!("{seconds:.1}s"),
        60..3600 => format!("{}m{}s", whole / 60, whole % 60),
        3600..86400 => format!("{}h{}m", whole / 3600, whole / 60 % 60),
        _ => format!("{}d{}h", whole / 86400, whole / 3600 % 24),
    }
}

/// A point in time, to the millisecond.
pub(super) fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// Parses a point in time: RFC 3339, or how long ago.
pub(super) fn parse_time(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.to_utc());
    }
    let ago = parse_duration(text).map_err(|error| {
        format!("neither a time such as `2026-01-31T12:00:00Z` nor how long ago, such as `90m` (it {error})")
    })?;
    before(Utc::now(), ago).ok_or_else(|| "too long ago".to_owned())
}

/// A point in time, or how long ago it was by the clock of the source server.
#[derive(Debug, Clone)]
pub(super) enum When {
    At(DateTime<Utc>),
    /// A duration as it was written.
    Ago(String),
}

/// Parses a point in time as [`parse_time`] does, but leaves it to the service to compute when some time ago was.
pub(super) fn parse_when(text: &str) -> Result<When, String> {
    let time = parse_time(text)?;
    let ago = parse_duration(text).is_ok();
    Ok(if ago { When::Ago(text.to_owned()) } else { When::At(time) })
}

fn before(now: DateTime<Utc>, ago: Duration) -> Option<DateTime<Utc>> {
    now.checked_sub_signed(TimeDelta::from_std(ago).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        for (number, expect) in [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")] {
            assert_eq!(count(number), expect);
        }
        assert_eq!(counted(1, "message"), "1 message");
        assert_eq!(counted(0, "message"), "0 messages");
        for (number, expect) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (u64::MAX, "16384.0 PiB")] {
            assert_eq!(bytes(number), expect);
        }
    }

    #[test]
    fn durations_are_readable() {
        for (number, expect) in [
            (-1.0, "0s"),
            (0.0, "0s"),
            (0.35, "350ms"),
            (12.34, "12.3s"),
            (312.0, "5m12s"),
            (11_100.0, "3h5m"),
            (1_051_200.0, "12d4h"),
        ] {
            assert_eq!(seconds(number), expect);
        }
    }

    #[test]
    fn a_time_is_a_point_or_how_long_ago() {
        assert_eq!(time(parse_time("2026-01-31T12:00:00.5+01:00").unwrap()), "2026-01-31T11:00:00.500Z");
        let ago = Utc::now() - parse_time("1h30m").unwrap();
        assert!((ago - TimeDelta::minutes(90)).abs() < TimeDelta::seconds(10), "{ago}");
        assert!(parse_time("100Y").is_ok());
        for wrong in ["", "yesterday", "-1h", "0s", "101Y", "2026-02-30T00:00:00Z", "99999999999999999999d", "\u{e9}d"]
        {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
