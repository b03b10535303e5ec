//! What the program is told, as bytes.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::{DriverSettings, LibraryPaths, PAGE_BYTES};

/// The first field: name and version of the protocol.
const MAGIC: &[u8] = b"kvrail-probe 2";
/// Bytes of a request that are read at most: a thousand paths of 4 KiB.
pub(super) const REQUEST_BYTES_MAX: u64 = 4 << 20;

/// The largest number of bytes that is written to a file.
const BYTES_MAX: usize = 256 << 20;

/// What to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The CUDA device.
    pub ordinal: usize,
    /// Where the libraries are looked for.
    pub libraries: LibraryPaths,
    /// What is set before cuFile's driver is opened.
    pub settings: DriverSettings,
    /// Bytes to write to each file and to read back: whole pages, 256 MiB at most. GPU memory of
    /// twice as many is needed.
    pub bytes: usize,
    /// Files to make, one in each directory in question; none of them may exist. They are removed.
    pub files: Vec<PathBuf>,
}

impl Request {
    /// Returns the request as fields that end with a zero byte.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut fields = vec![
            MAGIC.to_vec(),
            self.ordinal.to_string().into_bytes(),
            u8::from(self.settings.allow_compatibility)
                .to_string()
                .into_bytes(),
            u8::from(self.settings.use_p2pdma).to_string().into_bytes(),
            self.bytes.to_string().into_bytes(),
        ];
        for list in [&self.libraries.cuda, &self.libraries.cufile, &self.files] {
            fields.push(list.len().to_string().into_bytes());
            fields.extend(list.iter().map(|path| path.as_os_str().as_bytes().to_vec()));
        }
        fields
            .iter()
            .flat_map(|field| field.iter().copied().chain([0]))
            .collect()
    }

    /// Reads a request; `None` for anything that is none.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = bytes.strip_suffix(&[0])?.split(|byte| *byte == 0);
        let mut next = || fields.next();
        let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<usize>().ok();
        if next()? != MAGIC {
            return None;
        }
        let ordinal = number(next()?)?;
        let settings = DriverSettings {
            allow_compatibility: number(next()?)? == 1,
            use_p2pdma: number(next()?)? == 1,
        };
        let bytes = number(next()?)?;
        if bytes == 0 || bytes > BYTES_MAX || !bytes.is_multiple_of(PAGE_BYTES) {
            return None;
        }
        let mut list = || -> Option<Vec<PathBuf>> {
            let count = number(next()?)?;
            let path = |field: &[u8]| PathBuf::from(OsString::from_vec(field.to_vec()));
            (0..count).map(|_| next().map(path)).collect()
        };
        let (cuda, cufile, files) = (list()?, list()?, list()?);
        let end = fields.next().is_none();
        end.then_some(Self {
            ordinal,
            libraries: LibraryPaths { cuda, cufile },
            settings,
            bytes,
            files,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]
    use super::*;

    #[test]
    fn a_request_comes_through_and_anything_else_is_none() {
        let request = Request {
            ordinal: 3,
            libraries: LibraryPaths::default(),
            settings: DriverSettings {
                allow_compatibility: true,
                use_p2pdma: false,
            },
            bytes: 8192,
            files: vec![
                "/a b/\u{e4}".into(),
                OsString::from_vec(vec![47, 0xFF]).into(),
            ],
        };
        let bytes = request.encode();
        assert_eq!(Request::decode(&bytes).unwrap(), request);
        for end in 0..bytes.len() {
            assert_eq!(Request::decode(bytes.get(..end).unwrap()), None, "{end}");
        }
        let twice = [bytes.clone(), bytes].concat();
        assert_eq!(Request::decode(&twice), None);
    }
}
