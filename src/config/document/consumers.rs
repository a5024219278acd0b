//! What a document says of consumers.

use super::{Checker, Document, shorten};
use crate::config::Problem;

impl Checker {
    /// Names of durable consumers, or patterns of names.
    pub(super) fn consumers(&mut self, document: &Document) -> Vec<String> {
        for (index, name) in document.consumers.iter().enumerate() {
            let path = format!("/consumers/{index}");
            let illegal = name.chars().find(|c| c.is_whitespace() || c.is_control() || ".>/\\".contains(*c));
            if let Some(c) = illegal
                && self.problems.iter().all(|problem| problem.path != path)
            {
                let message = format!(
                    "`consumers` has `{}`: the name of a consumer has no {c:?}; write a name, or a pattern with `*` and `?`",
                    shorten(name)
                );
                self.problems.push(Problem::new(path, message));
            }
        }
        document.consumers.clone()
    }
}
