//! How both streams are compared.

use std::{fmt, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parts of a whole that are counted.
const MILLION: u64 = 1_000_000;

/// A part of all messages, in millionths: more than none, at most all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplePart(u32);

/// How much of both streams a comparison reads, and how fast, as it is written: in a document, a request and a mark.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyEffort {
    /// Part of the messages to compare, such as `1%`; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<String>,
    /// Messages of the source that are read in a second, at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
}

/// Which messages are compared by request, and what follows; as it is written, in a request and a mark.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyRange {
    /// First source sequence to compare; the first one of the source by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
    /// Last source sequence to compare; all that are settled by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u64>,
    /// Copy what is missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repair: bool,
}

/// When a replication compares both streams by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifySchedule {
    /// From the end of one comparison to the next.
    pub every: Duration,
    /// Part of the messages that is compared; `None` for all.
    pub sample: Option<SamplePart>,
    /// Messages of the source that are read in a second, at most.
    pub rate: Option<u64>,
}

impl SamplePart {
    /// Reads a percentage such as `1%` or `0.5%`. The error says what is possible.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "is no percentage from `0.0001%` to `100%`, such as `1%`";
        let number = text.trim().strip_suffix('%').ok_or(WRONG)?.trim_end();
        if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            return Err(WRONG);
        }
        let percent: f64 = number.parse().map_err(|_| WRONG)?;
        let parts = (percent * 10_000.0).round();
        if !(1.0..=MILLION as f64).contains(&parts) {
            return Err(WRONG);
        }
        Ok(Self(parts as u32))
    }

    /// How many of so many messages these are, at least one.
    pub fn of(self, messages: u64) -> u64 {
        let part = u128::from(messages) * u128::from(self.0) / u128::from(MILLION);
        u64::try_from(part).unwrap_or(messages).max(1)
    }
}

impl fmt::Display for SamplePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", f64::from(self.0) / 10_000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_a_percentage() {
        for (text, shown, of) in
            [("1%", "1%", 10), ("0.5%", "0.5%", 5), ("100 %", "100%", 1_000), ("0.0001%", "0.0001%", 1)]
        {
            let sample = SamplePart::parse(text).unwrap();
            assert_eq!((sample.to_string().as_str(), sample.of(1_000)), (shown, of), "{text}");
        }
        for wrong in ["", "%", "1", "0%", "-1%", "101%", "1e1%", "NaN%", "inf%", "1.%.", "0.00001%"] {
            assert!(SamplePart::parse(wrong).is_err(), "{wrong}");
        }
    }
}
