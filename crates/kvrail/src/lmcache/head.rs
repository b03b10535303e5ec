//! The first 4 KiB of a file: what its tensor is. The metadata file beside it holds the same.

use serde::{Deserialize, Serialize};

use super::element::Element;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a head.
pub const HEAD_BYTES: usize = 4096;
/// Bytes of the length before the JSON.
const LENGTH_BYTES: usize = 8;
/// The only version of the metadata that there is.
const VERSION: &str = "1";
/// The largest tensor accepted; low enough that no sum overflows.
const TENSOR_BYTES_MAX: usize = 1 << 40;
/// The most sides of a tensor accepted: KV has four.
const SIDES_MAX: usize = 8;

/// In which order a tensor holds what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemoryFormat {
    /// K and V, layers, tokens, heads with their elements.
    Kv2ltd,
    /// The same with the latent of MLA in place of K and V.
    KvMla,
    /// Any other, which no chunk of whole layers has, by its number.
    Other(u8),
}

/// The largest number of a format.
const FORMAT_NUMBER_MAX: u8 = 8;

impl MemoryFormat {
    /// Returns the number that heads have for it.
    pub fn number(self) -> u8 {
        match self {
            Self::Kv2ltd => 1,
            Self::KvMla => 6,
            Self::Other(number) => number,
        }
    }

    /// Returns the format of a number, `None` where there is none.
    pub fn of_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Kv2ltd),
            6 => Some(Self::KvMla),
            0..=FORMAT_NUMBER_MAX => Some(Self::Other(number)),
            _ => None,
        }
    }
}

/// What a tensor is: all that a head says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorHead {
    element: Element,
    shape: Vec<usize>,
    format: MemoryFormat,
    bytes: usize,
}

/// The JSON of a head; field order is file order.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadJson {
    kvcache: TensorJson,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorJson {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
    fmt: u8,
    #[serde(rename = "__metadata__")]
    metadata: MetadataJson,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MetadataJson {
    lmcache_version: String,
}

impl TensorHead {
    /// Makes the head of a tensor of `shape`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] unless the shape has one to eight sides, none of which is
    /// zero, the tensor is below 1 TiB, and its format exists.
    pub fn new(element: Element, shape: &[usize], format: MemoryFormat) -> Result<Self> {
        let product = |product: usize, side: &usize| product.checked_mul(*side);
        let bytes = shape.iter().try_fold(element.bytes(), product);
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
        if MemoryFormat::of_number(format.number()) != Some(format) {
            return invalid(format!("tensor of memory format {format:?}: there is none"));
        }
        match bytes {
            Some(bytes @ 1..=TENSOR_BYTES_MAX) if (1..=SIDES_MAX).contains(&shape.len()) => {
                Ok(Self {
                    element,
                    shape: shape.to_vec(),
                    format,
                    bytes,
                })
            }
            _ => invalid(format!(
                "tensor of shape {shape:?}: expected 1 to {SIDES_MAX} sides, 1 byte to 1 TiB"
            )),
        }
    }

    /// Returns the type of the elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Returns the shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Returns the order of what it holds.
    pub fn format(&self) -> MemoryFormat {
        self.format
    }

    /// Returns the bytes of the tensor.
    pub fn payload_bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the bytes of the file: head and tensor.
    pub fn file_bytes(&self) -> usize {
        HEAD_BYTES + self.bytes
    }

    /// Returns the head's bytes.
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut page = [b' '; HEAD_BYTES];
        let json = self.json();
        if let Some((length, text)) = page.split_first_chunk_mut::<LENGTH_BYTES>() {
            *length = (text.len() as u64).to_le_bytes();
            // Eight sides of twenty digits are far from what there is room for.
            text.iter_mut()
                .zip(json.bytes())
                .for_each(|(target, byte)| *target = byte);
        }
        page
    }

    /// Reads a head of any content. Never panics.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] unless `page` is what [`TensorHead::encode`] gives for the tensor that
    /// it describes.
    pub fn decode(page: &[u8]) -> Result<Self> {
        let damaged = |message: &str| Error::new(ErrorKind::Damaged, format!("head: {message}"));
        let Some((_, text)) = page.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(damaged("shorter than its length field"));
        };
        let HeadJson { kvcache: tensor } = serde_json::from_slice(text)
            .map_err(|error| damaged("not the JSON of a tensor").with_source(error))?;
        let impossible = || damaged("impossible values");
        let element = Element::of_head(&tensor.dtype).ok_or_else(impossible)?;
        let format = MemoryFormat::of_number(tensor.fmt).ok_or_else(impossible)?;
        let head = Self::new(element, &tensor.shape, format).map_err(|_| impossible())?;
        if head.encode() != page {
            return Err(damaged("bytes differ from what LMCache writes"));
        }
        Ok(head)
    }

    /// Checks a page against the tensor that a reader expects.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`], naming the first field that differs.
    pub fn check(&self, page: &[u8]) -> Result<()> {
        if self.encode() == page {
            return Ok(());
        }
        let found = Self::decode(page)?;
        let differs = |name: &str, found: String, expected: String| {
            let message = format!("head: {name} is {found}, expected {expected}");
            Err(Error::new(ErrorKind::Damaged, message))
        };
        if found.element != self.element {
            let (found, expected) = (found.element.head_name(), self.element.head_name());
            return differs("dtype", found.into(), expected.into());
        }
        if found.shape != self.shape {
            let (found, expected) = (format!("{:?}", found.shape), format!("{:?}", self.shape));
            return differs("shape", found, expected);
        }
        let (found, expected) = (found.format.number(), self.format.number());
        differs("fmt", found.to_string(), expected.to_string())
    }

    /// Returns the JSON with the white space that Python's `json` puts into it.
    fn json(&self) -> String {
        let shape: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        format!(
            "{{\"kvcache\": {{\"dtype\": \"{}\", \"shape\": [{}], \"data_offsets\": [0, {}], \
             \"fmt\": {}, \"__metadata__\": {{\"lmcache_version\": \"{VERSION}\"}}}}}}",
            self.element.head_name(),
            shape.join(", "),
            self.bytes,
            self.format.number(),
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn arbitrary_head() -> impl Strategy<Value = TensorHead> {
        let elements: Vec<Element> = Element::all().collect();
        (
            proptest::sample::select(elements),
            proptest::collection::vec(1_usize..40, 1..=SIDES_MAX),
            0..=FORMAT_NUMBER_MAX,
        )
            .prop_filter_map("too large", |(element, shape, number)| {
                let format = MemoryFormat::of_number(number)?;
                TensorHead::new(element, &shape, format).ok()
            })
    }

    proptest! {
        #[test]
        fn heads_come_back(head in arbitrary_head()) {
            let page = head.encode();
            prop_assert_eq!(TensorHead::decode(&page).unwrap(), head.clone());
            prop_assert!(head.check(&page).is_ok());
            prop_assert_eq!(head.file_bytes() - HEAD_BYTES, head.payload_bytes());
        }

        #[test]
        fn every_changed_byte_is_found(head in arbitrary_head(), at in 0..HEAD_BYTES, bit in 0_u8..8) {
            let mut page = head.encode();
            page[at] ^= 1 << bit;
            prop_assert_eq!(head.check(&page).unwrap_err().kind(), ErrorKind::Damaged);
            if let Ok(other) = TensorHead::decode(&page) {
                prop_assert_ne!(other, head);
            }
        }

        #[test]
        fn two_tensors_are_told_apart(one in arbitrary_head(), other in arbitrary_head()) {
            prop_assert_eq!(one.check(&other.encode()).is_ok(), one == other);
        }
    }

    #[test]
    fn a_head_is_what_lmcache_writes() {
        let shape = [2, 32, 256, 1024];
        let head = TensorHead::new(Element::Bf16, &shape, MemoryFormat::Kv2ltd).unwrap();
        let page = head.encode();
        let json = r#"{"kvcache": {"dtype": "BF16", "shape": [2, 32, 256, 1024], "data_offsets": [0, 33554432], "fmt": 1, "__metadata__": {"lmcache_version": "1"}}}"#;
        assert_eq!(page[..8], 4088_u64.to_le_bytes());
        assert_eq!(&page[8..8 + json.len()], json.as_bytes());
        assert!(page[8 + json.len()..].iter().all(|byte| *byte == b' '));
        assert_eq!(head.payload_bytes(), 33_554_432);
    }

    #[test]
    fn impossible_tensors_are_refused() {
        let make = |shape: &[usize]| TensorHead::new(Element::F32, shape, MemoryFormat::KvMla);
        assert!(make(&[]).is_err() && make(&[0]).is_err() && make(&[1; 9]).is_err());
        assert!(make(&[1 << 20, 1 << 20]).is_err());
        assert!(TensorHead::new(Element::F32, &[1], MemoryFormat::Other(9)).is_err());
        assert!(TensorHead::new(Element::F32, &[1], MemoryFormat::Other(1)).is_err());
        assert!(TensorHead::decode(b"short").is_err());
    }
}
