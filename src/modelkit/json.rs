//! JSON as Go's `encoding/json` reads it, which is how kit reads a config.
//!
//! Go is more lenient than serde's derives: field names match whatever their case, the last of several equal fields
//! wins (objects merge), `null` leaves a field as it was, unknown fields are skipped, and bytes that are not UTF-8
//! become U+FFFD. kitfs must see in a config what kit sees in it, or the two would give different trees.
//! Not followed: a lone surrogate escape and more than 128 levels are refused.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// A JSON value. Numbers are doubles, as Go has them.
#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number.
    Number(f64),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Json>),
    /// An object, in the order written, repeated names included.
    Object(Vec<(String, Json)>),
}

/// A field of another type than it must have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {found}, expected {expected}")]
pub struct WrongType {
    field: String,
    found: &'static str,
    expected: &'static str,
}

impl Json {
    /// Parses one document.
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let mut text = String::with_capacity(bytes.len());
        for chunk in bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            chunk.invalid().iter().for_each(|_| text.push(char::REPLACEMENT_CHARACTER));
        }
        serde_json::from_str(&text)
    }

    fn type_name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }
    #[expect(clippy::cast_precision_loss, reason = "Go reads every number as the nearest double too")]
    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value as f64))
    }
    #[expect(clippy::cast_precision_loss, reason = "Go reads every number as the nearest double too")]
    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value as f64))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Number(value))
    }
    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(value.to_owned()))
    }
    fn visit_string<E>(self, value: String) -> Result<Json, E> {
        Ok(Json::Text(value))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Json::List(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Json, A::Error> {
        let mut object = Vec::new();
        while let Some(pair) = pairs.next_entry()? {
            object.push(pair);
        }
        Ok(Json::Object(object))
    }
}

/// The fields of an object, found by name as Go finds them.
pub(super) struct Fields<'a> {
    /// Where the object stands in the document, for errors: empty at the root.
    place: String,
    pairs: Vec<&'a (String, Json)>,
}

impl<'a> Fields<'a> {
    /// The fields of the document's root.
    pub(super) fn of_root(root: &'a Json) -> Result<Self, WrongType> {
        Self::of(root, String::new())
    }

    fn of(value: &'a Json, place: String) -> Result<Self, WrongType> {
        match value {
            Json::Object(pairs) => Ok(Self { place, pairs: pairs.iter().collect() }),
            Json::Null => Ok(Self { place, pairs: Vec::new() }),
            other => {
                let field = if place.is_empty() { "the document".to_owned() } else { place };
                Err(WrongType { field, found: other.type_name(), expected: "an object" })
            }
        }
    }

    fn named(&self, name: &str) -> impl DoubleEndedIterator<Item = &'a Json> {
        self.pairs.iter().filter(|(key, _)| same_field(key, name)).map(|(_, value)| value)
    }

    fn place_of(&self, name: &str) -> String {
        if self.place.is_empty() { name.to_owned() } else { format!("{}.{name}", self.place) }
    }

    /// Whether the field is written at all, even as `null`.
    pub(super) fn has(&self, name: &str) -> bool {
        self.named(name).next().is_some()
    }

    /// A string; empty where there is none.
    pub(super) fn text(&self, name: &str) -> Result<String, WrongType> {
        let mut text = String::new();
        for value in self.named(name) {
            match value {
                Json::Text(value) => text.clone_from(value),
                Json::Null => {}
                other => return Err(self.wrong(name, other, "a string")),
            }
        }
        Ok(text)
    }

    /// Any value; `None` where there is none or it is `null`.
    pub(super) fn any(&self, name: &str) -> Option<Json> {
        self.named(name).next_back().filter(|value| **value != Json::Null).cloned()
    }

    /// A list; empty where there is none. `read` gets each item and its place.
    pub(super) fn list<T>(
        &self,
        name: &str,
        read: impl Fn(&'a Json, String) -> Result<T, WrongType>,
    ) -> Result<Vec<T>, WrongType> {
        match self.named(name).next_back() {
            None | Some(Json::Null) => Ok(Vec::new()),
            Some(Json::List(items)) => {
                let place = self.place_of(name);
                items.iter().enumerate().map(|(at, item)| read(item, format!("{place}[{at}]"))).collect()
            }
            Some(other) => Err(self.wrong(name, other, "a list")),
        }
    }

    /// A list of objects.
    pub(super) fn objects<T>(
        &self,
        name: &str,
        read: impl Fn(&Fields<'a>) -> Result<T, WrongType>,
    ) -> Result<Vec<T>, WrongType> {
        self.list(name, |item, place| read(&Fields::of(item, place)?))
    }

    /// A list of strings.
    pub(super) fn texts(&self, name: &str) -> Result<Vec<String>, WrongType> {
        self.list(name, |item, field| match item {
            Json::Text(text) => Ok(text.clone()),
            Json::Null => Ok(String::new()),
            other => Err(WrongType { field, found: other.type_name(), expected: "a string" }),
        })
    }

    /// An object; `None` where there is none or it is `null`. Several of one name merge.
    pub(super) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, WrongType> {
        let mut found: Option<Fields<'a>> = None;
        for value in self.named(name) {
            if *value == Json::Null {
                found = None;
                continue;
            }
            let fields = Fields::of(value, self.place_of(name))?;
            match &mut found {
                Some(found) => found.pairs.extend(fields.pairs),
                None => found = Some(fields),
            }
        }
        Ok(found)
    }

    fn wrong(&self, name: &str, found: &Json, expected: &'static str) -> WrongType {
        WrongType { field: self.place_of(name), found: found.type_name(), expected }
    }
}

/// Go's comparison of field names: without case, and the two letters outside of ASCII that fold into it.
fn same_field(written: &str, name: &str) -> bool {
    let fold = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    };
    written.chars().map(fold).eq(name.chars().map(fold))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(document: &str, field: &str) -> Result<String, String> {
        let json = Json::parse(document.as_bytes()).map_err(|e| e.to_string())?;
        Fields::of_root(&json).and_then(|fields| fields.text(field)).map_err(|e| e.to_string())
    }

    #[test]
    fn field_names_match_without_case_and_the_last_wins() {
        assert_eq!(text(r#"{"PATH":"a"}"#, "path"), Ok("a".into()));
        assert_eq!(text(r#"{"path":"a","Path":"b"}"#, "path"), Ok("b".into()));
        assert_eq!(text(r#"{"path":"a","path":null}"#, "path"), Ok("a".into()));
        assert_eq!(text("{\"do\u{17f}\":\"a\"}", "dos"), Ok("a".into()));
    }

    #[test]
    fn repeated_objects_merge() {
        let json = Json::parse(br#"{"m":{"a":"1","b":"2"},"M":{"b":"3"}}"#).expect("valid JSON");
        let root = Fields::of_root(&json).expect("an object");
        let merged = root.object("m").expect("an object").expect("present");
        assert_eq!((merged.text("a"), merged.text("b")), (Ok("1".into()), Ok("3".into())));
    }

    #[test]
    fn bytes_that_are_not_utf_8_are_replaced_one_by_one() {
        let json = Json::parse(b"{\"a\":\"x\xe2\x80\xff\"}").expect("lenient");
        assert_eq!(json, Json::Object(vec![("a".into(), Json::Text("x\u{fffd}\u{fffd}\u{fffd}".into()))]));
    }

    #[test]
    fn a_wrong_type_is_named_with_its_place() {
        let json = Json::parse(br#"{"m":{"parts":[{"path":1}]}}"#).expect("valid JSON");
        let root = Fields::of_root(&json).expect("an object");
        let model = root.object("m").expect("an object").expect("present");
        let error = model.objects("parts", |part| part.text("path")).expect_err("a number").to_string();
        assert_eq!(error, "m.parts[0].path is a number, expected a string");
        assert!(Fields::of_root(&Json::Bool(true)).is_err());
    }

    #[test]
    fn numbers_are_doubles_and_too_large_ones_are_refused() {
        assert_eq!(Json::parse(b"100000000000000000000").ok(), Some(Json::Number(1e20)));
        assert_eq!(Json::parse(b"0.1").ok(), Some(Json::Number(0.1)));
        assert!(Json::parse(b"1e400").is_err());
        assert!(Json::parse(&b"[".repeat(100_000)).is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Json::parse(&bytes);
        }
    }
}
