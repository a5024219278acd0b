//! The result of a check of a document and of both clusters, for people.

use super::{
    error::problem,
    format::count,
    output::{Colour, Output, Table, clean},
};
use crate::{
    config::Problem,
    control::api::{CheckResult, PreflightSide, Validation},
};

/// Prints whether the document is valid, every problem and warning, and the checks of both sides.
pub(super) fn print_validation(validation: &Validation, out: &mut Output) {
    let Validation { valid, problems, warnings, preflight } = validation;
    out.line(&if *valid { out.paint(Colour::Green, "valid") } else { out.paint(Colour::Red, "not valid") });
    print_problems("problem", problems, out);
    print_problems("warning", warnings, out);
    if let Some(preflight) = preflight {
        side("source", &preflight.source, out);
        side("target", &preflight.target, out);
    }
}

fn print_problems(what: &str, problems: &[Problem], out: &mut Output) {
    for one in problems {
        out.line(&format!("{what}: {}", problem(one)));
    }
}

fn side(name: &str, side: &PreflightSide, out: &mut Output) {
    let server = match side.server.as_str() {
        "" => "no server let us in".to_owned(),
        server => format!("server {server}, version {}", side.version),
    };
    let stream = side.stream.as_ref().map(|stream| {
        let (messages, first, last) = (count(stream.messages), stream.first_seq, stream.last_seq);
        format!(", stream with {messages} messages, {first} to {last}")
    });
    out.line("");
    out.line(&clean(&format!("{name}: {server}{}", stream.unwrap_or_default())));
    let mut table = Table::new(&["CHECK", "RESULT", "MESSAGE"]).painted(1);
    for check in &side.checks {
        let (result, colour) = match check.result {
            CheckResult::Ok => ("ok", Colour::Green),
            CheckResult::Warning => ("warning", Colour::Yellow),
            CheckResult::Failed => ("failed", Colour::Red),
            CheckResult::Unknown => ("unknown", Colour::Cyan),
        };
        table.row(colour, vec![check.name.clone(), result.to_owned(), check.message.clone()]);
    }
    out.table(&table);
}
