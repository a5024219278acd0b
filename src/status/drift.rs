//! How target streams differ from what they would be created with: what the service keeps of the last comparisons.

use std::{collections::BTreeMap, sync::Arc};

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

/// Settings that are kept of one replication; more are counted.
const MOST_SETTINGS: usize = 10;
/// Characters of each text that is kept.
const LONGEST: usize = 200;

/// The last comparison of each replication of the group, by id.
pub type GroupDrift = BTreeMap<String, Arc<KnownDrift>>;

/// The last comparison of one replication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KnownDrift {
    /// When its servers answered.
    pub at: DateTime<Utc>,
    /// Settings that differ and are not meant to; `None` where the streams were not compared.
    pub count: Option<u64>,
    /// Their names, as [`words`](Self::words) has them in short.
    pub words: String,
    /// The first of them.
    pub settings: Vec<DriftSetting>,
    /// Why `drift --fix` does not apply the safe changes; `None` where it does.
    pub not_fixed: Option<String>,
    /// Why the streams were not compared.
    pub error: Option<String>,
}

/// One setting that differs, as `stream-replicator drift` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DriftSetting {
    /// Name of the field, with that of a bucket's setting where it has another one.
    pub field: String,
    /// Value at the source.
    pub source: String,
    /// Value at the target.
    pub target: String,
    /// Value that the target would be created with.
    pub wanted: String,
    /// `safe` or `unsafe`.
    pub class: String,
    /// Why it differs.
    pub reason: String,
}

impl KnownDrift {
    /// What a comparison found, cut to what is kept.
    pub fn compared(at: DateTime<Utc>, mut settings: Vec<DriftSetting>, not_fixed: Option<String>) -> Self {
        let count = settings.len();
        let names: Vec<&str> = settings.iter().map(|setting| setting.field.as_str()).collect();
        let words = short(&names.join(", "));
        settings.truncate(MOST_SETTINGS);
        settings.shrink_to_fit();
        for DriftSetting { field, source, target, wanted, class: _, reason } in &mut settings {
            [field, source, target, wanted, reason].into_iter().for_each(|text| *text = short(text));
        }
        let not_fixed = not_fixed.filter(|_| count > 0).map(|why| short(&why));
        Self { at, count: Some(count as u64), words, settings, not_fixed, error: None }
    }

    /// That the streams could not be compared.
    pub fn unknown(at: DateTime<Utc>, error: &str) -> Self {
        let error = Some(short(error));
        Self { at, count: None, words: String::new(), settings: Vec::new(), not_fixed: None, error }
    }
}

/// The settings in which the server writes "no limit" as -1.
const UNLIMITED_AT_MINUS_ONE: [&str; 5] =
    ["max_bytes", "max_consumers", "max_msg_size", "max_msgs", "max_msgs_per_subject"];

/// The value of a setting, as the `nats` tool shows it: durations are no nanoseconds, and no limit is a word.
pub fn setting_words(field: &str, value: &Value) -> String {
    match (field, value) {
        (_, Value::Null) => "-".to_owned(),
        (_, Value::String(text)) => text.clone(),
        ("max_age" | "duplicate_window" | "subject_delete_marker_ttl", value) => match value.as_u64() {
            Some(0) if field == "max_age" => "unlimited".to_owned(),
            Some(nanoseconds) => duration(nanoseconds),
            None => value.to_string(),
        },
        (field, value) if UNLIMITED_AT_MINUS_ONE.contains(&field) && value.as_i64() == Some(-1) => {
            "unlimited".to_owned()
        }
        (_, value) => value.to_string(),
    }
}

/// `0s`, `0.10s`, `30.00s`, `2m0s`, `1h0m0s`, `1d0h0m0s`, `1y0d0h0m0s`. What differs looks different: fractions are not cut.
fn duration(nanoseconds: u64) -> String {
    let (whole, fraction) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    let fraction = match fraction {
        0 => String::new(),
        fraction => format!(".{}", format!("{fraction:09}").trim_end_matches('0')),
    };
    let (minutes, seconds) = (whole / 60, whole % 60);
    let (hours, days) = (minutes / 60, minutes / 1_440);
    match (days / 365, days, hours, minutes) {
        (0, 0, 0, 0) if nanoseconds == 0 => "0s".to_owned(),
        (0, 0, 0, 0) => match fraction.len() {
            ..3 => format!("{:.2}s", nanoseconds as f64 / 1e9),
            _ => format!("{seconds}{fraction}s"),
        },
        (0, 0, 0, _) => format!("{minutes}m{seconds}{fraction}s"),
        (0, 0, _, _) => format!("{hours}h{}m{seconds}{fraction}s", minutes % 60),
        (0, _, _, _) => format!("{days}d{}h{}m{seconds}{fraction}s", hours % 24, minutes % 60),
        (years, _, _, _) => {
            format!("{years}y{}d{}h{}m{seconds}{fraction}s", days % 365, hours % 24, minutes % 60)
        }
    }
}

fn short(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded() {
        let setting = |number: usize| DriftSetting {
            field: format!("field{number}"),
            source: "\u{e4}".repeat(5_000),
            target: "b".repeat(5_000),
            wanted: "c".repeat(LONGEST),
            class: "safe".to_owned(),
            reason: "d".repeat(5_000),
        };
        let known = KnownDrift::compared(Utc::now(), (0..500).map(setting).collect(), Some("e".repeat(5_000)));
        assert_eq!((known.count, known.settings.len()), (Some(500), MOST_SETTINGS));
        assert!(known.words.starts_with("field0, field1, ") && known.words.chars().count() == LONGEST + 1);
        let first = &known.settings[0];
        assert_eq!((first.source.chars().count(), first.wanted.len()), (LONGEST + 1, LONGEST));
        assert_eq!(known.not_fixed.map(|why| why.chars().count()), Some(LONGEST + 1));
    }

    #[test]
    fn durations_are_those_of_the_nats_tool() {
        const SECOND: u64 = 1_000_000_000;
        for (nanoseconds, expect) in [
            (0, "0s"),
            (100_000_000, "0.10s"),
            (1_500_000, "0.0015s"),
            (30 * SECOND, "30.00s"),
            (120 * SECOND, "2m0s"),
            (120 * SECOND + 1, "2m0.000000001s"),
            (3_600 * SECOND, "1h0m0s"),
            (90_061 * SECOND, "1d1h1m1s"),
            (400 * 86_400 * SECOND, "1y35d0h0m0s"),
            (u64::MAX, "584y343d23h34m33.709551615s"),
        ] {
            assert_eq!(setting_words("duplicate_window", &nanoseconds.into()), expect);
        }
        assert_eq!(setting_words("max_age", &0.into()), "unlimited");
        assert_eq!(setting_words("max_age", &Value::Null), "-");
        // No other number is a duration.
        assert_eq!(setting_words("max_bytes", &SECOND.into()), "1000000000");
        assert_eq!(setting_words("max_age", &(-1).into()), "-1");
        assert_eq!(setting_words("storage", &"file".into()), "file");
    }

    #[test]
    fn no_limit_is_the_word_of_the_nats_tool() {
        for field in ["max_bytes", "max_consumers", "max_msg_size", "max_msgs", "max_msgs_per_subject"] {
            assert_eq!(setting_words(field, &(-1).into()), "unlimited");
            assert_eq!(setting_words(field, &0.into()), "0");
            assert_eq!(setting_words(field, &5.into()), "5");
        }
        // In any other setting the number has no such meaning.
        assert_eq!(setting_words("first_seq", &(-1).into()), "-1");
    }

    #[test]
    fn no_drift_has_no_words() {
        let known = KnownDrift::compared(Utc::now(), Vec::new(), Some("a mirror".to_owned()));
        assert_eq!((known.count, known.words.as_str(), known.not_fixed), (Some(0), "", None));
        assert_eq!(KnownDrift::unknown(Utc::now(), "timed out").count, None);
    }
}
