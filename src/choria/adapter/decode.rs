//! From the bytes that a node published to what an adapter passes on.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, Datelike, Utc};

use super::{
    node::{JsonNode, Keys},
    verify::TrustedSigners,
};

/// The first layer's `protocol` of both versions, and those of the layers in it.
const TRANSPORT: [&str; 2] = ["choria:transport:1", "io.choria.protocol.v2.transport"];
const SECURE_REQUEST: [&str; 2] = ["choria:secure:request:1", "io.choria.protocol.v2.secure_request"];
const SECURE_REPLY: [&str; 2] = ["choria:secure:reply:1", "io.choria.protocol.v2.secure_reply"];
const REQUEST: [&str; 2] = ["choria:request:1", "io.choria.protocol.v2.request"];

/// Longest sender that is published: it becomes a part of a subject, and Choria's identities are host names.
const LONGEST_SENDER: usize = 512;
/// Operators that a fact filter may have.
const OPERATORS: [&str; 7] = [">=", "<=", "<", ">", "!=", "==", "=~"];

/// What an adapter reads: the messages of its subject are of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IngestProtocol {
    /// Requests, such as registration data.
    Request,
    /// Replies of agents.
    #[default]
    Reply,
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// The payload for the agent, or of its reply.
    pub data: String,
    /// Identity of the sender; may be a part of a subject.
    pub sender: String,
    /// When it was sent, by the sender's clock; its year has four digits.
    pub time: DateTime<Utc>,
    /// Id of the request, which all replies to it share. May be empty in replies.
    pub request: String,
    /// The agent that it was sent to, or came from.
    pub agent: String,
}

/// Why a message is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Discard {
    /// A layer is not JSON or not base64, or a field has another type.
    Malformed,
    /// A layer has a protocol that is not known, or not that of the layers around it.
    Protocol,
    /// A request does not follow its schema.
    Schema,
    /// The sender cannot be a part of a subject: it is empty or too long, or has blanks, wildcards or empty tokens.
    Sender,
    /// The time has no year of four digits.
    Time,
    /// Signatures are verified, and this one is missing, wrong, of an unknown key, or of another sender.
    Unverified,
}

impl Discard {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Malformed, Self::Protocol, Self::Schema, Self::Sender, Self::Time, Self::Unverified];

    /// Its name in metrics, events and the status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Protocol => "protocol",
            Self::Schema => "schema",
            Self::Sender => "sender",
            Self::Time => "time",
            Self::Unverified => "unverified",
        }
    }
}

/// Versions of the protocol, as indexes.
const V1: usize = 0;
const V2: usize = 1;

/// Reads a message of either version.
///
/// # Errors
/// The reason to discard the message. Like Choria's broker this checks neither signature, hash, age nor caller.
pub fn decode(protocol: IngestProtocol, payload: &[u8]) -> Result<Decoded, Discard> {
    read(protocol, payload, |_, _| Ok(None))
}

/// The same, if the sender has signed the message, and a trusted key its token. `now` is in seconds since the Unix epoch.
///
/// # Errors
/// As [`decode`], and [`Discard::Unverified`]; messages of the first version have no such signatures.
pub fn decode_verified(
    protocol: IngestProtocol,
    payload: &[u8],
    trusted: &TrustedSigners,
    now: i64,
) -> Result<Decoded, Discard> {
    read(protocol, payload, |version, secure| {
        let text = |name: &str| field(secure, name).unwrap_or_default();
        let (content, token) = match protocol {
            IngestProtocol::Request => (text("request"), text("caller")),
            IngestProtocol::Reply => (text("reply"), text("sender")),
        };
        if version != V2 || !text("signer").is_empty() {
            return Err(Discard::Unverified);
        }
        trusted.identity(content, text("signature"), token, now).map(Some).ok_or(Discard::Unverified)
    })
}

/// Reads a message; `verify` returns who has signed it, if that matters.
fn read(
    protocol: IngestProtocol,
    payload: &[u8],
    verify: impl FnOnce(usize, &JsonNode<'_>) -> Result<Option<String>, Discard>,
) -> Result<Decoded, Discard> {
    let text = text_of(payload);
    let transport = object(&text)?;
    let version = TRANSPORT.iter().position(|known| field(&transport, "protocol") == Some(known));
    let version = version.ok_or(Discard::Protocol)?;
    // Go's decoder sets the headers to nothing for `null`, and its next step fails on that.
    if transport.get("headers", Keys::AnyCase).is_some_and(|headers| !headers.is_object()) {
        return Err(Discard::Malformed);
    }
    let secure = base64_of(field(&transport, "data").unwrap_or_default())?;
    let secure = text_of(&secure);
    let secure = object(&secure)?;
    let signed_by = verify(version, &secure)?;
    let decoded = match protocol {
        IngestProtocol::Request => request(version, secure)?,
        IngestProtocol::Reply => reply(version, secure)?,
    };
    if signed_by.is_some_and(|identity| identity != decoded.sender) {
        return Err(Discard::Unverified);
    }
    check_sender(&decoded.sender)?;
    if !(0..=9999).contains(&decoded.time.year()) {
        return Err(Discard::Time);
    }
    Ok(decoded)
}

fn request(version: usize, mut secure: JsonNode<'_>) -> Result<Decoded, Discard> {
    check(secure.get("protocol", Keys::Exact).and_then(JsonNode::as_text) == Some(SECURE_REQUEST[version]))
        .map_err(|_| Discard::Protocol)?;
    let filled: &[&str] = match version {
        V1 => &["message", "signature", "pubcert"],
        _ => &["request", "signature", "caller"],
    };
    check(filled.iter().all(|name| is_filled(&secure, name)))?;
    check(version == V1 || secure.get("signer", Keys::Exact).is_none_or(|signer| signer.as_text().is_some()))?;
    let inner = inner(version, &mut secure, ["message", "request"])?;
    let mut request = object(&inner)?;
    check(request.get("protocol", Keys::Exact).and_then(JsonNode::as_text) == Some(REQUEST[version]))
        .map_err(|_| Discard::Protocol)?;
    check(is_filled(&request, "message"))?;
    if version == V1 {
        let envelope = request.take("envelope", Keys::Exact).ok_or(Discard::Schema)?;
        check_v1(&envelope)?;
        let seconds = number(&envelope, "time")?;
        let data = into_text(request.take("message", Keys::Exact));
        return Ok(Decoded {
            data,
            sender: owned(&envelope, "senderid")?,
            time: DateTime::from_timestamp(seconds, 0).ok_or(Discard::Time)?,
            request: owned(&envelope, "requestid")?,
            agent: owned(&envelope, "agent")?,
        });
    }
    check(["id", "sender", "caller", "collective", "agent"].iter().all(|name| is_filled(&request, name)))?;
    check(number(&request, "ttl")? >= 1)?;
    check(number(&request, "time")? >= 1)?;
    check(request.get("filter", Keys::Exact).is_none_or(is_filter))?;
    Ok(Decoded {
        data: into_payload(field(&request, "message").unwrap_or_default())?,
        sender: owned(&request, "sender")?,
        time: DateTime::from_timestamp_nanos(number(&request, "time")?),
        request: owned(&request, "id")?,
        agent: owned(&request, "agent")?,
    })
}

fn reply(version: usize, mut secure: JsonNode<'_>) -> Result<Decoded, Discard> {
    if field(&secure, "protocol") != Some(SECURE_REPLY[version]) {
        return Err(Discard::Protocol);
    }
    let inner = inner(version, &mut secure, ["message", "reply"])?;
    let mut reply = object(&inner)?;
    if version == V1 {
        let mut envelope = reply.take("envelope", Keys::AnyCase).unwrap_or(JsonNode::Object(Vec::new()));
        if !envelope.is_object() {
            return Err(Discard::Malformed);
        }
        let seconds = optional_number(&envelope)?;
        return Ok(Decoded {
            data: optional_text(&mut reply, "message")?,
            sender: optional_text(&mut envelope, "senderid")?,
            time: DateTime::from_timestamp(seconds, 0).ok_or(Discard::Time)?,
            request: optional_text(&mut envelope, "requestid")?,
            agent: optional_text(&mut envelope, "agent")?,
        });
    }
    Ok(Decoded {
        data: into_payload(&optional_text(&mut reply, "message")?)?,
        sender: optional_text(&mut reply, "sender")?,
        time: DateTime::from_timestamp_nanos(optional_number(&reply)?),
        request: optional_text(&mut reply, "request")?,
        agent: optional_text(&mut reply, "agent")?,
    })
}

/// The text of the innermost layer: as it is in the first version, in base64 in the second.
fn inner<'a>(version: usize, secure: &mut JsonNode<'a>, names: [&str; 2]) -> Result<Cow<'a, str>, Discard> {
    let Some(JsonNode::Text(text)) = secure.take(names[version], Keys::AnyCase) else { return Err(Discard::Malformed) };
    if version == V2 {
        return Ok(into_payload(&text)?.into());
    }
    Ok(text)
}

/// What the schema of a first version's request says of its envelope.
fn check_v1(envelope: &JsonNode<'_>) -> Result<(), Discard> {
    check(["callerid", "collective", "agent"].iter().all(|name| is_filled(envelope, name)))?;
    let id = envelope.get("requestid", Keys::Exact).and_then(JsonNode::as_text).ok_or(Discard::Schema)?;
    check(id.chars().count() == 32)?;
    check(envelope.get("senderid", Keys::Exact).is_some_and(|sender| sender.as_text().is_some()))?;
    check(number(envelope, "ttl")? >= 30)?;
    check(envelope.get("filter", Keys::Exact).is_some_and(is_filter))
}

/// What the schemas of both versions say of a filter.
fn is_filter(filter: &JsonNode<'_>) -> bool {
    let list = |name: &str, is: fn(&JsonNode<'_>) -> bool| {
        filter.get(name, Keys::Exact).is_some_and(|values| values.is_list_of(is))
    };
    let is_text = |value: &JsonNode<'_>| value.as_text().is_some();
    let is_fact = |fact: &JsonNode<'_>| {
        let operator = fact.get("operator", Keys::Exact).and_then(JsonNode::as_text);
        is_filled(fact, "fact") && is_filled(fact, "value") && operator.is_some_and(|one| OPERATORS.contains(&one))
    };
    let agents = filter.get("agent", Keys::Exact);
    list("fact", is_fact)
        && list("cf_class", is_text)
        && list("identity", is_text)
        && list("compound", |one| one.is_list_of(JsonNode::is_object) || is_text_node(one))
        && agents.is_none_or(|agents| agents.is_list_of(is_text))
}

/// The schema that Choria publishes has texts for compound filters; the one in its program, and the wire, have lists.
fn is_text_node(value: &JsonNode<'_>) -> bool {
    value.as_text().is_some()
}

fn check(good: bool) -> Result<(), Discard> {
    if good { Ok(()) } else { Err(Discard::Schema) }
}

/// Whether a schema's text that must not be empty is there.
fn is_filled(object: &JsonNode<'_>, name: &str) -> bool {
    object.get(name, Keys::Exact).and_then(JsonNode::as_text).is_some_and(|text| !text.is_empty())
}

fn number(object: &JsonNode<'_>, name: &str) -> Result<i64, Discard> {
    object.get(name, Keys::Exact).and_then(JsonNode::as_int).ok_or(Discard::Schema)
}

fn owned(object: &JsonNode<'_>, name: &str) -> Result<String, Discard> {
    object.get(name, Keys::Exact).and_then(JsonNode::as_text).map(str::to_owned).ok_or(Discard::Schema)
}

fn into_text(node: Option<JsonNode<'_>>) -> String {
    match node {
        Some(JsonNode::Text(text)) => text.into_owned(),
        _ => String::new(),
    }
}

/// A text of Go's: nothing and `null` are empty.
fn optional_text(object: &mut JsonNode<'_>, name: &str) -> Result<String, Discard> {
    match object.take(name, Keys::AnyCase) {
        None | Some(JsonNode::Null) => Ok(String::new()),
        Some(JsonNode::Text(text)) => Ok(text.into_owned()),
        Some(_) => Err(Discard::Malformed),
    }
}

/// The time of a reply; nothing and `null` are 0.
fn optional_number(object: &JsonNode<'_>) -> Result<i64, Discard> {
    match object.get("time", Keys::AnyCase) {
        None | Some(JsonNode::Null) => Ok(0),
        Some(JsonNode::Int(number)) => Ok(*number),
        Some(_) => Err(Discard::Malformed),
    }
}

fn field<'n>(object: &'n JsonNode<'_>, name: &str) -> Option<&'n str> {
    object.get(name, Keys::AnyCase).and_then(JsonNode::as_text)
}

fn object(text: &str) -> Result<JsonNode<'_>, Discard> {
    JsonNode::read(text).filter(JsonNode::is_object).ok_or(Discard::Malformed)
}

/// Base64 as Go reads it: line breaks in it do not count.
fn base64_of(text: &str) -> Result<Vec<u8>, Discard> {
    // Most of the work of an adapter: many characters at a time, but for the last ones, which may have padding.
    let (whole, end) = text.as_bytes().split_at(text.len().saturating_sub(1) / 4 * 4);
    if let Ok(mut decoded) = base64_simd::STANDARD_NO_PAD.decode_to_vec(whole)
        && STANDARD.decode_vec(end, &mut decoded).is_ok()
    {
        return Ok(decoded);
    }
    let decoded = match STANDARD.decode(text) {
        Err(_) if text.contains(['\r', '\n']) => STANDARD.decode(text.replace(['\r', '\n'], "")),
        decoded => decoded,
    };
    decoded.map_err(|_| Discard::Malformed)
}

fn into_payload(text: &str) -> Result<String, Discard> {
    Ok(match String::from_utf8(base64_of(text)?) {
        Ok(payload) => payload,
        Err(error) => text_of(error.as_bytes()).into_owned(),
    })
}

/// Bytes as a text: as Go has it, each byte that is not UTF-8 becomes one replacement character.
fn text_of(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return text.into();
    }
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    text.into()
}

/// Refuses a sender that would change the number of tokens of a subject, or its meaning.
fn check_sender(sender: &str) -> Result<(), Discard> {
    let legal = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '*' | '>');
    let tokens = sender.split('.').all(|token| !token.is_empty());
    let good = tokens && sender.len() <= LONGEST_SENDER && sender.chars().all(legal);
    if good { Ok(()) } else { Err(Discard::Sender) }
}
