//! Which chunks are asked about: the same keys in every namespace, or a prompt's own keys in each.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use kvrail::ChunkKey;
use serde::Deserialize;

use crate::failure::Failure;

/// Bytes of a file of keys at most: half a million keys.
const BYTES_MAX: u64 = 64 << 20;

/// The chunk keys of a prompt.
#[derive(Debug)]
pub(super) struct Prompt {
    /// How many tokens it has, where that is known.
    pub(super) tokens: Option<u64>,
    keys: Source,
}

#[derive(Debug)]
enum Source {
    /// Keys that mean the same everywhere.
    Given(Vec<ChunkKey>),
    /// By the name of the namespace's directory: hashes depend on what is in its identity.
    ByNamespace(BTreeMap<String, NamespaceKeys>),
}

/// A prompt's chunks in one namespace.
#[derive(Debug)]
struct NamespaceKeys {
    keys: Vec<ChunkKey>,
    chunk_tokens: u64,
}

/// What `kvrail-explain` writes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PromptFile {
    prompt_tokens: u64,
    namespaces: BTreeMap<String, NamespaceFile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NamespaceFile {
    chunk_tokens: u64,
    keys: Vec<String>,
}

impl Prompt {
    /// Takes keys as they were given on the command line.
    pub(super) fn given(keys: Vec<ChunkKey>) -> Self {
        Self {
            tokens: None,
            keys: Source::Given(keys),
        }
    }

    /// Reads the keys of a prompt in each namespace; `-` is standard input.
    ///
    /// # Errors
    /// The file cannot be read, is too long, or is not what `kvrail-explain` writes.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let mut text = Vec::new();
        let read = match path.as_os_str() == "-" {
            true => io::stdin().take(BYTES_MAX + 1).read_to_end(&mut text),
            false => {
                File::open(path).and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut text))
            }
        };
        read.map_err(|error| Failure::io("read the keys", path, &error))?;
        if text.len() as u64 > BYTES_MAX {
            let message = format!("`{}` has more than {BYTES_MAX} bytes", path.display());
            return Err(Failure::new(message));
        }
        Self::parse(&text).map_err(|error| {
            Failure::new(format!("read the keys: `{}`: {error}", path.display()))
                .with_hint("expected what `kvrail-explain --keys-only` prints")
        })
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let file: PromptFile = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let mut namespaces = BTreeMap::new();
        for (name, found) in file.namespaces {
            let keys: Result<_, String> = found.keys.iter().map(|text| key(text)).collect();
            let keys = NamespaceKeys {
                keys: keys?,
                chunk_tokens: found.chunk_tokens,
            };
            namespaces.insert(name, keys);
        }
        Ok(Self {
            tokens: Some(file.prompt_tokens),
            keys: Source::ByNamespace(namespaces),
        })
    }

    /// Returns the keys of the prompt's chunks in a namespace; `None` where it has none.
    pub(super) fn keys(&self, namespace: &str) -> Option<&[ChunkKey]> {
        match &self.keys {
            Source::Given(keys) => Some(keys),
            Source::ByNamespace(all) => all.get(namespace).map(|found| found.keys.as_slice()),
        }
    }

    /// Returns how many tokens a chunk of a namespace has, where that was said.
    pub(super) fn chunk_tokens(&self, namespace: &str) -> Option<u64> {
        match &self.keys {
            Source::Given(_) => None,
            Source::ByNamespace(all) => all.get(namespace).map(|found| found.chunk_tokens),
        }
    }

    /// Returns the key under which `other` has the last token of chunk `index` of `namespace`.
    pub(super) fn key_elsewhere(
        &self,
        namespace: &str,
        index: usize,
        other: &str,
    ) -> Option<ChunkKey> {
        let keys = self.keys(other)?;
        let sizes = self.chunk_tokens(namespace).zip(self.chunk_tokens(other));
        let index = match sizes {
            None => index,
            Some((ours, theirs)) => {
                let end = ours.checked_mul(u64::try_from(index).ok()?.checked_add(1)?)?;
                let chunks = end.div_ceil(theirs.max(1));
                usize::try_from(chunks.checked_sub(1)?).ok()?
            }
        };
        keys.get(index).copied()
    }
}

/// Reads a key as people copy it from a log.
pub(super) fn key(text: &str) -> Result<ChunkKey, String> {
    let text = text.trim().to_ascii_lowercase();
    ChunkKey::from_hex(text.strip_prefix("0x").unwrap_or(&text)).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(digit: char) -> String {
        digit.to_string().repeat(64)
    }

    #[test]
    fn each_namespace_has_its_own_keys_and_chunks() {
        let text = format!(
            r#"{{"prompt_tokens": 1100, "namespaces": {{
                "small": {{"chunk_tokens": 256, "keys": ["{}", "{}", "{}", "{}"]}},
                "large": {{"chunk_tokens": 512, "keys": ["{}", "{}"]}}}}}}"#,
            hex('0'),
            hex('1'),
            hex('2'),
            hex('3'),
            hex('a'),
            hex('b'),
        );
        let prompt = Prompt::parse(text.as_bytes()).unwrap();
        let named = |digit| Some(key(&hex(digit)).unwrap());
        assert_eq!(prompt.tokens, Some(1100));
        assert_eq!(prompt.keys("small").unwrap().len(), 4);
        assert_eq!(prompt.keys("neither"), None);
        let large: Vec<_> = (0..5)
            .map(|index| prompt.key_elsewhere("small", index, "large"))
            .collect();
        assert_eq!(
            large,
            [named('a'), named('a'), named('b'), named('b'), None]
        );
        let small: Vec<_> = (0..3)
            .map(|index| prompt.key_elsewhere("large", index, "small"))
            .collect();
        assert_eq!(small, [named('1'), named('3'), None]);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "[]",
            r#"{"prompt_tokens": 5}"#,
            r#"{"prompt_tokens": 5, "namespaces": {"a": {"chunk_tokens": 1, "keys": ["xyz"]}}}"#,
            r#"{"prompt_tokens": -5, "namespaces": {}}"#,
            r#"{"prompt_tokens": 5, "namespaces": {}, "more": 1}"#,
        ] {
            assert!(Prompt::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
