//! Durations as texts.

use std::time::Duration;

const DAY: u64 = 24 * 60 * 60;

/// Parses `1h`, `30s`, `1h30m`, `500ms`, `1d`, `1w`, `1M` (30 days), `1Y` (365 days).
///
/// Days and longer are one whole number with one unit; shorter ones are written as Go writes them, any number of
/// decimal numbers with units. Nothing is more than 100 years, and nothing is 0.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let duration = match text.chars().last() {
        Some('d') => days(text, 1)?,
        Some('w') => days(text, 7)?,
        Some('M') => days(text, 30)?,
        Some('Y') => days(text, 365)?,
        _ => clock(text)?,
    };
    if duration.is_zero() {
        return Err("must be more than 0".to_owned());
    }
    if duration > Duration::from_secs(100 * 365 * DAY) {
        return Err("must not be more than 100 years".to_owned());
    }
    Ok(duration)
}

/// One number and one unit of whole days.
fn days(text: &str, unit: u64) -> Result<Duration, String> {
    let number = &text[..text.len() - 1];
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(not_a_duration());
    }
    let number: u64 = number.parse().map_err(|_| not_a_duration())?;
    let seconds = number.checked_mul(unit * DAY).ok_or("must not be more than 100 years")?;
    Ok(Duration::from_secs(seconds))
}

/// A sequence of decimal numbers with units, such as `1h30m` or `1.5s`.
fn clock(text: &str) -> Result<Duration, String> {
    if text.starts_with('-') {
        return Err("must be more than 0".to_owned());
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(not_a_duration());
    }
    let mut nanoseconds: u128 = 0;
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(not_a_duration)?;
        let (number, tail) = rest.split_at(unit_at);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        nanoseconds = nanoseconds.saturating_add(decimal(number)?.saturating_mul(nanoseconds_of(unit)?) / NANO);
        rest = tail;
    }
    let nanoseconds = u64::try_from(nanoseconds).map_err(|_| "must not be more than 100 years")?;
    Ok(Duration::from_nanos(nanoseconds))
}

const NANO: u128 = 1_000_000_000;

/// A decimal number in billionths; digits beyond those do not count.
fn decimal(number: &str) -> Result<u128, String> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !digits(whole) || !digits(fraction) {
        return Err(not_a_duration());
    }
    let fraction = format!("{:0<9.9}", fraction);
    let whole: u128 = format!("0{whole}").parse().map_err(|_| not_a_duration())?;
    let fraction: u128 = fraction.parse().map_err(|_| not_a_duration())?;
    Ok(whole.saturating_mul(NANO).saturating_add(fraction))
}

fn nanoseconds_of(unit: &str) -> Result<u128, String> {
    Ok(match unit {
        "ns" => 1,
        "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
        "ms" => 1_000_000,
        "s" => NANO,
        "m" => 60 * NANO,
        "h" => 3_600 * NANO,
        _ => return Err(not_a_duration()),
    })
}

fn not_a_duration() -> String {
    "is not a duration such as `500ms`, `30s`, `1h30m`, `1d`, `1w`, `1M` or `1Y`".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let check = |text: &str, milliseconds: u64| {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        };
        check("500ms", 500);
        check("30s", 30_000);
        check("1h", 3_600_000);
        check("1h30m", 5_400_000);
        check("1.5s", 1_500);
        check(".5s", 500);
        check("1.s", 1_000);
        check("+2m", 120_000);
        check("1h0m1s", 3_601_000);
        check("1000000us", 1_000);
        check("1d", 86_400_000);
        check("2w", 14 * 86_400_000);
        check("1M", 30 * 86_400_000);
        check("1Y", 365 * 86_400_000);
    }

    #[test]
    fn refused() {
        let check = |text: &str, expect: &str| {
            let error = parse_duration(text).unwrap_err();
            assert!(error.contains(expect), "{text}: {error}");
        };
        for text in
            ["", "5", "1x", "d", "1h 30m", "1.2.3s", ".s", "1.5d", "1d12h", "+1d", "1D", "s", "\u{1f600}", "5\u{e9}"]
        {
            check(text, "is not a duration");
        }
        for text in ["0", "-", "0s", "0d", "-1s", "0h0m", "0.0000000001ns"] {
            check(text, "more than 0");
        }
        for text in ["101Y", "99999999999999999999999999999999999999999999h", "9999999999999999999d", "876001h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
