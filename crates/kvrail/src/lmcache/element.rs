//! The types of elements, and the two names that each has.

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are those of safetensors")]
pub enum Element {
    F16,
    Bf16,
    F32,
    F64,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    F8E4m3fn,
    F8E5m2,
}

/// All types: bytes of an element, name in a head, name in a key. Three have no name for keys, so
/// they are no type of a KV cache.
const ELEMENTS: [(Element, usize, &str, &str); 14] = [
    (Element::F16, 2, "F16", "half"),
    (Element::Bf16, 2, "BF16", "bfloat16"),
    (Element::F32, 4, "F32", "float"),
    (Element::F64, 8, "F64", "double"),
    (Element::U8, 1, "U8", "uint8"),
    (Element::U16, 2, "U16", ""),
    (Element::U32, 4, "U32", ""),
    (Element::U64, 8, "U64", ""),
    (Element::I8, 1, "I8", "int8"),
    (Element::I16, 2, "I16", "int16"),
    (Element::I32, 4, "I32", "int32"),
    (Element::I64, 8, "I64", "int64"),
    (Element::F8E4m3fn, 1, "F8E4M3FN", "fp8_e4m3fn"),
    (Element::F8E5m2, 1, "F8E5M2", "fp8_e5m2"),
];

impl Element {
    /// Returns all types.
    pub fn all() -> impl Iterator<Item = Self> {
        ELEMENTS.iter().map(|entry| entry.0)
    }

    /// Returns the bytes of one element.
    pub fn bytes(self) -> usize {
        self.entry().map_or(0, |entry| entry.1)
    }

    /// Returns the name that a head has for it.
    pub fn head_name(self) -> &'static str {
        self.entry().map_or("", |entry| entry.2)
    }

    /// Returns the name that a key has for it, `None` for a type that no KV cache has.
    pub fn key_name(self) -> Option<&'static str> {
        self.entry()
            .map(|entry| entry.3)
            .filter(|name| !name.is_empty())
    }

    /// Returns the type of a head's name.
    pub fn of_head(name: &str) -> Option<Self> {
        let found = ELEMENTS.iter().find(|entry| entry.2 == name);
        found.map(|entry| entry.0)
    }

    /// Returns the type of a key's name.
    pub fn of_key(name: &str) -> Option<Self> {
        let found = ELEMENTS
            .iter()
            .find(|entry| !name.is_empty() && entry.3 == name);
        found.map(|entry| entry.0)
    }

    fn entry(self) -> Option<&'static (Self, usize, &'static str, &'static str)> {
        ELEMENTS.iter().find(|entry| entry.0 == self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_a_length_and_names_that_lead_back() {
        for element in Element::all() {
            assert!(element.bytes() > 0);
            assert_eq!(Element::of_head(element.head_name()), Some(element));
            if let Some(name) = element.key_name() {
                assert_eq!(Element::of_key(name), Some(element));
            }
        }
        assert_eq!(Element::of_key(""), None);
        assert_eq!(Element::of_head("bfloat16"), None);
    }
}
