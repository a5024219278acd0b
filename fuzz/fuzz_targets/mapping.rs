//! Subjects are mapped as a second, naive implementation has it, and what is said of patterns holds for them:
//! `cargo +nightly fuzz run mapping`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/limits/properties.rs"]
#[allow(dead_code, reason = "each target uses a part of it")]
mod properties;

fuzz_target!(|texts: ((String, String, String), [(String, String); 2], String)| {
    let ((prefix, remove, subject), pairs, other) = texts;
    properties::mapping(&prefix, &remove, &subject);
    let pairs = pairs.each_ref().map(|(src, dest)| (src.as_str(), dest.as_str()));
    properties::transforms(&pairs, [&subject, &other]);
});
