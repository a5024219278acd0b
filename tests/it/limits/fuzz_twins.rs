//! The bounded, seeded twins of the fuzz targets in `fuzz/`; the parser has another one beside it.
//! `SEED=<number>` runs the same inputs again.

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::json;

use super::properties::{self, SECRET};

const ROUNDS: usize = 20_000;

fn random() -> StdRng {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Up to `longest` of these pieces in a row.
fn words(random: &mut StdRng, longest: usize, pieces: &[&str]) -> String {
    let count = random.random_range(0..=longest);
    (0..count).filter_map(|_| pieces.choose(random).copied()).collect()
}

/// A few bytes of it are changed, so that it is no more text for certain.
fn noise(random: &mut StdRng, text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    for _ in 0..random.random_range(0..4) {
        let at = random.random_range(0..=bytes.len());
        match random.random_range(0..4) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => bytes[at] = random.random(),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            _ => bytes.insert(at, random.random()),
        }
    }
    bytes
}

const URL: [&str; 40] = [
    "nats://",
    "tls://",
    "ws://",
    "wss://",
    "http://",
    "://",
    "u",
    "p",
    ":",
    "@",
    "h",
    "127.0.0.1",
    "[::1]",
    "[",
    "]",
    ":4222",
    ":0",
    ":99999",
    ",",
    "/",
    "?",
    "&",
    "=",
    "credentials=",
    "/a/b.creds",
    "nkey=",
    "jwt=",
    "insecure=",
    "true",
    "false",
    "tls_handshake_first",
    "connect_timeout=",
    "1500ms",
    "5s",
    "1h30m",
    "%2C",
    "%",
    "%ff",
    "***",
    " ",
];

#[test]
fn any_text_is_a_url_or_told_to_be_none() {
    let mut random = random();
    for _ in 0..ROUNDS {
        let text = words(&mut random, 12, &URL);
        let text = noise(&mut random, &text);
        properties::url(&String::from_utf8_lossy(&text));
    }
}

#[test]
fn valid_urls_are_shown_so_that_they_can_be_read_again() {
    let mut random = random();
    for _ in 0..ROUNDS {
        let pick = |random: &mut StdRng, from: &[&str]| (*from.choose(random).expect("some")).to_owned();
        let scheme = pick(&mut random, &["nats://", "tls://", "", "NATS://"]);
        let user = pick(&mut random, &["", "u:p@", "token@", "u%40:p%2F@", "u:@", "u:p:q@", "a/b:c@"]);
        let hosts = pick(&mut random, &["h", "h:1", "h,i:2", "[::1]:5", "127.0.0.1/", "a_b.c-d"]);
        let mut options = Vec::new();
        for option in ["tls_handshake_first", "insecure=1", "connect_timeout=1500ms", "connect_timeout=90s"] {
            if random.random_bool(0.3) {
                options.push(option.to_owned());
            }
        }
        if user.is_empty() {
            options.push(pick(&mut random, &["credentials=/a%20b", "nkey=n&jwt=j", "nkey=%25", ""]));
        }
        properties::url(&format!("{scheme}{user}{hosts}?{}", options.join("&")));
    }
}

#[test]
fn a_password_is_never_shown_whatever_stands_around_it() {
    let mut random = random();
    for _ in 0..ROUNDS {
        let [before, after, host] = [(); 3].map(|()| words(&mut random, 4, &URL));
        properties::secret_url(&before, &after, &host);
    }
}

#[test]
fn any_bytes_are_a_document_or_told_to_be_none() {
    // Found by fuzzing.
    properties::document(br#"" i://t ist@em ""#);
    let mut random = random();
    for _ in 0..ROUNDS / 4 {
        let mut document =
            json!({"stream": "ORDERS", "source_url": format!("nats://u:{SECRET}@h"), "target_url": "tls://h:1"});
        let fields = [
            ("name", json!("east")),
            ("target_url", json!(words(&mut random, 8, &URL))),
            ("description", json!(words(&mut random, 8, &URL))),
            ("filter_subject", json!(words(&mut random, 5, &["a", ".", "*", ">", " "]))),
            ("target_subject_prefix", json!(words(&mut random, 5, &["a", ".", "*", ">", " "]))),
            ("max_age", json!(words(&mut random, 5, &["1", "9", "h", "ms", "M", ".", "-"]))),
            ("start_time", json!("2026-01-01T00:00:00Z")),
            ("limits", json!({"messages_in_flight": random.random::<i64>(), "bytes_in_flight": 1e6})),
            ("tls", json!({"ca": "/ca", "cert": "/c", "key": "/k"})),
            ("colour", json!([[["***"]], {"a": 1e308}])),
        ];
        for (field, value) in fields {
            if random.random_bool(0.2) {
                document[field] = value;
            }
        }
        let bytes = document.to_string();
        properties::document(bytes.as_bytes());
        properties::document(&noise(&mut random, &bytes));
    }
}

#[test]
fn subjects_are_mapped_as_a_second_opinion_has_it() {
    let mut random = random();
    const PIECES: [&str; 7] = ["a", "b", "ab", ".", "..", "é", "$KV"];
    for _ in 0..ROUNDS {
        let [prefix, remove, subject] = [3, 3, 10].map(|longest| words(&mut random, longest, &PIECES));
        properties::mapping(&prefix, &remove, &subject);
    }
}

#[test]
fn what_is_said_of_patterns_holds_for_every_subject_in_them() {
    let mut random = random();
    const SRC: [&str; 6] = ["a", "b", ".", ".", "*", ">"];
    const DEST: [&str; 16] = [
        "a",
        "b",
        ".",
        ".",
        ".",
        "$1",
        "$2",
        "{{wildcard(1)}}",
        "{{wildcard(2)}}",
        "{{partition(2,1)}}",
        "{{partition(3)}}",
        "{{left(1,1)}}",
        "{{sliceFromLeft(2,1)}}",
        "{{split(1,b)}}",
        "{{",
        ">",
    ];
    const TOKENS: [&str; 6] = ["a", "b", "ab", "aba", "bb", "\u{e9}b"];
    let mut read = 0;
    for _ in 0..ROUNDS {
        let count = random.random_range(1..4);
        let pairs: Vec<(String, String)> = (0..count)
            .map(|_| {
                // Right often enough: one token each, with dots between.
                let mut src = (0..random.random_range(1..4))
                    .filter_map(|_| ["a", "b", "*", "*"].choose(&mut random).copied())
                    .collect::<Vec<_>>();
                let mut dest = (0..random.random_range(1..4))
                    .filter_map(|_| DEST.choose(&mut random).copied())
                    .filter(|t| *t != ".")
                    .collect::<Vec<_>>();
                if random.random_bool(0.3) {
                    src.push(">");
                    dest.retain(|token| *token != ">");
                    dest.push(">");
                }
                match random.random_range(0..10) {
                    0 => (words(&mut random, 6, &SRC), words(&mut random, 6, &DEST)),
                    _ => (src.join("."), dest.join(".")),
                }
            })
            .collect();
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(src, dest)| (src.as_str(), dest.as_str())).collect();
        let mut subject = || {
            let count = random.random_range(1..5);
            (0..count).filter_map(|_| TOKENS.choose(&mut random).copied()).collect::<Vec<_>>().join(".")
        };
        let subjects = [subject(), subject()];
        read += usize::from(properties::transforms(&pairs, [&subjects[0], &subjects[1]]));
    }
    assert!(read > ROUNDS / 20, "only {read} were read");
}

const NUMBERS: [&str; 12] = [
    "0",
    "1",
    "2",
    "3",
    "7",
    "8",
    "9",
    "500",
    "4611686018427387904",
    "4611686018427387905",
    "9999999999999999999",
    "18446744073709551615",
];

/// Text with each `#` replaced by a number.
fn numbered(random: &mut StdRng, text: &str) -> String {
    let mut parts = text.split('#');
    let mut numbered = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        numbered += NUMBERS.choose(random).copied().unwrap_or_default();
        numbered += part;
    }
    numbered
}

/// A message as a server could send it, or nearly so.
fn message(random: &mut StdRng) -> Vec<u8> {
    let subject =
        ["_I.2.#", "_I.2.7.#.fail.#.#.$FI", "_I.2.7", "_I.2", "_I.2.", "_I", "x", "_I.r.#", "_I.2.8.#.fail.#.1.$FI"];
    let reply = [
        "",
        "",
        "$JS.ACK.S.C.1.#.#.1700000000000000000.#",
        "$JS.ACK.S.C.#.#.1.#.#",
        "$JS.ACK.S.C.1.#.1.#.#",
        "$JS.ACK.d.h.S.C.1.#.#.#.#.t",
        "$JS.ACK.",
        "$JS.ACK.......",
        "$JS.FC.S.C.x",
    ];
    let header = [
        "",
        "",
        "NATS/1.0 503\r\n\r\n",
        "NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: #\r\nNats-Last-Stream: #\r\nNats-Consumer-Stalled: x\r\n\r\n",
        "NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: #\r\nNats-Pending-Bytes: #\r\n\r\n",
        "NATS/1.0 409 Message Size Exceeds MaxBytes\r\nNats-Pending-Bytes: #\r\n\r\n",
        "NATS/1.0 409 Batch Completed\r\n\r\n",
        "NATS/1.0\r\nNats-TTL: #\r\nNats-Msg-Id: a\r\nChoria-SR-Source: S # SITE SITE #\r\n\r\n",
        "NATS/1.0",
        "\n",
    ];
    let payload = [
        "",
        "x",
        r#"{"type":"ack","seq":#,"msgs":#}"#,
        r#"{"type":"gap","last_seq":#,"seq":#}"#,
        r#"{"type":"err","seq":#,"error":{"code":400,"err_code":10071,"description":"wrong last sequence: #"}}"#,
        r#"{"error":{"code":400,"err_code":10060,"description":"expected stream does not match"}}"#,
        r#"{"stream":"T","seq":#,"batch":"7","count":#}"#,
        r#"{"stream":"T","seq":#}"#,
        r#"{"stream":"T","seq":#,"duplicate":true}"#,
        r#"{"config":{"name":"T","max_age":#},"state":{"messages":#,"first_seq":#,"last_seq":#,"bytes":#}}"#,
        r#"{"config":[#],"state":{"first_seq":#}}"#,
        r#"{"config":{"max_ack_pending":#},"num_pending":#,"delivered":{"consumer_seq":#,"stream_seq":#},"num_ack_pending":#}"#,
        r#"{"message":{"seq":#,"subject":"t.a","time":"2026-01-01T00:00:00Z"}}"#,
        r#"{"message":{"seq":#,"time":"9999-12-31T23:59:59Z","hdrs":"TkFUUy8xLjA="}}"#,
    ];
    let pick = |random: &mut StdRng, from: &[&str]| {
        let picked = from.choose(random).copied().unwrap_or_default();
        numbered(random, picked)
    };
    let (subject, reply) = (pick(random, &subject), pick(random, &reply));
    let (header, payload) = (pick(random, &header), pick(random, &payload));
    let sid = if random.random_bool(0.7) { 2 } else { random.random_range(0..4) };
    let (head, size) = (header.len(), header.len() + payload.len());
    format!("HMSG {subject} {sid} {reply} {head} {size}\r\n{header}{payload}\r\n").into_bytes()
}

#[test]
fn whatever_a_server_sends_the_writer_and_the_readers_live() {
    // A subject shorter than the inbox.
    assert_eq!(properties::wire(b"MSG x 2 0\r\n\r\n"), Some(1));
    let mut random = random();
    let mut fed = 0;
    for _ in 0..ROUNDS / 4 {
        let mut bytes = Vec::new();
        for _ in 0..random.random_range(1..8) {
            bytes.extend(message(&mut random));
        }
        fed += properties::wire(&bytes).unwrap_or_default();
        if random.random_bool(0.2) {
            let at = random.random_range(0..bytes.len());
            bytes[at] = random.random();
            properties::wire(&bytes);
        }
    }
    assert!(fed > ROUNDS / 4, "only {fed} messages were fed");
}
