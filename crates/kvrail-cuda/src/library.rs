//! Finding a shared library and its functions at run time.
#![expect(unsafe_code, reason = "loads shared libraries")]

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::error::{Error, ErrorKind, Result};

/// Where the libraries are looked for, in order.
///
/// A bare name goes to the system's search; a path is opened as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibraryPaths {
    /// Candidates for the CUDA driver.
    pub cuda: Vec<PathBuf>,
    /// Candidates for cuFile.
    pub cufile: Vec<PathBuf>,
}

impl Default for LibraryPaths {
    fn default() -> Self {
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect();
        Self {
            cuda: paths(&["libcuda.so.1", "libcuda.so"]),
            // The wheels have only the first name.
            cufile: paths(&["libcufile.so.0", "libcufile.so"]),
        }
    }
}

/// A loaded library. It is never unloaded: both libraries start threads of their own.
#[derive(Debug)]
pub(crate) struct Loaded {
    library: std::mem::ManuallyDrop<Library>,
    path: PathBuf,
}

impl Loaded {
    /// Loads the first candidate that there is.
    pub(crate) fn open(candidates: &[PathBuf]) -> Result<Self> {
        let mut reasons = Vec::new();
        for path in candidates {
            // SAFETY: the libraries' initialisers are NVIDIA's, made to be loaded so.
            match unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => {
                    return Ok(Self {
                        library: std::mem::ManuallyDrop::new(library),
                        path: path.clone(),
                    });
                }
                Err(error) => {
                    // The error itself says only that it failed; its cause has the loader's words.
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    reasons.push(cause.unwrap_or_else(|| format!("{}: {error}", path.display())));
                }
            }
        }
        Err(Error::new(
            ErrorKind::LibraryMissing,
            "dlopen",
            reasons.join("; "),
        ))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the function called `name`.
    ///
    /// # Safety
    /// `T` is the C type of that function.
    pub(crate) unsafe fn function<T: Copy>(&self, name: &'static str) -> Result<T> {
        // SAFETY: the caller vouches for the type; the library stays loaded for ever.
        match unsafe { self.library.get::<T>(name.as_bytes()) } {
            Ok(symbol) => Ok(*symbol),
            Err(_) => Err(Error::new(
                ErrorKind::SymbolMissing,
                name,
                format!("not in {}", self.path.display()),
            )),
        }
    }
}

/// Declares a table of C functions with their types, found in a library all together.
///
/// A field with `= "name"` has that name in the library, others their own; those behind
/// `optional` may be missing.
macro_rules! functions {
    (
        $(#[$meta:meta])* $table:ident {
            $($field:ident = $name:literal : fn($($argument:ty),*) -> $result:ty;)*
        }
        optional {
            $($maybe:ident = $maybe_name:literal : fn($($maybe_argument:ty),*) -> $maybe_result:ty;)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $table {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            $(pub(crate) $maybe: Option<unsafe extern "C" fn($($maybe_argument),*) -> $maybe_result>,)*
        }

        #[cfg(test)]
        impl $table {
            /// The types of all functions, for a comparison with the vendor's header.
            pub(crate) const SIGNATURES: &'static [crate::headers::Signature] = &[
                $(crate::headers::Signature {
                    name: $name,
                    is_optional: false,
                    result: crate::headers::code::<$result>(),
                    arguments: &[$(crate::headers::code::<$argument>()),*],
                },)*
                $(crate::headers::Signature {
                    name: $maybe_name,
                    is_optional: true,
                    result: crate::headers::code::<$maybe_result>(),
                    arguments: &[$(crate::headers::code::<$maybe_argument>()),*],
                },)*
            ];
        }

        impl $table {
            /// Finds all functions.
            pub(crate) fn find(library: &crate::library::Loaded) -> crate::error::Result<Self> {
                Ok(Self {
                    // SAFETY: the types are those of the vendor's header.
                    $($field: unsafe { library.function($name) }?,)*
                    // SAFETY: as above.
                    $($maybe: unsafe { library.function($maybe_name) }.ok(),)*
                })
            }
        }
    };
}
pub(crate) use functions;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_a_value_that_names_it() {
        let error = Loaded::open(&["libkvrail-no-such.so.9".into()]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LibraryMissing);
        assert!(
            error.to_string().contains("libkvrail-no-such.so.9"),
            "{error}"
        );
        assert_eq!(
            Loaded::open(&[]).unwrap_err().kind(),
            ErrorKind::LibraryMissing
        );
    }

    #[test]
    fn a_library_without_the_functions_is_a_value_too() {
        let libc = [PathBuf::from("libc.so.6")];
        let error = crate::Cuda::load(&libc).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SymbolMissing, "{error}");
        assert!(error.to_string().contains("libc.so.6"), "{error}");
        let error = crate::CuFile::load(&libc).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SymbolMissing, "{error}");
    }
}
