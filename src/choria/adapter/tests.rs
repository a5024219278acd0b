//! Messages as nodes publish them, see `tests/data/choria-adapter.json`, and what is done to them.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rand::{RngExt as _, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use super::*;

const VECTORS: &str = include_str!("../../../tests/data/choria-adapter.json");

struct Vector {
    name: String,
    ingest: IngestProtocol,
    input: String,
    output: String,
}

fn vectors() -> Vec<Vector> {
    let file: Value = serde_json::from_str(VECTORS).unwrap();
    let text = |vector: &Value, name: &str| vector[name].as_str().unwrap().to_owned();
    let all = file["vectors"].as_array().unwrap().iter().map(|vector| Vector {
        name: text(vector, "name"),
        ingest: if vector["ingest"] == "request" { IngestProtocol::Request } else { IngestProtocol::Reply },
        input: text(vector, "in"),
        output: text(vector, "out"),
    });
    all.collect()
}

fn vector(name: &str) -> Vector {
    vectors().into_iter().find(|vector| vector.name == name).unwrap()
}

fn encoded(decoded: &Decoded) -> String {
    let mut out = Vec::new();
    OutputProtocol::ChoriaStreams.encode(decoded, &mut out);
    String::from_utf8(out).unwrap()
}

/// The layers of a message, to change them.
#[derive(Clone)]
struct Layers {
    ingest: IngestProtocol,
    transport: Value,
    secure: Value,
    inner: Value,
    names: [&'static str; 2],
}

impl Layers {
    fn of(name: &str) -> Self {
        let Vector { ingest, input, .. } = vector(name);
        let of_base64 = |value: &Value| -> Value {
            serde_json::from_slice(&STANDARD.decode(value.as_str().unwrap()).unwrap()).unwrap()
        };
        let transport: Value = serde_json::from_str(&input).unwrap();
        let secure = of_base64(&transport["data"]);
        let names = match (name.starts_with("v2"), ingest) {
            (false, _) => ["message", "v1"],
            (true, IngestProtocol::Request) => ["request", "v2"],
            (true, IngestProtocol::Reply) => ["reply", "v2"],
        };
        let inner = match names[1] {
            "v1" => serde_json::from_str(secure["message"].as_str().unwrap()).unwrap(),
            _ => of_base64(&secure[names[0]]),
        };
        Self { ingest, transport, secure, inner, names }
    }

    fn bytes(&self) -> Vec<u8> {
        self.with_inner(self.inner.to_string().as_bytes())
    }

    fn with_inner(&self, inner: &[u8]) -> Vec<u8> {
        let mut secure = self.secure.clone();
        secure[self.names[0]] = match self.names[1] {
            "v1" => String::from_utf8(inner.to_vec()).unwrap().into(),
            _ => STANDARD.encode(inner).into(),
        };
        self.with_secure(secure.to_string().as_bytes())
    }

    fn with_secure(&self, secure: &[u8]) -> Vec<u8> {
        let mut transport = self.transport.clone();
        transport["data"] = STANDARD.encode(secure).into();
        transport.to_string().into_bytes()
    }

    fn decode(&self) -> Result<Decoded, Discard> {
        decode(self.ingest, &self.bytes())
    }
}

/// What becomes of a message after a change.
#[track_caller]
fn after(name: &str, change: impl FnOnce(&mut Layers)) -> Result<Decoded, Discard> {
    let mut layers = Layers::of(name);
    change(&mut layers);
    layers.decode()
}

fn without(object: &mut Value, field: &str) {
    assert!(object.as_object_mut().unwrap().remove(field).is_some(), "{field}");
}

#[test]
fn vectors_become_the_bytes_of_choria() {
    for Vector { name, ingest, input, output } in vectors() {
        let decoded = decode(ingest, input.as_bytes()).unwrap();
        assert_eq!(encoded(&decoded), output, "{name}");
        assert_eq!(Layers::of(&name).decode(), Ok(decoded), "{name}");
    }
    assert_eq!(vectors().len(), 5);
}

#[test]
fn the_output_for_older_readers_has_no_request() {
    let decoded = Layers::of("v2_reply").decode().unwrap();
    let mut out = Vec::new();
    OutputProtocol::JetStream.encode(&decoded, &mut out);
    let expect = r#"{"protocol":"choria:adapters:jetstream:output:1","data":"{\"statuscode\":0,\"statusmsg\":\"OK\",\"data\":{\"pong\":1577873472}}","sender":"n1.example.net","time":"2020-01-01T10:11:12.12345Z"}"#;
    assert_eq!(String::from_utf8(out).unwrap(), expect);
}

#[test]
fn texts_are_escaped_as_go_does() {
    let data = "\u{0}\u{1f}\u{8}\u{c}\n\r\t\"\\/<a href='x'>&\u{7f}é\u{2028}\u{2029}\u{2027}€".to_owned();
    let decoded = Decoded { data, ..Layers::of("v1_reply").decode().unwrap() };
    let expect = concat!(
        r#""data":"\u0000\u001f\b\f\n\r\t\"\\/\u003ca href='x'\u003e\u0026"#,
        "\u{7f}é",
        r"\u2028\u2029",
        "\u{2027}€\","
    );
    let out = encoded(&decoded);
    assert!(out.contains(expect), "{out}");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["data"], decoded.data);
}

#[test]
fn times_have_no_zeros_at_the_end() {
    let check = |nanoseconds: i64, expect: &str| {
        let changed = after("v2_request", |layers| layers.inner["time"] = nanoseconds.into()).unwrap();
        let out = encoded(&changed);
        assert!(out.contains(&format!("\"time\":\"{expect}\"")), "{out}");
    };
    check(1_577_873_472_000_000_000, "2020-01-01T10:11:12Z");
    check(1_577_873_472_100_000_000, "2020-01-01T10:11:12.1Z");
    check(1_577_873_472_000_000_001, "2020-01-01T10:11:12.000000001Z");
    check(1, "1970-01-01T00:00:00.000000001Z");
    check(i64::MAX, "2262-04-11T23:47:16.854775807Z");
}

#[test]
fn a_time_without_a_year_of_four_digits_is_discarded() {
    let v1 = |seconds: i64| after("v1_request_z", |layers| layers.inner["envelope"]["time"] = seconds.into());
    assert!(v1(253_402_300_799).is_ok());
    assert_eq!(v1(253_402_300_800), Err(Discard::Time));
    assert_eq!(v1(i64::MAX), Err(Discard::Time));
    assert!(v1(-62_167_219_200).is_ok());
    assert_eq!(v1(-62_167_219_201), Err(Discard::Time));
}

#[test]
fn layers_of_another_protocol_are_discarded() {
    for name in ["v1_request_z", "v2_request", "v1_reply", "v2_reply"] {
        for protocol in [json!("choria:transport:2"), json!(null), json!("")] {
            let changed = after(name, |layers| layers.transport["protocol"] = protocol.clone());
            assert_eq!(changed, Err(Discard::Protocol), "{name} {protocol}");
        }
        let other = if name.starts_with("v1") { "v2" } else { "v1" };
        let other = Layers::of(
            &format!("{other}_{}", if name.contains("reply") { "reply" } else { "request" })
                .replace("v1_request", "v1_request_z"),
        );
        let changed = after(name, |layers| layers.transport["protocol"] = other.transport["protocol"].clone());
        assert_eq!(changed, Err(Discard::Protocol), "{name}");
        let changed = after(name, |layers| layers.secure["protocol"] = other.secure["protocol"].clone());
        assert_eq!(changed, Err(Discard::Protocol), "{name}");
        // Of the innermost layer, requests are checked, and replies are not.
        let changed = after(name, |layers| layers.inner["protocol"] = other.inner["protocol"].clone());
        assert_eq!(changed.is_ok(), name.contains("reply"), "{name}");
        // A request where replies are expected, and the other way round.
        let layers = Layers::of(name);
        let turned = match layers.ingest {
            IngestProtocol::Request => IngestProtocol::Reply,
            IngestProtocol::Reply => IngestProtocol::Request,
        };
        assert_eq!(decode(turned, &layers.bytes()), Err(Discard::Protocol), "{name}");
    }
}

#[test]
fn a_null_is_refused_where_choria_panics() {
    for name in ["v1_request_z", "v2_request", "v1_reply", "v2_reply"] {
        for headers in [json!(null), json!("x"), json!([1])] {
            let changed = after(name, |layers| layers.transport["headers"] = headers.clone());
            assert_eq!(changed, Err(Discard::Malformed), "{name} {headers}");
        }
        assert!(after(name, |layers| without(&mut layers.transport, "headers")).is_ok(), "{name}");
        assert!(after(name, |layers| layers.transport["headers"] = json!({})).is_ok(), "{name}");
    }
    let envelope = |name: &str, value: Value| after(name, |layers| layers.inner["envelope"] = value);
    assert_eq!(envelope("v1_reply", json!(null)), Err(Discard::Malformed));
    assert_eq!(envelope("v1_request_z", json!(null)), Err(Discard::Schema));
    assert_eq!(after("v1_reply", |layers| without(&mut layers.inner, "envelope")), Err(Discard::Sender));
}

#[test]
fn requests_follow_their_schemas() {
    let check = |name: &str, good: bool, change: &dyn Fn(&mut Layers)| {
        let changed = after(name, change);
        let layers = {
            let mut layers = Layers::of(name);
            change(&mut layers);
            layers
        };
        assert_eq!(changed.is_ok(), good, "{name}: {changed:?} of {}", layers.inner);
    };
    let v1 = |good: bool, field: &str, value: Value| {
        check("v1_request_z", good, &|layers| layers.inner["envelope"][field] = value.clone());
    };
    v1(false, "requestid", json!("a".repeat(31)));
    v1(false, "requestid", json!("a".repeat(33)));
    v1(true, "requestid", json!("é".repeat(32)));
    v1(false, "requestid", json!(1));
    v1(false, "ttl", json!(29));
    v1(true, "ttl", json!(30));
    v1(false, "ttl", json!(30.5));
    v1(false, "ttl", json!("60"));
    v1(true, "time", json!(0));
    v1(false, "time", json!("1577873472"));
    v1(false, "callerid", json!(""));
    v1(false, "collective", json!(""));
    v1(false, "agent", json!(""));
    v1(false, "filter", json!(null));
    v1(false, "filter", json!({"fact": [], "cf_class": [], "identity": []}));
    v1(true, "filter", json!({"fact": [], "cf_class": ["a"], "identity": ["b"], "compound": [[{"x": 1}]]}));
    v1(true, "filter", json!({"fact": [], "cf_class": [], "identity": [], "compound": ["x"], "agent": ["a"]}));
    v1(false, "filter", json!({"fact": [], "cf_class": [1], "identity": [], "compound": []}));
    let fact = |operator: &str| {
        json!({"fact": [{"fact": "a", "operator": operator, "value": "b"}], "cf_class": [],
        "identity": [], "compound": []})
    };
    v1(true, "filter", fact("=~"));
    v1(false, "filter", fact("=>"));
    v1(true, "more", json!({"unknown": true}));
    for field in ["requestid", "senderid", "callerid", "collective", "agent", "ttl", "time", "filter"] {
        check("v1_request_z", false, &|layers| without(&mut layers.inner["envelope"], field));
    }
    let v2 = |good: bool, field: &str, value: Value| {
        check("v2_request", good, &|layers| layers.inner[field] = value.clone());
    };
    v2(true, "id", json!("x"));
    v2(false, "id", json!(""));
    v2(true, "ttl", json!(1));
    v2(false, "ttl", json!(0));
    v2(false, "time", json!(0));
    v2(false, "time", json!(u64::MAX));
    v2(false, "filter", json!(null));
    v2(false, "message", json!(""));
    v2(false, "message", json!("not base64"));
    check("v2_request", true, &|layers| without(&mut layers.inner, "filter"));
    for field in ["message", "id", "sender", "caller", "collective", "agent", "ttl", "time", "protocol"] {
        check("v2_request", false, &|layers| without(&mut layers.inner, field));
    }
    for field in ["signature", "pubcert", "message", "protocol"] {
        let missing = |layers: &mut Layers| layers.secure[field] = json!("");
        if field != "message" {
            check("v1_request_z", false, &missing);
        }
    }
    for field in ["signature", "caller"] {
        check("v2_request", false, &|layers| without(&mut layers.secure, field));
    }
    check("v2_request", false, &|layers| layers.secure["signer"] = json!(null));
    // Keys of a schema are exact.
    check("v2_request", false, &|layers| {
        let sender = layers.inner["sender"].clone();
        without(&mut layers.inner, "sender");
        layers.inner["Sender"] = sender;
    });
}

#[test]
fn replies_only_have_to_be_readable() {
    let good = |name: &str, change: &dyn Fn(&mut Layers)| {
        let changed = after(name, change);
        assert!(changed.is_ok(), "{name}: {changed:?}");
        changed.unwrap()
    };
    for name in ["v1_reply", "v2_reply"] {
        good(name, &|layers| layers.secure["hash"] = json!(""));
        good(name, &|layers| without(&mut layers.secure, "hash"));
        good(name, &|layers| layers.secure["hash"] = json!("d3Jvbmc="));
        assert_eq!(good(name, &|layers| layers.inner["message"] = json!("")).data, "");
        assert_eq!(good(name, &|layers| layers.inner["message"] = json!(null)).data, "");
    }
    assert_eq!(good("v1_reply", &|layers| without(&mut layers.inner["envelope"], "time")).time.timestamp(), 0);
    assert_eq!(good("v2_reply", &|layers| without(&mut layers.inner, "request")).request, "");
    // Keys of Go's are not exact, and the last one counts.
    let inner = r#"{"MESSAGE":"Zmlyc3Q=","Message":"c2Vjb25k","SENDER":"n2","time":1}"#;
    let layers = Layers::of("v2_reply");
    let decoded = decode(layers.ingest, &layers.with_inner(inner.as_bytes())).unwrap();
    assert_eq!((decoded.data.as_str(), decoded.sender.as_str()), ("second", "n2"));
    for value in [json!(1), json!([]), json!({})] {
        assert_eq!(after("v2_reply", |layers| layers.inner["sender"] = value.clone()), Err(Discard::Malformed));
    }
}

#[test]
fn wrong_signatures_are_accepted_as_in_choria() {
    for name in ["v1_request_z", "v2_request"] {
        assert!(after(name, |layers| layers.secure["signature"] = json!("d3Jvbmc=")).is_ok(), "{name}");
    }
}

#[test]
fn bytes_that_are_no_layer_are_discarded() {
    for name in ["v1_request_z", "v2_request", "v1_reply", "v2_reply"] {
        let layers = Layers::of(name);
        let bytes = layers.bytes();
        let discarded = |bytes: &[u8]| decode(layers.ingest, bytes).unwrap_err();
        assert_eq!(discarded(b""), Discard::Malformed);
        assert_eq!(discarded(b"null"), Discard::Malformed);
        assert_eq!(discarded(&bytes[..bytes.len() - 1]), Discard::Malformed);
        assert_eq!(discarded(&[&bytes[..], b"x"].concat()), Discard::Malformed);
        for data in [json!("%%%"), json!("e30"), json!(null), json!(5), json!("bnVsbA==")] {
            let changed = after(name, |_| ());
            assert!(changed.is_ok());
            let mut transport = layers.transport.clone();
            transport["data"] = data;
            assert_eq!(discarded(transport.to_string().as_bytes()), Discard::Malformed);
        }
        for inner in ["", "null", "[]", "{"] {
            let found = discarded(&layers.with_inner(inner.as_bytes()));
            assert!(matches!(found, Discard::Malformed | Discard::Schema), "{name} {inner} {found:?}");
        }
    }
}

#[test]
fn payloads_that_are_not_utf_8_are_replaced_byte_by_byte() {
    let changed = after("v2_request", |layers| layers.inner["message"] = STANDARD.encode(b"a\xe2\x82b\xff").into());
    assert_eq!(changed.unwrap().data, "a\u{fffd}\u{fffd}b\u{fffd}");
    // Go skips line breaks in base64.
    let changed = after("v2_request", |layers| layers.inner["message"] = "aGVs\r\nbG8=".into());
    assert_eq!(changed.unwrap().data, "hello");
}

#[test]
fn senders_that_would_change_a_subject_are_discarded() {
    let long = "a".repeat(513);
    let bad =
        ["", "a b", "a*", "*", "a.>", ">", ".a", "a.", "a..b", "a\tb", "a\r\nPUB x 0", "a\u{a0}b", "\u{0}", &long];
    for name in ["v1_request_z", "v1_reply"] {
        for sender in bad {
            let changed = after(name, |layers| layers.inner["envelope"]["senderid"] = sender.into());
            assert_eq!(changed, Err(Discard::Sender), "{name} {sender:?}");
        }
    }
    for sender in bad.into_iter().filter(|sender| !sender.is_empty()) {
        let changed = after("v2_request", |layers| layers.inner["sender"] = sender.into());
        assert_eq!(changed, Err(Discard::Sender), "{sender:?}");
    }
    for sender in ["n1", "n1.example.net", "bücher.example", "a$b"] {
        let changed = after("v2_reply", |layers| layers.inner["sender"] = sender.into()).unwrap();
        assert_eq!(changed.sender, sender);
    }
}

#[test]
fn every_sign_for_the_sender_is_replaced() {
    assert_eq!(expand_topic("in.%s", "n1.example.net"), "in.n1.example.net");
    assert_eq!(expand_topic("in.%s.x.%s", "n1"), "in.n1.x.n1");
    assert_eq!(expand_topic("in", "n1"), "in");
}

#[test]
fn an_id_is_that_of_request_sender_and_agent() {
    let base = Layers::of("v2_reply").decode().unwrap();
    let id = |change: &dyn Fn(&mut Decoded)| {
        let mut changed = base.clone();
        change(&mut changed);
        changed.message_id()
    };
    let own = base.message_id();
    assert!(own.iter().all(u8::is_ascii_hexdigit));
    assert_eq!(id(&|message| message.data = "other".into()), own);
    assert_ne!(id(&|message| message.sender = "n2".into()), own);
    assert_ne!(id(&|message| message.agent = "other".into()), own);
    assert_ne!(id(&|message| message.request = "other".into()), own);
    // Parts do not run into each other.
    let moved = |message: &mut Decoded, request: &str, sender: &str| {
        (message.request, message.sender) = (request.into(), sender.into());
    };
    assert_ne!(id(&|message| moved(message, "ab", "c")), id(&|message| moved(message, "a", "bc")));
    let nameless = id(&|message| message.request.clear());
    assert_ne!(id(&|message| (message.request, message.data) = (String::new(), "other".into())), nameless);
}

/// The vectors are signed by the key that signed their token.
#[test]
fn signatures_are_verified_where_that_is_wanted() {
    const SIGNER: &str = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8";
    const NOW: i64 = 1_800_000_000;
    let trusted = TrustedSigners::new([SIGNER]).unwrap();
    let Vector { ingest, input, .. } = vector("v2_request");
    let verified = |input: &[u8], trusted: &TrustedSigners, now: i64| decode_verified(ingest, input, trusted, now);
    assert_eq!(verified(input.as_bytes(), &trusted, NOW), decode(ingest, input.as_bytes()));
    // Another key, a token that has expired, another version, another content, another sender, a signer beside the sender.
    let other = TrustedSigners::new(["00".repeat(32).as_str()]).unwrap();
    let unverified = Err(Discard::Unverified);
    assert_eq!(verified(input.as_bytes(), &other, NOW), unverified);
    assert_eq!(verified(input.as_bytes(), &trusted, 4_102_444_800), unverified);
    assert_eq!(verified(vector("v1_request_z").input.as_bytes(), &trusted, NOW), unverified);
    let changed = |change: &dyn Fn(&mut Layers)| {
        let mut layers = Layers::of("v2_request");
        change(&mut layers);
        verified(&layers.bytes(), &trusted, NOW)
    };
    assert_eq!(changed(&|layers| layers.inner["agent"] = json!("other")), unverified);
    assert_eq!(changed(&|layers| layers.inner["sender"] = json!("n2.example.net")), unverified);
    assert_eq!(changed(&|layers| layers.secure["signature"] = json!("d3Jvbmc=")), unverified);
    assert_eq!(changed(&|layers| layers.secure["signer"] = json!("x")), unverified);
    let reply = decode_verified(IngestProtocol::Reply, vector("v2_reply").input.as_bytes(), &trusted, NOW);
    assert_eq!(reply, unverified);
    assert_eq!(TrustedSigners::new(["abc"]), Err("abc"));
}

/// Mutations of bytes in every layer: each is decoded or has a reason, none panics, and what is decoded can be published.
#[test]
fn mutations_are_decoded_or_discarded() {
    let mut random = StdRng::seed_from_u64(17);
    let names = ["v1_request_z", "v1_request_plain", "v2_request", "v1_reply", "v2_reply"];
    let (mut decoded, mut discarded) = (0, 0);
    for round in 0..2_000 {
        let layers = Layers::of(names[round % names.len()]);
        let depth = random.random_range(0..3);
        let mut bytes = match depth {
            0 => layers.bytes(),
            1 => serde_json::to_vec(&layers.secure).unwrap(),
            _ => serde_json::to_vec(&layers.inner).unwrap(),
        };
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..5) {
                0 => bytes[at] = random.random(),
                1 => _ = bytes.remove(at),
                2 => bytes.insert(at, random.random()),
                3 => bytes.truncate(at.max(1)),
                _ => bytes[at] = b"{}[]\",:0n"[random.random_range(0..9)],
            }
        }
        let message = match depth {
            0 => bytes,
            1 => layers.with_secure(&bytes),
            _ if layers.names[1] == "v1" => layers.with_inner(String::from_utf8_lossy(&bytes).as_bytes()),
            _ => layers.with_inner(&bytes),
        };
        match decode(layers.ingest, &message) {
            Ok(message) => {
                decoded += 1;
                let out = encoded(&message);
                assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["data"], message.data, "{round}");
                assert!(!expand_topic("a.%s", &message.sender).contains([' ', '*', '>']), "{round}");
            }
            Err(_) => discarded += 1,
        }
    }
    assert!(decoded > 100 && discarded > 1_000, "{decoded} decoded, {discarded} discarded");
}
