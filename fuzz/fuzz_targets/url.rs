//! Any text is a URL or told to be none, and no password is shown: `cargo +nightly fuzz run url`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/properties.rs"]
mod properties;

fuzz_target!(|texts: (String, String, String)| {
    let (first, second, third) = texts;
    properties::url(&first);
    properties::secret_url(&first, &second, &third);
});
