//! How a document differs from the stored one, in lines; secrets are masked on both sides.

use serde_json::Value;
use similar::TextDiff;

use super::output::{Colour, Output, clean};
use crate::{
    config::{mask_document, pretty_document},
    control::api::StoredDocument,
};

/// Unified, empty if nothing that can be seen differs. `id` and `place` are those of the new document.
pub(super) fn diff(stored: Option<&StoredDocument>, id: &str, place: &str, document: &Value) -> String {
    let (before, was) = match stored {
        Some(stored) => (pretty_document(&stored.config) + "\n", format!("{id} (revision {})", stored.revision)),
        None => (String::new(), "/dev/null".to_owned()),
    };
    let after = pretty_document(&mask_document(document)) + "\n";
    let becomes = format!("{id} ({place})");
    TextDiff::from_lines(&before, &after).unified_diff().header(&was, &becomes).to_string()
}

/// Prints a diff for people.
pub(super) fn show_diff(diff: &str, out: &mut Output) {
    if out.json() {
        return;
    }
    for line in diff.lines() {
        let colour = match line.as_bytes().first() {
            Some(b'+') => Colour::Green,
            Some(b'-') => Colour::Red,
            Some(b'@') => Colour::Cyan,
            _ => Colour::Plain,
        };
        out.line(&out.paint(colour, &clean(line)));
    }
}
