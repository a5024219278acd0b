//! JSON as the layers of a message need it: texts borrowed from the bytes, object keys in their order. Go's rules where they
//! differ from serde's: keys match in any case, and the last of several counts.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};

/// A JSON value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum JsonNode<'a> {
    Null,
    Bool,
    Int(i64),
    /// A number that no `int64` of Go's can hold.
    Number,
    Text(Cow<'a, str>),
    List(Vec<Self>),
    Object(Vec<(Cow<'a, str>, Self)>),
}

/// How keys are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keys {
    /// As JSON schemas do.
    Exact,
    /// As Go's decoder does.
    AnyCase,
}

impl<'a> JsonNode<'a> {
    /// Reads a whole text.
    pub(super) fn read(text: &'a str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// The last value of a key of an object.
    pub(super) fn get(&self, key: &str, keys: Keys) -> Option<&Self> {
        let Self::Object(fields) = self else { return None };
        let is = |name: &str| match keys {
            Keys::Exact => name == key,
            Keys::AnyCase => name.eq_ignore_ascii_case(key),
        };
        fields.iter().rev().find(|(name, _)| is(name)).map(|(_, value)| value)
    }

    /// The same, to keep it.
    pub(super) fn take(&mut self, key: &str, keys: Keys) -> Option<Self> {
        let Self::Object(fields) = self else { return None };
        let is = |name: &str| match keys {
            Keys::Exact => name == key,
            Keys::AnyCase => name.eq_ignore_ascii_case(key),
        };
        let at = fields.iter().rposition(|(name, _)| is(name))?;
        Some(fields.swap_remove(at).1)
    }

    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(number) => Some(*number),
            _ => None,
        }
    }

    pub(super) fn is_object(&self) -> bool {
        matches!(self, Self::Object(_))
    }

    /// Whether it is a list of values of one kind.
    pub(super) fn is_list_of(&self, is: impl Fn(&Self) -> bool) -> bool {
        matches!(self, Self::List(values) if values.iter().all(is))
    }
}

impl<'de> Deserialize<'de> for JsonNode<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonNodeVisitor)
    }
}

/// A text, borrowed where nothing in it is escaped.
struct BorrowedText<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for BorrowedText<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(JsonNodeVisitor)? {
            JsonNode::Text(text) => Ok(Self(text)),
            _ => Err(D::Error::custom("a key is not a text")),
        }
    }
}

struct JsonNodeVisitor;

impl<'de> Visitor<'de> for JsonNodeVisitor {
    type Value = JsonNode<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(JsonNode::Null)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(JsonNode::Bool)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
        Ok(JsonNode::Int(number))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
        Ok(i64::try_from(number).map_or(JsonNode::Number, JsonNode::Int))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(JsonNode::Number)
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(JsonNode::Text(text.into()))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(JsonNode::Text(text.to_owned().into()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Self::Value, E> {
        Ok(JsonNode::Text(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element()? {
            values.push(value);
        }
        Ok(JsonNode::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Vec::new();
        while let Some((BorrowedText(key), value)) = map.next_entry()? {
            fields.push((key, value));
        }
        Ok(JsonNode::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_several_keys_counts_in_any_case() {
        let node = JsonNode::read(r#"{"a": 1, "A": 2, "b": null}"#).unwrap();
        assert_eq!(node.get("a", Keys::AnyCase), Some(&JsonNode::Int(2)));
        assert_eq!(node.get("a", Keys::Exact), Some(&JsonNode::Int(1)));
        assert_eq!(node.get("c", Keys::AnyCase), None);
        assert_eq!(node.clone().take("a", Keys::AnyCase), Some(JsonNode::Int(2)));
    }

    #[test]
    fn a_text_after_the_value_is_an_error() {
        assert_eq!(JsonNode::read("{} x"), None);
        assert_eq!(JsonNode::read(""), None);
        assert_eq!(JsonNode::read("18446744073709551615"), Some(JsonNode::Number));
    }
}
