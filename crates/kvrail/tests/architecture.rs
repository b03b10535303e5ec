//! What ARCHITECTURE.md says must never be there is not there: checked on the sources.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::fs;
use std::path::{Path, PathBuf};

/// Which modules of the library each may use; nothing else, so there are no cycles.
const MAY_USE: [(&str, &[&str]); 9] = [
    ("sync", &[]),
    ("error", &[]),
    ("config", &["error"]),
    ("chunk", &["error"]),
    ("layout", &["error"]),
    ("lmcache", &["error"]),
    ("memory", &["error", "chunk", "layout", "sync"]),
    ("io", &["error", "chunk", "memory", "sync"]),
    (
        "store",
        &[
            "error", "chunk", "layout", "lmcache", "memory", "io", "config", "sync",
        ],
    ),
];

/// What the library never does, and how it would look.
const NEVER: [(&str, &str); 6] = [
    ("reads an environment variable", "env::var"),
    ("prints", "println!"),
    ("prints", "eprintln!"),
    ("opens a network connection", "std::net"),
    ("ends the process", "process::exit"),
    ("starts a process", "process::Command"),
];

/// Files that may hold unsafe code; each says why in its first lines.
const UNSAFE: [&str; 19] = [
    "io/cachestat.rs",
    "io/close.rs",
    "io/cufile.rs",
    "io/uring/ring.rs",
    "memory/arena.rs",
    "memory/byte_lock.rs",
    "memory/gpu/check.rs",
    "memory/gpu/device.rs",
    "memory/gpu/hash.rs",
    "memory/gpu/hashing.rs",
    "memory/gpu/plain.rs",
    "memory/gpu/transfer.rs",
    "memory/mapping.rs",
    "memory/region.rs",
    "memory/registered.rs",
    "memory/shared_mapping.rs",
    "memory/shared_slots.rs",
    "memory/staging.rs",
    "memory/streaming.rs",
];

const LINES_MAX: usize = 500;

/// Returns all sources as (path below src, text without its test module).
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let text = text
                    .split("#[cfg(test)]\nmod tests {")
                    .next()
                    .unwrap()
                    .to_owned();
                let below = path.strip_prefix(&root).unwrap().to_path_buf();
                if !below.components().any(|part| part.as_os_str() == "tests")
                    && !below.ends_with("tests.rs")
                {
                    sources.push((below, text));
                }
            }
        }
    }
    assert!(sources.len() > 30, "the sources were not found");
    sources
}

fn module_of(path: &Path) -> String {
    let first = path
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_string_lossy()
        .into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// Returns the code of a source, comments left out.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim_start)
        .filter(|line| !line.starts_with("//"))
}

#[test]
fn modules_use_only_what_they_may() {
    let mut uses = 0;
    for (path, text) in sources() {
        let module = module_of(&path);
        if module == "lib" {
            continue;
        }
        let allowed = MAY_USE.iter().find(|(name, _)| *name == module);
        let allowed = allowed
            .unwrap_or_else(|| panic!("{module} is not in the table"))
            .1;
        for line in code(&text) {
            for used in line.split("crate::").skip(1) {
                let used: String = used.chars().take_while(|c| c.is_alphanumeric()).collect();
                let known = MAY_USE.iter().any(|(name, _)| *name == used);
                if known && used != module {
                    uses += 1;
                    assert!(
                        allowed.contains(&used.as_str()),
                        "{} uses {used}; {module} may use {allowed:?}",
                        path.display()
                    );
                }
            }
        }
    }
    assert!(
        uses > 50,
        "only {uses} uses were seen: the check has gone blind"
    );
}

#[test]
fn the_library_knows_no_environment_terminal_or_network() {
    for (path, text) in sources() {
        for (what, pattern) in NEVER {
            let found = code(&text).find(|line| line.contains(pattern));
            assert_eq!(found, None, "{} {what}", path.display());
        }
    }
}

#[test]
fn unsafe_code_is_where_it_must_be() {
    for (path, text) in sources() {
        let has = code(&text).any(|line| line.contains("unsafe ") && !line.contains("unsafe_code"));
        let may = UNSAFE.iter().any(|allowed| path.ends_with(allowed));
        assert_eq!(has, may, "{}", path.display());
    }
}

#[test]
fn files_stay_small() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(
            lines <= LINES_MAX,
            "{} has {lines} lines: two concepts?",
            path.display()
        );
    }
}
