//! Names and subjects that users see, and the rules for those that they choose.

use std::borrow::Cow;

/// Version of the program; of a build by `contrib/install` with the commit as build metadata.
pub const VERSION: &str = match option_env!("STREAM_REPLICATOR_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};

/// Name of the program.
pub const PROGRAM: &str = "stream-replicator";

/// Subject prefix of the service and of events, and the service's name.
pub const DEFAULT_PREFIX: &str = "replicator";

/// What bucket names begin with.
pub const DEFAULT_BUCKET_PREFIX: &str = "REPLICATOR";

/// Provenance: `<stream> <sequence> <site> <name> <stored at, unix ms>`, one group per hop, ours last.
pub const SOURCE_HEADER: &str = "Choria-SR-Source";

/// Message id that the source itself had stored; the first hop's stays.
pub const ORIGINAL_ID_HEADER: &str = "Choria-SR-Msg-Id";
/// Header of a server that took a message from a source of its stream: the source, its sequence, and more.
pub const STREAM_SOURCE_HEADER: &str = "Nats-Stream-Source";
/// What the name of a header of the server begins with where a target would act on it.
pub const RENAMED: &str = "Choria-SR-";

/// Put before the name of a header that the target would act on or refuse.
pub const RENAMED_HEADER_PREFIX: &str = "Choria-SR-";

/// Key of the heartbeats in the configuration bucket, beside replication ids; no replication may have this id.
pub const HEARTBEATS_KEY: &str = "heartbeats";

/// What the keys of adapters in the configuration bucket begin with, beside replication ids.
pub const ADAPTERS_PREFIX: &str = "adapters/";

/// What the keys of links in the configuration bucket begin with, beside replication ids.
pub const LINKS_PREFIX: &str = "links/";

/// Key of the site's record in the configuration bucket, beside replication ids; no replication may have this id.
pub const SITE_KEY: &str = "site";

/// Name of the host that a heartbeat comes from.
pub const ORIGINATOR_HEADER: &str = "Choria-SR-Originator";

/// Subject that a heartbeat was published on: it stays where a copy changes the subject.
pub const HEARTBEAT_SUBJECT_HEADER: &str = "Choria-SR-Subject";

/// Subject at the source of a message that became a dead letter.
pub const DEAD_SUBJECT_HEADER: &str = "Choria-SR-Subject";

/// Why a message became a dead letter.
pub const DEAD_ERROR_HEADER: &str = "Choria-SR-Error";

/// Deadline of a control request, unix ms; one that arrives later is refused.
pub const DEADLINE_HEADER: &str = "Replicator-Deadline";

/// Time of the instance that refused a request because of its deadline, unix ms.
pub const TIME_HEADER: &str = "Replicator-Time";

/// Revision that a configuration change expects.
pub const EXPECTED_REVISION_HEADER: &str = "Replicator-Expected-Revision";

/// Instance id for a process that was given none: the host's name, made safe, and a short random part.
pub fn default_instance(host: &str, random: u32) -> String {
    let host: String = host.chars().map(|c| if is_token_char(c) { c } else { '-' }).take(64).collect();
    let host = if host.is_empty() { "host" } else { &host };
    format!("{host}-{:05x}", random & 0xf_ffff)
}

/// Consumer name of Choria's replicator for a copy of this name, also the beginning of its key in the leader election.
/// Names that are themselves a beginning of `SR_` get no prefix there, and all others do, `SR_A` too.
pub fn choria_consumer(name: &str) -> String {
    const PREFIX: &str = "SR_";
    if PREFIX.starts_with(name) { name.to_owned() } else { format!("{PREFIX}{name}") }
}

/// Any name as one token of a key: each byte of what is not possible there is written as `=` and two hexadecimal digits.
pub fn key_token(name: &str) -> Cow<'_, str> {
    if is_key_token(name) {
        return name.into();
    }
    let mut token = String::new();
    for byte in name.bytes() {
        match char::from(byte) {
            c if is_key_char(c) => token.push(c),
            _ => token.push_str(&format!("={byte:02X}")),
        }
    }
    token.into()
}

/// Whether a text is one token of a key.
pub fn is_key_token(token: &str) -> bool {
    !token.is_empty() && token.chars().all(is_key_char)
}

fn is_key_char(c: char) -> bool {
    is_token_char(c) || c == '='
}

/// Checks a name that becomes one token of a subject and part of a key (site, instance).
pub fn check_token(name: &str) -> Result<(), &'static str> {
    if !name.is_empty() && name.len() <= 128 && name.chars().all(is_token_char) {
        return Ok(());
    }
    Err("1 to 128 letters, digits, `-` and `_`")
}

/// Checks a subject prefix: tokens with dots between.
pub fn check_prefix(prefix: &str) -> Result<(), &'static str> {
    if prefix.split('.').all(|token| check_token(token).is_ok()) && !prefix.starts_with('_') {
        return Ok(());
    }
    Err("tokens of letters, digits, `-` and `_`, with dots between, not beginning with `_`")
}

/// Checks what bucket names begin with.
pub fn check_bucket_prefix(prefix: &str) -> Result<(), &'static str> {
    if prefix.len() <= 64 && check_token(prefix).is_ok() {
        return Ok(());
    }
    Err("1 to 64 letters, digits, `-` and `_`")
}

fn is_token_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_becomes_a_legal_instance() {
        assert_eq!(default_instance("node-1.example.org", 0xabc12345), "node-1-example-org-12345");
        assert_eq!(default_instance("", 7), "host-00007");
        assert!(check_token(&default_instance("\u{fc}ber host", 1)).is_ok());
    }

    #[test]
    fn any_name_becomes_a_token_of_a_key() {
        for (name, expect) in [("A-b_1=", "A-b_1="), ("$M", "=24M"), ("a+\u{fc}", "a=2B=C3=BC"), ("", "")] {
            assert_eq!(key_token(name), expect);
        }
    }

    #[test]
    fn consumers_are_named_as_choria_does() {
        for (name, expect) in
            [("EAST", "SR_EAST"), ("S", "S"), ("SR", "SR"), ("SR_", "SR_"), ("SR_A", "SR_SR_A"), ("SRA", "SR_SRA")]
        {
            assert_eq!(choria_consumer(name), expect);
        }
    }

    #[test]
    fn tokens_are_single_and_without_wildcards() {
        for good in ["US-EAST", "a", "node_7"] {
            assert!(check_token(good).is_ok(), "{good}");
        }
        for bad in ["", "a.b", "a b", "*", ">", "tab\t", "\u{fc}", &"x".repeat(129)] {
            assert!(check_token(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn prefixes_are_subjects_without_wildcards() {
        for good in ["replicator", "acme.replicator"] {
            assert!(check_prefix(good).is_ok(), "{good}");
        }
        for bad in ["", ".a", "a.", "a..b", "a.*", "$SYS", "_INBOX"] {
            assert!(check_prefix(bad).is_err(), "{bad}");
        }
    }
}
