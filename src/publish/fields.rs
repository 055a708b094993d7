//! A JSON object whose fields keep their order and their bytes, so that what is not changed stays as it was written.
//!
//! A name may stand in it more than once, and readers take the last: so does [`Fields::get`], and what is set or removed is
//! so wherever it stood.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

/// The fields of an object, values as they are written.
#[derive(Debug, Default)]
pub(super) struct Fields(Vec<(String, Box<RawValue>)>);

impl Fields {
    pub(super) fn parse(json: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(json)
    }

    /// The value of a field as it is written; `None` also for `null`.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let field = self.0.iter().rfind(|(name, _)| name == key);
        field.map(|(_, value)| value.get()).filter(|value| *value != "null")
    }

    /// The object in a field; empty where there is none.
    pub(super) fn object(&self, key: &str) -> Result<Self, serde_json::Error> {
        self.get(key).map_or_else(|| Ok(Self::default()), Self::parse)
    }

    /// Gives a field a value: in its first place where it is there already, else at the end.
    pub(super) fn set(&mut self, key: &str, value: &impl Serialize) -> Result<(), serde_json::Error> {
        let value = to_raw_value(value)?;
        let at = self.0.iter().position(|(name, _)| name == key).unwrap_or(self.0.len());
        self.remove(key);
        self.0.insert(at, (key.to_owned(), value));
        Ok(())
    }

    /// Takes a field away, wherever it stands; whether it was there.
    pub(super) fn remove(&mut self, key: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|(name, _)| name != key);
        self.0.len() < before
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}
