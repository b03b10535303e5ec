//! Where the file of a key lies.

use super::key::LmcacheKey;
use super::quoting::{quote, unquote};
use crate::error::{Error, ErrorKind, Result};

/// Ending of a chunk's file, and of one on WekaFS.
const SUFFIX: &str = ".kvcache.safetensors";
const WEKA_SUFFIX: &str = ".weka1";
/// What follows them in the name of the metadata file.
const METADATA_SUFFIX: &str = ".metadata";
/// Characters of the hash in decimal that name each of the two folders.
const FOLDER_CHARACTERS: usize = 2;
/// Bytes of a file name, as Linux has it.
const NAME_BYTES_MAX: usize = 255;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// Head and payload.
    Chunk,
    /// The head alone, by which readers know that the chunk is there.
    Metadata,
}

/// Where a file lies below the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePlace {
    /// The chunk.
    pub key: LmcacheKey,
    /// Whether the path is on WekaFS, where names end differently.
    pub is_on_weka: bool,
    /// What the file holds.
    pub kind: FileKind,
}

impl FilePlace {
    /// Returns the folders, `12/34` for the hash 123456: a hash in decimal has its sign first.
    ///
    /// They are left out where the hash has fewer characters.
    pub fn folder(&self) -> String {
        let hash = self.key.hash.decimal();
        let part = |first: usize| {
            let end = hash.len().min(first + FOLDER_CHARACTERS);
            hash.get(first.min(end)..end).unwrap_or_default().to_owned()
        };
        match (part(0), part(FOLDER_CHARACTERS)) {
            (first, second) if second.is_empty() => first,
            (first, second) => format!("{first}/{second}"),
        }
    }

    /// Returns the file's name in its folder.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a key that has no text, or one that is too long for the
    /// name of a file with room for what LMCache calls it while it is written.
    pub fn name(&self) -> Result<String> {
        self.key.check()?;
        let mut name = quote(&self.key.to_string());
        name.push_str(suffix(self.is_on_weka));
        // The longest name of a chunk's files: of the metadata, while it is written.
        let longest = name.len() + METADATA_SUFFIX.len() + ".tmp01234567".len();
        if longest > NAME_BYTES_MAX {
            let message = format!(
                "LMCache key `{}`: its file name has {longest} bytes, expected at most {NAME_BYTES_MAX}",
                self.key.to_string().escape_debug()
            );
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        if self.kind == FileKind::Metadata {
            name.push_str(METADATA_SUFFIX);
        }
        Ok(name)
    }

    /// Reads a file's name; `None` for any other than [`FilePlace::name`] writes.
    pub fn parse(name: &str) -> Option<Self> {
        let (rest, kind) = match name.strip_suffix(METADATA_SUFFIX) {
            Some(rest) => (rest, FileKind::Metadata),
            None => (name, FileKind::Chunk),
        };
        let (quoted, is_on_weka) = match rest.strip_suffix(SUFFIX) {
            Some(quoted) => (quoted, false),
            None => (rest.strip_suffix(WEKA_SUFFIX)?, true),
        };
        let place = Self {
            key: LmcacheKey::parse(&unquote(quoted)?).ok()?,
            is_on_weka,
            kind,
        };
        (place.name().ok()? == name).then_some(place)
    }
}

fn suffix(is_on_weka: bool) -> &'static str {
    if is_on_weka { WEKA_SUFFIX } else { SUFFIX }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::key::tests::arbitrary_key;
    use super::*;

    fn place(text: &str) -> FilePlace {
        FilePlace {
            key: LmcacheKey::parse(text).unwrap(),
            is_on_weka: false,
            kind: FileKind::Chunk,
        }
    }

    proptest! {
        #[test]
        fn names_come_back(key in arbitrary_key(), is_on_weka in any::<bool>(), data in any::<bool>()) {
            let kind = if data { FileKind::Chunk } else { FileKind::Metadata };
            let place = FilePlace { key, is_on_weka, kind };
            if let Ok(name) = place.name() {
                prop_assert!(name.len() <= NAME_BYTES_MAX && !name.contains('/'));
                prop_assert_eq!(FilePlace::parse(&name), Some(place));
            }
        }
    }

    #[test]
    fn folders_are_the_first_digits_of_the_number() {
        for (hash, folder) in [
            ("1e240", "12/34"),
            ("-1e240", "-1/23"),
            ("7b", "12/3"),
            ("c", "12"),
            ("1", "1"),
        ] {
            assert_eq!(place(&format!("m@1@0@{hash}@half")).folder(), folder);
        }
    }

    #[test]
    fn names_are_quoted_and_end_as_they_should() {
        let mut place = place("a/b@1@0@1e240@half");
        let name = "a%2Fb%401%400%401e240%40half";
        assert_eq!(place.name().unwrap(), format!("{name}.kvcache.safetensors"));
        place.kind = FileKind::Metadata;
        place.is_on_weka = true;
        assert_eq!(place.name().unwrap(), format!("{name}.weka1.metadata"));
        let temporary = format!("{name}.weka1.tmp01234567");
        assert_eq!(FilePlace::parse(&temporary), None);
        place.key.model = "m".repeat(220);
        assert!(place.name().is_err());
    }
}
