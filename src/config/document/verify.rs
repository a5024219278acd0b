//! What a document says of comparing both streams.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Checker, Document, shorten, text};
use crate::config::{Problem, SamplePart, VerifyEffort, VerifySchedule};

/// Comparing takes time, and each comparison is kept.
const LEAST: Duration = Duration::from_secs(60);

/// `verify` of a document.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VerifyDocument {
    /// From the end of one comparison to the next.
    pub every: String,
    /// How much is compared, and how fast.
    #[serde(flatten)]
    pub effort: VerifyEffort,
}

impl Checker {
    /// When both streams are compared by itself.
    pub(super) fn verify(&mut self, document: &Document) -> Option<VerifySchedule> {
        let VerifyDocument { every, effort: VerifyEffort { sample, rate } } = document.verify.as_ref()?;
        let every = match nats_lane::parse_duration(every) {
            _ if every.is_empty() => None,
            Ok(every) if every >= LEAST => Some(every),
            Ok(_) => {
                let message = format!("`verify.every` is `{}`: the least is `1m`", shorten(every));
                self.problems.push(Problem::new("/verify/every", message));
                None
            }
            Err(error) => {
                let message = format!("`verify.every` {error}, such as `24h`: `{}`", shorten(every));
                self.problems.push(Problem::new("/verify/every", message));
                None
            }
        };
        let sample = text(sample).and_then(|text| {
            let wrong = |wrong| Problem::new("/verify/sample", format!("`verify.sample` `{}` {wrong}", shorten(text)));
            SamplePart::parse(text).map_err(|error| self.problems.push(wrong(error))).ok()
        });
        Some(VerifySchedule { every: every?, sample, rate: *rate })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::parse_value;

    fn parsed(verify: Value) -> Result<Option<VerifySchedule>, String> {
        let document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b", "verify": verify});
        parse_value(&document, "SITE").map(|replication| replication.verify).map_err(|problems| {
            problems
                .0
                .iter()
                .map(|problem| format!("{} {}", problem.path, problem.message))
                .collect::<Vec<_>>()
                .join("\n")
        })
    }

    #[test]
    fn a_schedule_is_read() {
        let found = parsed(json!({"every": "24h", "sample": "1%", "rate": 500})).unwrap().unwrap();
        let day = Duration::from_secs(24 * 3_600);
        assert_eq!(
            found,
            VerifySchedule { every: day, sample: Some(SamplePart::parse("1%").unwrap()), rate: Some(500) }
        );
        let all = parsed(json!({"every": "1m"})).unwrap().unwrap();
        assert_eq!((all.sample, all.rate), (None, None));
    }

    #[test]
    fn wrong_values_say_what_would_be_right() {
        for (verify, path, words) in [
            (json!({"every": "59s"}), "/verify/every", "the least is `1m`"),
            (json!({"every": "often"}), "/verify/every", "such as `24h`"),
            (json!({"every": ""}), "/verify/every", "must not be empty"),
            (json!({}), "/verify/every", "`every` is required"),
            (json!({"every": "1h", "sample": "half"}), "/verify/sample", "such as `1%`"),
            (json!({"every": "1h", "sample": "101%"}), "/verify/sample", "such as `1%`"),
            (json!({"every": "1h", "rate": 0}), "/verify/rate", "1"),
            (json!({"every": "1h", "rat": 1}), "/verify/rat", "rate"),
            (json!("1h"), "/verify", "of type object"),
        ] {
            let problems = parsed(verify.clone()).unwrap_err();
            assert!(problems.contains(path) && problems.contains(words), "{verify}: {problems}");
        }
    }
}
