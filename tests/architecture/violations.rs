//! Each rule finds a violation in small sources, says where it is and what to do, and drops exceptions that are not needed.

use crate::layout::{Exceptions, LAYOUT, Layout};
use crate::rules;
use crate::source::Source;

const SMALL: Layout = Layout {
    rows: &[&["main"], &["cli"], &["copy", "http"], &["names"], &["nats-lane"]],
    pure: &["copy::decide"],
    file_lines: 10,
    function_lines: 4,
    nesting: 2,
    exceptions: Exceptions {
        imports: &[],
        purity: &[],
        sockets: &[],
        never_names: &[],
        file_lines: &[],
        function_lines: &[],
        nesting: &[],
        type_names: &[],
    },
    ..LAYOUT
};

type Rule = fn(&[Source], &Layout) -> Vec<String>;

/// Checks that files with these paths and texts fail with exactly these beginnings and endings of lines.
fn check(rule: Rule, layout: &Layout, files: &[(&str, &str)], expect: &[(&str, &str)]) {
    let sources: Vec<Source> = files.iter().map(|(path, text)| Source::parse(path, text)).collect();
    let found = rule(&sources, layout);
    let all = found.len() == expect.len()
        && found.iter().zip(expect).all(|(text, (begin, end))| text.starts_with(begin) && text.ends_with(end));
    assert!(all, "expected {expect:?}, found {found:#?}");
}

#[test]
fn imports_from_above_and_beside_are_found() {
    let up = "which is above it: move what both need down, or pass it in";
    let beside = "which is beside it: move what both need down, or pass it in";
    let fails = |path, text, begin, end| check(rules::imports, &SMALL, &[(path, text)], &[(begin, end)]);
    fails("src/copy/run.rs", "\nuse crate::cli::Args;", "src/copy/run.rs:2: `copy` imports `cli`, ", up);
    fails("src/copy/run.rs", "fn f() {\n crate::cli::run();\n}", "src/copy/run.rs:2: ", up);
    fails("src/copy/run.rs", "fn f() { println!(\"{}\", crate::cli::NAME); }", "src/copy/run.rs:1: ", up);
    fails("src/copy/run.rs", "use super::super::cli;", "src/copy/run.rs:1: ", up);
    fails("src/copy/run.rs", "use crate::{names, http::{self}};", "src/copy/run.rs:1: `copy` imports `http`, ", beside);
    fails("src/names.rs", "use crate::copy;", "src/names.rs:1: ", up);
    fails("crates/nats-lane/src/lane.rs", "use stream_replicator::names;", "crates/nats-lane/src/lane.rs:1: ", up);
    fails("src/names.rs", "pub use stream_replicator::copy::Job;", "src/names.rs:1: ", up);
}

#[test]
fn imports_from_below_are_none_of_it() {
    let passes = |path, text| check(rules::imports, &SMALL, &[(path, text)], &[]);
    passes("src/main.rs", "use stream_replicator::cli;");
    passes("src/copy/run.rs", "use crate::names; use super::decide; use nats_lane::Lane; use std::fs;");
    passes("crates/nats-lane/src/lane.rs", "use crate::names::Name;");
    passes("src/names.rs", "#[cfg(test)]\nmod tests { use crate::cli; }");
}

#[test]
fn every_module_needs_one_row() {
    let files =
        [("src/main.rs", ""), ("src/cli.rs", ""), ("src/copy.rs", ""), ("src/lib.rs", ""), ("src/new/part.rs", "")];
    check(
        rules::rows,
        &SMALL,
        &files,
        &[
            ("src/new/part.rs:1: `new` has no row: put it below everything that imports it", "ARCHITECTURE.md"),
            ("tests/architecture/layout.rs: there is no module `http`", "remove it from `rows`"),
            ("tests/architecture/layout.rs: there is no module `names`", "remove it from `rows`"),
            ("tests/architecture/layout.rs: there is no module `nats-lane`", "remove it from `rows`"),
        ],
    );
}

#[test]
fn clocks_in_pure_modules_are_found() {
    let fails = |text, begin| check(rules::purity, &SMALL, &[("src/copy/decide.rs", text)], &[(begin, "")]);
    let begin = "src/copy/decide.rs:2: `copy::decide` is pure and ";
    fails("fn f() {\n let now = std::time::Instant::now(); }", begin);
    fails("fn f(t: Instant) {\n t.elapsed(); }", begin);
    fails("fn f(t: Instant) {\n println!(\"{:?}\", t.elapsed()); }", begin);
    fails("\nasync fn f() {}", begin);
    fails("\nuse tokio::sync::watch;", begin);
    fails("use tokio::time;\nfn f() { drop(time::sleep(D)); }", begin);
    fails("use std::time::Instant as Moment;\nfn f() { Moment::now(); }", begin);
    fails("fn f() -> Instant {\n vec![Instant::now()][0] }", begin);
    fails("\nuse crate::chance;", begin);
    check(rules::purity, &SMALL, &[("src/copy/decide.rs", "use tokio::time::Instant; fn f(now: Instant) {}")], &[]);
    check(
        rules::purity,
        &SMALL,
        &[("src/copy/run.rs", "async fn f() { Instant::now(); }")],
        &[("tests/architecture/layout.rs: there is no module `copy::decide`", "remove it from `pure`")],
    );
    check(rules::purity, &SMALL, &[("src/copy/flow/decide.rs", "")], &[("", "write `copy::flow::decide` in `pure`")]);
}

#[test]
fn sockets_elsewhere_are_found() {
    let fails = |path, text| {
        let end = "only nats, nats-lane, http open sockets: take a connection that one of them made";
        check(rules::sockets, &SMALL, &[(path, text)], &[(&format!("{path}:1: "), end)]);
    };
    fails("src/copy/run.rs", "use tokio::net::TcpStream;");
    fails("src/cli.rs", "fn f() { std::net::UdpSocket::bind(A); }");
    fails("src/cli/client.rs", "fn f() { async_nats::connect(URL); }");
    fails("src/lib.rs", "fn f() { async_nats::ConnectOptions::new(); }");
    check(rules::sockets, &SMALL, &[("src/http.rs", "use tokio::net::TcpListener;")], &[]);
    check(rules::sockets, &SMALL, &[("crates/nats-lane/src/socket.rs", "use tokio::net::TcpStream;")], &[]);
    check(rules::sockets, &SMALL, &[("src/cli.rs", "use std::net::SocketAddr;")], &[]);
}

#[test]
fn names_that_a_module_must_not_know_are_found() {
    let fails = |text| {
        let end = "belong in the module that has all of them";
        check(
            rules::never_names,
            &SMALL,
            &[("src/copy/run.rs", text)],
            &[("src/copy/run.rs:1: `copy` names choria", end)],
        );
    };
    fails("struct ChoriaHeader;");
    fails("fn choria() {}");
    fails("const BUCKET: &str = \"CHORIA_LEADER_ELECTION\";");
    fails("use crate::choria::Identity;");
    fails("fn f() { log!(\"for choria\"); }");
    check(rules::never_names, &SMALL, &[("src/copy/run.rs", "const H: &str = \"Choria-SR-Source\"; // Choria's")], &[]);
    check(rules::never_names, &SMALL, &[("src/cli.rs", "struct Choria;")], &[]);
}

#[test]
fn long_files_and_functions_are_found() {
    let long = "const A: u8 = 1;\n".repeat(11);
    check(
        rules::file_lengths,
        &SMALL,
        &[("src/cli.rs", &long)],
        &[("src/cli.rs:1: 11 lines without tests, at most 10", "move a part of it to a file of its own")],
    );
    let with_tests = format!("const A: u8 = 1;\n\n#[cfg(test)]\nmod tests {{\n{long}}}\n");
    check(rules::file_lengths, &SMALL, &[("src/cli.rs", &with_tests)], &[]);
    let body = "fn f() {\n a();\n b();\n c();\n}\n";
    check(
        rules::functions,
        &SMALL,
        &[("src/copy/run.rs", body)],
        &[("src/copy/run.rs:1: `f` has 5 lines", "by its steps")],
    );
    check(rules::functions, &SMALL, &[("src/cli.rs", body)], &[]);
    let deep = "fn f() { if a { for b in c { match d { _ => {} } } } }";
    check(
        rules::functions,
        &SMALL,
        &[("src/copy/run.rs", deep)],
        &[("src/copy/run.rs:1: `f` has 3 blocks", "inner part")],
    );
    check(rules::functions, &SMALL, &[("src/copy/run.rs", "fn f() { if a {} else if b {} else if c {} }")], &[]);
}

#[test]
fn a_type_name_with_two_meanings_is_found() {
    let files =
        [("src/copy/run.rs", "struct Slot;"), ("src/cli.rs", "\nenum Slot {}"), ("src/names.rs", "struct Name;")];
    let expect = [("src/copy/run.rs:1, src/cli.rs:2: `Slot` names 2 types", "name each by what it is")];
    check(rules::type_names, &SMALL, &files, &expect);
    let own = [("src/copy/run.rs", "enum Error {}"), ("src/cli.rs", "struct Error;")];
    check(rules::type_names, &SMALL, &own, &[]);
}

#[test]
fn exceptions_are_accepted_only_while_needed() {
    let exceptions = Exceptions {
        never_names: &[("src/copy/run.rs", 1), ("src/copy/gone.rs", 2), ("src/copy/less.rs", 2)],
        file_lines: &[("src/copy/run.rs", 11), ("src/cli.rs", 12)],
        ..Exceptions::default()
    };
    let layout = Layout { exceptions, ..SMALL };
    let files = [("src/copy/run.rs", "struct Choria;"), ("src/copy/less.rs", "struct ChoriaName;")];
    check(
        rules::never_names,
        &layout,
        &files,
        &[
            ("tests/architecture/layout.rs: exception (\"src/copy/gone.rs\", 2)", "remove it from `never_names`"),
            (
                "tests/architecture/layout.rs: exception (\"src/copy/less.rs\", 2)",
                "write (\"src/copy/less.rs\", 1) in `never_names`",
            ),
        ],
    );
    // One more than accepted: each is named.
    let files = [("src/copy/run.rs", "struct Choria;\nstruct ChoriaName;")];
    let gone = [("tests/", "`never_names`"), ("tests/", "`never_names`")];
    let each = [("src/copy/run.rs:1", ""), ("src/copy/run.rs:2", "")];
    check(rules::never_names, &layout, &files, &[gone, each].concat());
    let long = "const A: u8 = 1;\n".repeat(12);
    check(
        rules::file_lengths,
        &layout,
        &[("src/copy/run.rs", &long), ("src/cli.rs", "")],
        &[
            ("tests/architecture/layout.rs: exception (\"src/cli.rs\", 12)", "remove it from `file_lines`"),
            ("src/copy/run.rs:1: 12 lines", ""),
        ],
    );
}
