//! The rules of ARCHITECTURE.md, checked by reading the sources: which module may import which, what the pure modules do
//! without, where sockets are opened, how long files and functions are, and that a type name means one thing. Each failure
//! names the file, the line and what to do. `layout.rs` has the lists, `violations.rs` shows that each rule fails.

use std::sync::OnceLock;

mod layout;
mod rules;
mod source;
mod violations;

use layout::{LAYOUT, Layout};
use source::Source;

/// Fails with every violation at once.
fn check(rule: fn(&[Source], &Layout) -> Vec<String>) {
    static SOURCES: OnceLock<Vec<Source>> = OnceLock::new();
    let violations = rule(SOURCES.get_or_init(Source::all), &LAYOUT);
    assert!(violations.is_empty(), "{} violations:\n  {}", violations.len(), violations.join("\n  "));
}

#[test]
fn every_module_has_a_row() {
    check(rules::rows);
}

#[test]
fn imports_go_down_the_map() {
    check(rules::imports);
}

#[test]
fn pure_modules_neither_wait_nor_read_a_clock() {
    check(rules::purity);
}

#[test]
fn few_modules_open_sockets() {
    check(rules::sockets);
}

#[test]
fn the_copy_does_not_name_choria() {
    check(rules::never_names);
}

#[test]
fn files_are_short() {
    check(rules::file_lengths);
}

#[test]
fn functions_of_the_copy_are_short_and_flat() {
    check(rules::functions);
}

#[test]
fn a_type_name_means_one_thing() {
    check(rules::type_names);
}
