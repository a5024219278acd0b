//! Replication documents as text, their fields in the order of the schema.

use std::{cell::RefCell, collections::BTreeMap, fmt, sync::LazyLock};

use serde::{
    Deserializer, Serialize, Serializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;

/// Where each field is in the schema, from its beginning.
static RANKS: LazyLock<BTreeMap<String, usize>> = LazyLock::new(|| {
    let names = RefCell::default();
    let mut schema = serde_json::Deserializer::from_str(include_str!("../../schemas/replication.json"));
    FieldNames { are_fields: false, names: &names }.deserialize(&mut schema).expect("the built-in schema is JSON");
    let mut ranks = BTreeMap::new();
    for (rank, name) in names.into_inner().into_iter().enumerate() {
        ranks.entry(name).or_insert(rank);
    }
    ranks
});

/// A document in one line, as it is stored.
pub fn compact_document(document: &Value) -> String {
    serde_json::to_string(&OrderedValue(document)).unwrap_or_default()
}

/// A document for people.
pub fn pretty_document(document: &Value) -> String {
    serde_json::to_string_pretty(&OrderedValue(document)).unwrap_or_default()
}

/// Fields that the schema does not have come last.
struct OrderedValue<'a>(&'a Value);

impl Serialize for OrderedValue<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                fields.sort_by_key(|(name, _)| RANKS.get(*name).copied().unwrap_or(usize::MAX));
                serializer.collect_map(fields.into_iter().map(|(name, value)| (name, OrderedValue(value))))
            }
            Value::Array(values) => serializer.collect_seq(values.iter().map(OrderedValue)),
            other => other.serialize(serializer),
        }
    }
}

/// Collects the names of all `properties` in the order of the text.
struct FieldNames<'a> {
    are_fields: bool,
    names: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for FieldNames<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FieldNames<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a part of a schema")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            let are_fields = name == "properties" && !self.are_fields;
            if self.are_fields {
                self.names.borrow_mut().push(name);
            }
            map.next_value_seed(FieldNames { are_fields, names: self.names })?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_in_the_order_of_the_schema() {
        let document = json!({"unknown": 1, "limits": {"messages_in_flight": 5}, "target_url": "nats://t", "stream": "S",
            "source_url": "nats://s", "filter_subjects": ["b", "a"], "id": "x"});
        let compact = r#"{"stream":"S","id":"x","source_url":"nats://s","target_url":"nats://t","#.to_owned()
            + r#""filter_subjects":["b","a"],"limits":{"messages_in_flight":5},"unknown":1}"#;
        assert_eq!(compact_document(&document), compact);
        let pretty = pretty_document(&document);
        assert!(pretty.starts_with("{\n  \"stream\": \"S\",\n  \"id\""), "{pretty}");
        assert_eq!(serde_json::from_str::<Value>(&pretty).unwrap(), document);
        assert_eq!(compact_document(&json!([5, "x"])), "[5,\"x\"]");
    }
}
