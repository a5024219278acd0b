//! What is wrong with a document.

use std::{borrow::Cow, fmt};

use nats_lane::{beginning, mask_url};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest path that is shown as it is.
const LONGEST_PATH: usize = 256;
/// Most problems of one document that are reported, and the most bytes of each.
const MOST: usize = 64;
const LONGEST_MESSAGE: usize = 2048;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// JSON pointer into the document; empty for the whole.
    pub path: String,
    /// The problem, the value, and a correct value.
    pub message: String,
}

impl Problem {
    /// A problem at a place of the document.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        let mut path = path.into();
        // The names of unknown fields are anything, perhaps a URL with a password in the wrong place.
        if path.len() > LONGEST_PATH || path.contains('@') {
            let parts = path.split('/').map(|part| part.replace("~1", "/").replace("~0", "~"));
            let parts = parts.map(|part| shorten(&part).replace('~', "~0").replace('/', "~1"));
            path = parts.collect::<Vec<_>>().join("/");
        }
        Self { path, message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Everything that is wrong; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// As many as a status, an event or an answer can show. What was written past the service may have any size.
    #[must_use]
    pub(crate) fn bounded(mut self) -> Self {
        let more = self.0.len().saturating_sub(MOST);
        self.0.truncate(MOST);
        for Problem { message, .. } in &mut self.0 {
            if message.len() > LONGEST_MESSAGE {
                message.truncate(beginning(message, LONGEST_MESSAGE).len());
                message.push_str("...");
            }
        }
        if more > 0 {
            self.0.push(Problem::new("", format!("{more} more problems")));
        }
        self
    }
}

/// Problems with their places, in one line of the log.
pub(crate) fn one_line(problems: &[Problem]) -> String {
    let named: Vec<_> = problems.iter().map(|Problem { path, message }| format!("{path}: {message}")).collect();
    named.join("; ")
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// The beginning of a text, for messages; a URL that strayed into another field loses its secret.
pub(crate) fn shorten(text: &str) -> Cow<'_, str> {
    const MOST: usize = 80;
    let text = if text.contains('@') || text.contains("://") { mask_url(text).into() } else { Cow::Borrowed(text) };
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]).into(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_shows_no_secret_and_is_short() {
        let check = |path: &str, expect: &str| assert_eq!(Problem::new(path, "").path, expect);
        check("/filter_subjects/0", "/filter_subjects/0");
        check("/a~1b/c", "/a~1b/c");
        check("/nats:~1~1u:p@h", "/nats:~1~1u:***@h");
        check("/u:p@h/x", "/u:***@h/x");
        assert!(Problem::new(format!("/{}", "x".repeat(100_000)), "").path.len() < 100);
    }

    #[test]
    fn problems_are_bounded_by_number_and_length() {
        let many = Problems((0..1_000).map(|i| Problem::new(format!("/{i}"), "x".repeat(10_000))).collect());
        let bounded = many.bounded();
        assert_eq!(bounded.0.len(), MOST + 1);
        assert_eq!(bounded.0[MOST].message, "936 more problems");
        assert!(bounded.0.iter().all(|problem| problem.message.len() <= LONGEST_MESSAGE + 3));
        let few = Problems(vec![Problem::new("/a", "b")]);
        assert_eq!(few.clone().bounded(), few);
    }
}
