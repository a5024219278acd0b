//! `link`, `streams` and `exclude_streams` of a document.

use super::{Checker, Document, text};
use crate::config::{StreamPatterns, shorten};

impl Checker {
    /// Links are resolved before a document is read, unless there are none.
    pub(super) fn link(&mut self, document: &Document) {
        if let Some(link) = text(&document.link) {
            let message = format!(
                "`link` is `{}`: links are for documents of the configuration bucket; write the fields of the link here",
                shorten(link)
            );
            self.problem("link", message);
        }
    }

    pub(super) fn id_of_streams(&mut self) -> String {
        let message = "`id` is required with `streams`: the replications are named `<id>.<stream>`";
        self.problem("id", message.to_owned());
        String::new()
    }

    /// Which streams a document is for, unless it is for one.
    pub(super) fn patterns_of_streams(&mut self, document: &Document) -> Option<StreamPatterns> {
        let Document { stream, streams, exclude_streams, .. } = document;
        if streams.is_empty() {
            if !exclude_streams.is_empty() {
                let message = "`exclude_streams` is for documents with `streams`: remove it, or write `streams`";
                self.problem("exclude_streams", message.to_owned());
            }
            return None;
        }
        if !stream.is_empty() {
            self.problem("streams", "`stream` and `streams` both name the source: remove one of them".to_owned());
        }
        for (field, list) in [("streams", streams), ("exclude_streams", exclude_streams)] {
            for (index, pattern) in list.iter().enumerate() {
                let illegal = |c: char| c.is_whitespace() || c.is_control() || ".>/\\".contains(c);
                if let Some(c) = pattern.chars().find(|c| illegal(*c)) {
                    let message = format!(
                        "it cannot contain {c:?}: write a name of a stream, with `*` for any text, such as `ORDERS_*`"
                    );
                    self.wrong_subject(&format!("{field}/{index}"), pattern, &message);
                }
            }
        }
        let (include, exclude) = (streams.clone(), exclude_streams.clone());
        let target_stream = text(&document.target_stream).unwrap_or_default().to_owned();
        Some(StreamPatterns { include, exclude, target_stream })
    }
}
