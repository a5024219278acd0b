//! The rules: each finds its violations in sources, and accepts the exceptions of a layout as long as they are needed.

use std::collections::BTreeMap;

use crate::layout::{Exception, Layout};
use crate::source::Source;

/// Lines by which a measured length may be below its exception: files change in every commit.
const SLACK: usize = 50;

/// One violation.
struct Finding {
    /// As an exception names it.
    key: String,
    /// How much it adds to the measure of its key.
    amount: usize,
    text: String,
}

/// What is not accepted, and exceptions that are not needed: all of them, or larger than what is left of it.
fn judge(findings: Vec<Finding>, list: &str, exceptions: &[Exception], slack: usize) -> Vec<String> {
    let mut by_key: BTreeMap<String, Vec<Finding>> = BTreeMap::new();
    for finding in findings {
        by_key.entry(finding.key.clone()).or_default().push(finding);
    }
    let mut failures = Vec::new();
    for (key, accepted) in exceptions {
        let left: usize = by_key.get(*key).into_iter().flatten().map(|finding| finding.amount).sum();
        if left == 0 {
            failures.push(format!("exception (\"{key}\", {accepted}) is no longer needed: remove it from `{list}`"));
        } else if left + slack < *accepted {
            failures
                .push(format!("exception (\"{key}\", {accepted}) is too large: write (\"{key}\", {left}) in `{list}`"));
        }
    }
    for (key, found) in by_key {
        let accepted = exceptions.iter().find(|(name, _)| *name == key).map_or(0, |(_, accepted)| *accepted);
        let amount: usize = found.iter().map(|finding| finding.amount).sum();
        if amount > accepted {
            failures.extend(found.into_iter().map(|finding| finding.text));
        }
    }
    let hint = |failure: String| match failure.starts_with("exception") {
        true => format!("tests/architecture/layout.rs: {failure}"),
        false => failure,
    };
    failures.into_iter().map(hint).collect()
}

fn one(key: String, text: String) -> Finding {
    Finding { key, amount: 1, text }
}

/// Whether the parts of a path occur in it, one after the other.
fn contains(segments: &[String], part: &str) -> bool {
    let part: Vec<&str> = part.split("::").collect();
    segments.windows(part.len()).any(|window| window.iter().zip(&part).all(|(a, b)| a == b))
}

/// Every module of the crate root, and every crate, has exactly one row, and no row names one that is not there.
pub fn rows(sources: &[Source], layout: &Layout) -> Vec<String> {
    let mut failures = Vec::new();
    let mut there: BTreeMap<&str, &str> = BTreeMap::new();
    for source in sources {
        if let Some(top) = source.top() {
            there.entry(top).or_insert(&source.path);
        }
    }
    let named: Vec<&str> = layout.rows.iter().flat_map(|row| row.iter().copied()).collect();
    for (module, path) in &there {
        match named.iter().filter(|name| *name == module).count() {
            1 => {}
            0 => failures.push(format!(
                "{path}:1: `{module}` has no row: put it below everything that imports it, in `rows` of \
                 tests/architecture/layout.rs and in ARCHITECTURE.md"
            )),
            _ => failures.push(format!("tests/architecture/layout.rs: `{module}` has more than one row: keep one")),
        }
    }
    for name in named.iter().filter(|name| !there.contains_key(*name)) {
        failures.push(format!("tests/architecture/layout.rs: there is no module `{name}`: remove it from `rows`"));
    }
    failures
}

/// A module imports only from rows below its own.
pub fn imports(sources: &[Source], layout: &Layout) -> Vec<String> {
    let row = |module: &str| layout.rows.iter().position(|row| row.contains(&module));
    let mut findings = Vec::new();
    for source in sources {
        let Some(from) = source.top() else { continue };
        for used in &source.used {
            let Some(to) = used.leads_to(layout.rows) else { continue };
            if to == from || row(from).is_none() || row(to) > row(from) {
                continue;
            }
            let (at, path) = (&used.at, &source.path);
            let relation = if row(to) == row(from) { "beside" } else { "above" };
            findings.push(one(
                format!("{path} -> {to}"),
                format!(
                    "{at}: `{from}` imports `{to}`, which is {relation} it: move what both need down, or pass it in"
                ),
            ));
        }
    }
    judge(findings, "imports", layout.exceptions.imports, 0)
}

/// Pure modules read no clock, wait for nothing and reach nothing outside.
pub fn purity(sources: &[Source], layout: &Layout) -> Vec<String> {
    let mut findings = Vec::new();
    let mut failures = Vec::new();
    for module in layout.pure {
        let Some(source) = sources.iter().find(|source| source.module() == *module) else {
            failures.push(missing(module, sources));
            continue;
        };
        for used in &source.used {
            let Some(impure) = layout.impure_paths.iter().find(|part| contains(&used.segments, part)) else { continue };
            let (at, path) = (&used.at, used.segments.join("::"));
            findings.push(one(
                format!("{module} uses {impure}"),
                format!("{at}: `{module}` is pure and uses `{path}`: let the caller pass in what it needs"),
            ));
        }
        for (method, at) in source.methods.iter().filter(|(method, _)| layout.impure_methods.contains(&method.as_str()))
        {
            findings.push(one(
                format!("{module} uses {method}"),
                format!("{at}: `{module}` is pure and calls `{method}`, which reads a clock: let the caller pass in the time"),
            ));
        }
        for function in source.functions.iter().filter(|function| function.is_async) {
            let (at, name) = (&function.at, &function.name);
            findings.push(one(
                format!("{module} uses async"),
                format!("{at}: `{module}` is pure and `{name}` is async: move the waiting to the caller"),
            ));
        }
    }
    failures.extend(judge(findings, "purity", layout.exceptions.purity, 0));
    failures
}

/// A pure module that is not there: where it may have moved to.
fn missing(module: &str, sources: &[Source]) -> String {
    let last = module.rsplit("::").next().unwrap_or(module);
    let moved = sources.iter().map(Source::module).find(|other| other.rsplit("::").next() == Some(last));
    let advice = moved.map_or("remove it from".to_owned(), |to| format!("write `{to}` in"));
    format!("tests/architecture/layout.rs: there is no module `{module}`: {advice} `pure`")
}

/// Only some modules open sockets.
pub fn sockets(sources: &[Source], layout: &Layout) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources.iter().filter(|source| source.top().is_none_or(|top| !layout.opens_sockets.contains(&top))) {
        for used in &source.used {
            if layout.socket_paths.iter().any(|part| contains(&used.segments, part)) {
                let (at, path, by) = (&used.at, used.segments.join("::"), layout.opens_sockets.join(", "));
                findings.push(one(
                    source.path.clone(),
                    format!("{at}: `{path}`: only {by} open sockets: take a connection that one of them made"),
                ));
            }
        }
    }
    judge(findings, "sockets", layout.exceptions.sockets, 0)
}

/// Some modules do not name what they are not to know: in paths, names of types and functions, and texts.
pub fn never_names(sources: &[Source], layout: &Layout) -> Vec<String> {
    let mut findings = Vec::new();
    for (module, word, advice) in layout.never_names {
        for source in sources.iter().filter(|source| source.top() == Some(module)) {
            let paths = source.used.iter().map(|used| (used.segments.join("::"), &used.at));
            let texts = source.strings.iter().chain(&source.types).map(|(text, at)| (text.clone(), at));
            let functions = source.functions.iter().map(|function| (function.name.clone(), &function.at));
            for (text, at) in paths.chain(texts).chain(functions) {
                let known = layout.wire_names.iter().fold(text.to_lowercase(), |text, wire| text.replace(wire, ""));
                if known.contains(word) {
                    let text = format!("{at}: `{module}` names {word} (`{text}`): {advice}");
                    findings.push(one(source.path.clone(), text));
                }
            }
        }
    }
    judge(findings, "never_names", layout.exceptions.never_names, 0)
}

/// No file is too long to be read.
pub fn file_lengths(sources: &[Source], layout: &Layout) -> Vec<String> {
    let most = layout.file_lines;
    let long = sources.iter().filter(|source| source.lines > most).map(|Source { path, lines, .. }| Finding {
        key: path.clone(),
        amount: *lines,
        text: format!("{path}:1: {lines} lines without tests, at most {most}: move a part of it to a file of its own"),
    });
    judge(long.collect(), "file_lines", layout.exceptions.file_lines, SLACK)
}

/// Functions of some modules are short and flat.
pub fn functions(sources: &[Source], layout: &Layout) -> Vec<String> {
    let (most, deepest) = (layout.function_lines, layout.nesting);
    let (mut long, mut deep) = (Vec::new(), Vec::new());
    let measured =
        sources.iter().filter(|source| source.top().is_some_and(|top| layout.short_functions.contains(&top)));
    for (source, function) in
        measured.flat_map(|source| source.functions.iter().map(move |function| (source, function)))
    {
        let (at, name, lines, nesting) = (&function.at, &function.name, function.lines, function.nesting);
        let key = format!("{} {name}", source.path);
        if lines > most {
            let text = format!("{at}: `{name}` has {lines} lines, at most {most}: split it by its steps");
            long.push(Finding { key: key.clone(), amount: lines, text });
        }
        if nesting > deepest {
            let text = format!(
                "{at}: `{name}` has {nesting} blocks within each other, at most {deepest}: return early, or name the inner part"
            );
            deep.push(Finding { key, amount: nesting, text });
        }
    }
    let mut failures = judge(long, "function_lines", layout.exceptions.function_lines, SLACK);
    failures.extend(judge(deep, "nesting", layout.exceptions.nesting, 0));
    failures
}

/// A type name means one thing.
pub fn type_names(sources: &[Source], layout: &Layout) -> Vec<String> {
    let mut types: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (name, at) in sources.iter().flat_map(|source| &source.types) {
        types.entry(name).or_default().push(at.to_string());
    }
    let shared = types.into_iter().filter(|(name, all)| all.len() > 1 && !layout.own_names.contains(name));
    let findings = shared.map(|(name, all)| Finding {
        key: name.to_owned(),
        amount: all.len(),
        text: format!("{}: `{name}` names {} types: name each by what it is", all.join(", "), all.len()),
    });
    judge(findings.collect(), "type_names", layout.exceptions.type_names, 0)
}
