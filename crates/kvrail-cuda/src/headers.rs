//! Are the C types of this crate those of NVIDIA's headers? A C++ compiler says.
//!
//! `KVRAIL_CUDA_HEADERS` names folders with wheels' headers (`scripts/cuda_headers`), separated by
//! colons; else those in the active virtual environment are taken.
#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cufile::sys as cufile;
use crate::driver::sys as driver;

/// The type of a function: what it returns and takes.
#[derive(Debug)]
pub(crate) struct Signature {
    pub(crate) name: &'static str,
    pub(crate) is_optional: bool,
    pub(crate) result: usize,
    pub(crate) arguments: &'static [usize],
}

/// What the code of a structure has added to its size, and the code of a pointer.
const STRUCTURE: usize = 1000;
const POINTER: usize = 100;

/// A type of a C function as a number: its size, apart from pointers and structures.
pub(crate) trait Code {
    const CODE: usize;
}

macro_rules! numbers {
    ($($number:ty),*) => {
        $(impl Code for $number {
            const CODE: usize = size_of::<Self>();
        })*
    };
}
numbers!((), bool, i32, u32, i64, u64, isize, usize);

impl<T> Code for *const T {
    const CODE: usize = POINTER;
}
impl<T> Code for *mut T {
    const CODE: usize = POINTER;
}
impl Code for cufile::Status {
    const CODE: usize = STRUCTURE + size_of::<Self>();
}

pub(crate) const fn code<T: Code>() -> usize {
    T::CODE
}

/// The same numbers, of the header's types.
const PRELUDE: &str = r"
#include <cstddef>
#include <initializer_list>
#include <type_traits>
template <class T> constexpr std::size_t code() {
    if constexpr (std::is_void_v<T>) return 0;
    else if constexpr (std::is_pointer_v<T>) return 100;
    else if constexpr (std::is_class_v<T>) return 1000 + sizeof(T);
    else return sizeof(T);
}
template <class F> struct Of;
template <class R, class... A> struct Of<R(A...)> {
    static constexpr bool is(std::size_t result, std::initializer_list<std::size_t> arguments) {
        const std::initializer_list<std::size_t> own = {code<A>()...};
        if (code<R>() != result || own.size() != arguments.size()) return false;
        for (std::size_t index = 0; index < own.size(); index++)
            if (own.begin()[index] != arguments.begin()[index]) return false;
        return true;
    }
};
template <class R, class... A> struct Of<R(A...) noexcept> : Of<R(A...)> {};
";

/// Structures: the C type, and the value of each expression about it.
fn structures() -> Vec<(&'static str, Vec<(String, usize)>)> {
    let size = |name: &str, bytes| (format!("sizeof({name})"), bytes);
    let at = |name: &str, field: &str, bytes| (format!("offsetof({name}, {field})"), bytes);
    vec![
        (
            "CUmemcpyAttributes",
            vec![
                size("CUmemcpyAttributes", size_of::<driver::CopyAttributes>()),
                at(
                    "CUmemcpyAttributes",
                    "srcLocHint",
                    offset_of!(driver::CopyAttributes, source_hint),
                ),
                at(
                    "CUmemcpyAttributes",
                    "dstLocHint",
                    offset_of!(driver::CopyAttributes, target_hint),
                ),
                at(
                    "CUmemcpyAttributes",
                    "flags",
                    offset_of!(driver::CopyAttributes, flags),
                ),
            ],
        ),
        (
            "CUfileDescr_t",
            vec![
                size("CUfileDescr_t", size_of::<cufile::Description>()),
                at(
                    "CUfileDescr_t",
                    "handle.fd",
                    offset_of!(cufile::Description, descriptor),
                ),
                at(
                    "CUfileDescr_t",
                    "fs_ops",
                    offset_of!(cufile::Description, operations),
                ),
            ],
        ),
        (
            "CUfileError_t",
            vec![
                size("CUfileError_t", size_of::<cufile::Status>()),
                at("CUfileError_t", "cu_err", offset_of!(cufile::Status, cuda)),
            ],
        ),
    ]
}

/// Constants of the headers that have a value of ours.
fn constants() -> Vec<(&'static str, i64)> {
    vec![
        ("CU_EVENT_DEFAULT", driver::EVENT_DEFAULT.into()),
        ("CU_EVENT_DISABLE_TIMING", driver::EVENT_UNTIMED.into()),
        ("CU_STREAM_NON_BLOCKING", driver::STREAM_NON_BLOCKING.into()),
        (
            "CU_STREAM_CAPTURE_MODE_RELAXED",
            driver::CAPTURE_RELAXED.into(),
        ),
        ("CUDA_ERROR_NOT_READY", driver::NOT_READY.into()),
        (
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
            driver::COMPUTE_CAPABILITY[0].into(),
        ),
        (
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
            driver::COMPUTE_CAPABILITY[1].into(),
        ),
        (
            "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM",
            driver::ORDER_STREAM.into(),
        ),
        ("CU_FILE_HANDLE_TYPE_OPAQUE_FD", cufile::OPAQUE_FD.into()),
        (
            "CUFILE_PARAM_PROPERTIES_MAX_DIRECT_IO_SIZE_KB",
            cufile::MAX_DIRECT_IO_SIZE_KB.into(),
        ),
        (
            "CUFILE_PARAM_PROPERTIES_MAX_DEVICE_PINNED_MEM_SIZE_KB",
            cufile::MAX_DEVICE_PINNED_MEM_SIZE_KB.into(),
        ),
        (
            "CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE",
            cufile::ALLOW_COMPAT_MODE.into(),
        ),
        ("CUFILE_PARAM_USE_PCIP2PDMA", cufile::USE_PCIP2PDMA.into()),
    ]
}

/// Macros of the headers that have a value of ours.
fn macros() -> Vec<(&'static str, i64)> {
    vec![
        (
            "CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP",
            driver::HOST_REGISTER.into(),
        ),
        ("CUFILEOP_BASE_ERR", cufile::BASE_ERROR as i64),
    ]
}

/// Returns the folders to look for headers in, and whether all functions must be found.
fn roots() -> Result<(Vec<PathBuf>, bool), String> {
    if let Some(folders) = std::env::var_os("KVRAIL_CUDA_HEADERS") {
        return Ok((std::env::split_paths(&folders).collect(), true));
    }
    let environment = std::env::var_os("VIRTUAL_ENV");
    let environment = environment.ok_or("neither KVRAIL_CUDA_HEADERS nor VIRTUAL_ENV is set")?;
    let pythons = entries(&Path::new(&environment).join("lib"));
    let sites = pythons.map(|python| python.join("site-packages"));
    Ok((sites.collect(), false))
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path()))
}

/// Runs a C++ compiler on a text; `Err` with its messages when it refuses.
fn compile(includes: &[PathBuf], options: &[&str], text: &str) -> Result<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("headers.cpp");
    std::fs::write(&source, text).unwrap();
    let mut command = Command::new("c++");
    command.arg("-std=c++17").args(options).arg(&source);
    for include in includes {
        command.arg("-isystem").arg(include);
    }
    let output = command.output().map_err(|error| format!("c++: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Returns whether a text has a word, alone.
fn has_word(text: &str, word: &str) -> bool {
    let is_part =
        |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    text.match_indices(word).any(|(at, _)| {
        let bytes = text.as_bytes();
        let before = at.checked_sub(1).and_then(|at| bytes.get(at));
        !is_part(before) && !is_part(bytes.get(at + word.len()))
    })
}

/// Compares everything with one set of headers; returns the functions that it declares.
fn compare(root: &Path) -> Option<BTreeSet<&'static str>> {
    let includes: Vec<PathBuf> = entries(&root.join("nvidia"))
        .map(|wheel| wheel.join("include"))
        .filter(|include| include.is_dir())
        .collect();
    let has = |header: &str| {
        includes
            .iter()
            .any(|include| include.join(header).is_file())
    };
    if !has("cuda.h") || !has("cufile.h") {
        return None;
    }
    let start = format!("#include <cuda.h>\n#include <cufile.h>\n{PRELUDE}");
    let declared = compile(&includes, &["-E", "-P"], &start).unwrap();
    let mut text = start;
    let mut functions = BTreeSet::new();
    for function in driver::Api::SIGNATURES
        .iter()
        .chain(cufile::Api::SIGNATURES)
    {
        if !has_word(&declared, function.name) {
            continue;
        }
        functions.insert(function.name);
        let list: Vec<String> = function.arguments.iter().map(usize::to_string).collect();
        // The header's macros give one name another one's version.
        writeln!(
            text,
            "#undef {name}\nstatic_assert(Of<decltype({name})>::is({}, {{{}}}), \"{name}\");",
            function.result,
            list.join(", "),
            name = function.name,
        )
        .unwrap();
    }
    for (name, facts) in structures() {
        for (expression, value) in facts.iter().filter(|_| has_word(&declared, name)) {
            writeln!(text, "static_assert({expression} == {value}, \"{name}\");").unwrap();
        }
    }
    for (name, value) in constants() {
        if has_word(&declared, name) {
            writeln!(
                text,
                "static_assert((long)({name}) == {value}, \"{name}\");"
            )
            .unwrap();
        }
    }
    for (name, value) in macros() {
        writeln!(
            text,
            "static_assert((long)({name}) == {value}, \"{name}\");"
        )
        .unwrap();
    }
    if let Err(messages) = compile(&includes, &["-fsyntax-only"], &text) {
        panic!("{}: {messages}", root.display());
    }
    Some(functions)
}

#[test]
fn types_and_constants_are_those_of_the_headers() {
    let (roots, must_be_all) = match roots() {
        Ok(found) => found,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return;
        }
    };
    if let Err(reason) = compile(&[], &["-fsyntax-only"], "") {
        eprintln!("skipped: {reason}");
        return;
    }
    let mut all = BTreeSet::new();
    for root in &roots {
        match compare(root) {
            Some(functions) => {
                eprintln!(
                    "{} functions as in the headers of {}",
                    functions.len(),
                    root.display()
                );
                all.extend(functions);
            }
            None => eprintln!("skipped: no cuda.h and cufile.h below {}", root.display()),
        }
    }
    let signatures = || {
        driver::Api::SIGNATURES
            .iter()
            .chain(cufile::Api::SIGNATURES)
    };
    let missing: Vec<&Signature> = signatures().filter(|one| !all.contains(one.name)).collect();
    for function in &missing {
        eprintln!(
            "no header declares {}, optional: {}",
            function.name, function.is_optional
        );
    }
    if must_be_all {
        assert!(missing.is_empty(), "functions that no header declares");
    }
}
