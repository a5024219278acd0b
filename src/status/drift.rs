//! How target streams differ from what they would be created with: what the service keeps of the last comparisons.

use std::{collections::BTreeMap, sync::Arc};

use chrono::{DateTime, Utc};
use serde::Serialize;

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
    fn no_drift_has_no_words() {
        let known = KnownDrift::compared(Utc::now(), Vec::new(), Some("a mirror".to_owned()));
        assert_eq!((known.count, known.words.as_str(), known.not_fixed), (Some(0), "", None));
        assert_eq!(KnownDrift::unknown(Utc::now(), "timed out").count, None);
    }
}
