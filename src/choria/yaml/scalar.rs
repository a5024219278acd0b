//! What scalars mean: YAML 1.1 as the Go program reads it, and every form of duration that it takes.

use std::time::Duration;

use nats_lane::parse_duration;

/// A scalar without quotes.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum PlainScalar {
    /// Empty, `~` or `null`.
    Nothing,
    /// `yes`, `off`, `true` and so on.
    Truth(bool),
    /// A whole number.
    Whole(i128),
    /// Another number.
    Real(f64),
    /// Everything else.
    Text,
}

impl PlainScalar {
    /// Reads a scalar that is without quotes.
    pub(super) fn read(text: &str) -> Self {
        match text {
            "" | "~" | "null" | "Null" | "NULL" => return Self::Nothing,
            "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "true" | "True" | "TRUE" => {
                return Self::Truth(true);
            }
            "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" | "false" | "False" | "FALSE" => {
                return Self::Truth(false);
            }
            _ => {}
        }
        match (whole(text), real(text)) {
            (Some(number), _) => Self::Whole(number),
            (None, Some(number)) => Self::Real(number),
            (None, None) => Self::Text,
        }
    }
}

/// Decimal, `0x`, `0o`, `0b`, or octal with a leading 0; `_` between digits does not count.
fn whole(text: &str) -> Option<i128> {
    let (sign, digits) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit()) || digits.ends_with('_') {
        return None;
    }
    let digits = digits.replace('_', "");
    let (radix, digits) = match digits.get(..2) {
        Some("0x") => (16, &digits[2..]),
        Some("0o") => (8, &digits[2..]),
        Some("0b") => (2, &digits[2..]),
        Some(start) if start.starts_with('0') => (8, &digits[1..]),
        _ => (10, digits.as_str()),
    };
    let first = digits.starts_with(|c: char| c.is_ascii_hexdigit());
    i128::from_str_radix(digits, radix).ok().filter(|_| first).map(|number| sign * number)
}

fn real(text: &str) -> Option<f64> {
    match text.trim_start_matches(['-', '+']) {
        ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN" => return Some(f64::NAN),
        _ => {}
    }
    let number = text.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE_".contains(&byte));
    let some_digit = text.bytes().any(|byte| byte.is_ascii_digit());
    let outside = text.trim_start_matches(['-', '+']).starts_with('_') || text.ends_with('_');
    if number && some_digit && !outside { text.replace('_', "").parse().ok() } else { None }
}

/// A duration as the Go program takes it, as documents have it; `Ok(None)` where nothing is left of it: an empty text, 0
/// or less.
pub(super) fn duration(text: &str) -> Result<Option<String>, String> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let (negative, amount) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if let Some(days) = amount.chars().last().and_then(unit_of_days) {
        let number = &amount[..amount.len() - 1];
        let duration = days_from(number, days)?;
        let whole = !duration.is_zero() && !negative;
        return Ok(whole.then(|| if parse_duration(amount).is_ok() { amount.to_owned() } else { written(duration) }));
    }
    match parse_duration(amount) {
        Ok(_) if negative => Ok(None),
        Ok(_) => Ok(Some(amount.to_owned())),
        Err(_) if is_zero(amount) => Ok(None),
        Err(wrong) => Err(wrong),
    }
}

/// Days in a unit that the Go program has beside Go's own.
fn unit_of_days(unit: char) -> Option<u32> {
    match unit {
        'd' | 'D' => Some(1),
        'w' | 'W' => Some(7),
        'M' => Some(30),
        'y' | 'Y' => Some(365),
        _ => None,
    }
}

fn days_from(number: &str, days: u32) -> Result<Duration, String> {
    let legal = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let number = number.parse::<f64>().ok().filter(|_| legal);
    let seconds =
        number.ok_or("is not a duration such as `90s`, `1h30m`, `1.5d` or `1w`")? * f64::from(days) * 86_400.0;
    if seconds > 100.0 * 365.0 * 86_400.0 {
        return Err("must not be more than 100 years".to_owned());
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| "is not a duration".to_owned())
}

fn written(duration: Duration) -> String {
    match duration.subsec_nanos() {
        0 => format!("{}s", duration.as_secs()),
        _ => format!("{}ns", duration.as_nanos()),
    }
}

/// `0s`, `0h0m` or `0`.
fn is_zero(amount: &str) -> bool {
    let digits = amount.bytes().filter(u8::is_ascii_digit);
    let units = amount.replace(|c: char| c.is_ascii_digit() || c == '.', " ");
    amount.starts_with('0')
        && digits.clone().all(|digit| digit == b'0')
        && units.split_whitespace().all(|unit| ["h", "m", "s", "ms", "us", "µs", "ns"].contains(&unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_duration_that_the_go_program_takes() {
        let ok = |text: &str, expect: Option<&str>| {
            let read = duration(text).unwrap_or_else(|wrong| panic!("{text}: {wrong}"));
            assert_eq!(read.as_deref(), expect, "{text}");
            if let Some(read) = read {
                assert!(parse_duration(&read).is_ok(), "{text}: {read}");
            }
        };
        for (text, expect) in [
            ("1h", "1h"),
            ("1h30m", "1h30m"),
            ("500us", "500us"),
            (".5h", ".5h"),
            (" 1h ", "1h"),
            ("1w", "1w"),
            ("1W", "604800s"),
            ("1D", "86400s"),
            ("1d", "1d"),
            ("1y", "31536000s"),
            ("1Y", "1Y"),
            ("1M", "1M"),
            ("1.5d", "129600s"),
            ("0.5w", "302400s"),
        ] {
            ok(text, Some(expect));
        }
        for nothing in ["", "  ", "-1h", "0s", "-1d", "0d", "0"] {
            ok(nothing, None);
        }
        for wrong in ["1H", "90S", "1d12h", "1w2d", "10", "h", "1 h", "1.5.2d", "200Y", "x"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn plain_scalars_are_those_of_yaml_1_1() {
        let check = |text: &str, expect: PlainScalar| assert_eq!(PlainScalar::read(text), expect, "{text}");
        for (text, number) in
            [("0x1F", 31), ("1_000", 1000), ("017", 15), ("-1", -1), ("0", 0), ("0o17", 15), ("+5", 5)]
        {
            check(text, PlainScalar::Whole(number));
        }
        for text in ["yes", "On", "TRUE", "y"] {
            check(text, PlainScalar::Truth(true));
        }
        for text in ["NO", "off", "False"] {
            check(text, PlainScalar::Truth(false));
        }
        for text in ["1024.5", "1e3", "-.5"] {
            assert!(matches!(PlainScalar::read(text), PlainScalar::Real(_)), "{text}");
        }
        for text in ["~", "", "null"] {
            check(text, PlainScalar::Nothing);
        }
        for text in ["US-EAST", "1h", "2020-05-01T06:30:00+02:00", "0xZZ", "_1", "1__", "tRue", "-", "e", "0x"] {
            check(text, PlainScalar::Text);
        }
    }
}
