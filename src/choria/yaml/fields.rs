//! Every field that the file may have, level by level. The names of a stream's own fields are those of a document.

use super::fields::FieldKind::{Any, Decimal, Entries, Flag, Group, Headers, Span, Text, Whole};

/// What a field holds.
#[derive(Debug, Clone, Copy)]
pub(super) enum FieldKind {
    /// A text.
    Text,
    /// `true`, `yes`, `on` and their opposites, without quotes.
    Flag,
    /// A whole number from the first to the last.
    Whole(i128, i128),
    /// A number of bytes; what is not whole counts as the next one that is.
    Decimal,
    /// A duration. `true` where it must be more than 0.
    Span(bool),
    /// A mapping with these fields.
    Group(&'static [FileField]),
    /// A list of mappings with these fields.
    Entries(&'static [FileField]),
    /// A mapping of texts.
    Headers,
    /// Whatever a document has there.
    Any,
}

/// One field.
#[derive(Debug, Clone, Copy)]
pub(super) struct FileField {
    pub(super) name: &'static str,
    pub(super) kind: FieldKind,
    /// The Go program does not have it.
    pub(super) ours: bool,
}

const fn field(name: &'static str, kind: FieldKind) -> FileField {
    FileField { name, kind, ours: false }
}

const fn ours(name: &'static str, kind: FieldKind) -> FileField {
    FileField { name, kind, ours: true }
}

/// Files of TLS, for all streams, one, or one side of it.
const fn tls(name: &'static str) -> FileField {
    field(name, Group(TLS))
}

/// An identity of Choria's, for the same.
const fn choria(name: &'static str) -> FileField {
    field(name, Group(CHORIA))
}

const TLS: &[FileField] = &[field("ca", Text), field("cert", Text), field("key", Text)];

const CHORIA: &[FileField] = &[field("seed_file", Text), field("jwt_file", Text), field("collective", Text)];

const ADVISORY: &[FileField] = &[field("subject", Text), field("reliable", Flag)];

const BEAT: &[FileField] = &[field("subject", Text), field("interval", Span(true)), field("headers", Headers)];

const HEARTBEATS: &[FileField] = &[
    field("url", Text),
    field("interval", Span(true)),
    field("leader_election", Flag),
    field("headers", Headers),
    field("subjects", Entries(BEAT)),
    tls("tls"),
    choria("choria"),
];

const CONTROL: &[FileField] =
    &[field("server", Text), field("credentials", Text), field("bucket_prefix", Text), field("prefix", Text)];

const ADAPTER_COUNT: FieldKind = Whole(0, u64::MAX as i128);

const ADAPTER_INGEST: &[FileField] = &[
    field("topic", Text),
    field("protocol", Text),
    field("workers", ADAPTER_COUNT),
    field("servers", Text),
    field("context", Text),
    field("credentials", Text),
    field("tls", Group(TLS)),
    field("choria", Group(CHORIA)),
];

const ADAPTER_STREAM: &[FileField] = &[
    field("type", Text),
    field("topic", Text),
    field("workers", ADAPTER_COUNT),
    field("servers", Text),
    field("context", Text),
    field("credentials", Text),
    field("tls", Group(TLS)),
    field("choria", Group(CHORIA)),
    field("create", Any),
];

const ADAPTER: &[FileField] = &[
    field("name", Text),
    field("queue_len", ADAPTER_COUNT),
    field("queue_bytes", ADAPTER_COUNT),
    field("ingest", Group(ADAPTER_INGEST)),
    field("stream", Group(ADAPTER_STREAM)),
    field("output_protocol", Text),
    field("exclusive", Flag),
    field("verify", Flag),
    field("trusted_signers", Any),
];

const SEQUENCE: FieldKind = Whole(0, u64::MAX as i128);

const STREAM: &[FileField] = &[
    field("stream", Text),
    field("name", Text),
    field("filter_subject", Text),
    field("target_stream", Text),
    field("target_subject_prefix", Text),
    field("target_subject_remove", Text),
    field("source_url", Text),
    field("target_url", Text),
    field("no_target_create", Flag),
    field("ephemeral", Flag),
    field("target_initiated", Flag),
    field("start_sequence", SEQUENCE),
    field("start_time", Text),
    field("start_delta", Span(false)),
    field("start_at_end", Flag),
    field("max_age", Span(false)),
    tls("tls"),
    tls("source_tls"),
    tls("target_tls"),
    choria("choria"),
    choria("source_choria"),
    choria("target_choria"),
    field("inspect_field", Text),
    field("inspect_force_field", Text),
    field("inspect_header", Text),
    field("inspect_subject_token", Whole(-1, 1 << 16)),
    field("inspect_duration", Span(false)),
    field("warn_duration", Span(false)),
    field("size_trigger", Decimal),
    field("leader_election_name", Text),
    field("advisory", Group(ADVISORY)),
    // Ours, which the Go program does not have.
    ours("id", Text),
    ours("link", Text),
    ours("hand_back", Flag),
    ours("target_like_source", Flag),
    ours("compat", Text),
    ours("description", Text),
    ours("source_context", Text),
    ours("target_context", Text),
    ours("source_domain", Text),
    ours("target_domain", Text),
    ours("source_api_prefix", Text),
    ours("target_api_prefix", Text),
    ours("filter_subjects", Any),
    ours("exclude_subjects", Any),
    ours("subject_transforms", Any),
    ours("on_reject", Text),
    ours("dead_letter", Any),
    ours("target_mode", Text),
    ours("on_source_loss", Text),
    ours("target_update", Flag),
    ours("loop_protection", Flag),
    ours("target_origin", Any),
    ours("consumers", Any),
    ours("ordering", Text),
    ours("limits", Any),
];

/// The first level.
pub(super) const FILE: &[FileField] = &[
    field("name", Text),
    field("loglevel", Text),
    field("logfile", Text),
    field("monitor_port", Whole(0, 65_535)),
    field("profiling", Flag),
    field("state_store", Text),
    tls("tls"),
    choria("choria"),
    field("heartbeats", Group(HEARTBEATS)),
    field("streams", Entries(STREAM)),
    ours("links", Entries(STREAM)),
    ours("adapters", Entries(ADAPTER)),
    ours("control", Group(CONTROL)),
];
