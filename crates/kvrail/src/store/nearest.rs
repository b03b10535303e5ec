//! The nearest other namespace of a directory: why there are no hits where some were expected.

use std::cmp::Reverse;
use std::fmt;
use std::time::Instant;

use super::directory::MANIFEST_NAME;
use super::manifest::read_manifest;
use super::namespace::{Namespace, parse_directory_name};
use crate::io::Folder;

/// Manifests that are read at most.
const MANIFESTS_MAX: usize = 64;
/// Names in the directory that are looked at, at most.
const NAMES_MAX: usize = 4096;
/// Differences that are told; of another model nearly everything differs.
const DIFFERENCES_MAX: usize = 8;

/// Another namespace of the same directory, and what differs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Nearest {
    /// The name of its directory.
    pub(super) name: String,
    /// A line for each value that differs.
    pub(super) differences: Vec<String>,
    /// Namespaces whose manifest could be read.
    pub(super) compared: usize,
}

impl Nearest {
    /// Finds the namespace on `root` with the fewest differences, those of the same model name
    /// first; `None` where there is no other, or nothing could be read until `deadline`.
    ///
    /// A manifest that cannot be read is passed over: it is somebody else's, and says nothing here.
    pub(super) fn find(root: &Folder, namespace: &Namespace, deadline: Instant) -> Option<Self> {
        let own = namespace.directory_name();
        let names = root.names().ok()?.take(NAMES_MAX).flatten();
        let mut names: Vec<String> = names
            .filter_map(|name| name.into_string().ok())
            .filter(|name| *name != own && parse_directory_name(name).is_some())
            .collect();
        let is_relative = |name: &String| {
            let parsed = parse_directory_name(name);
            parsed.is_some_and(|(slug, _)| slug == namespace.slug())
        };
        names.sort_by_cached_key(|name| (Reverse(is_relative(name)), name.clone()));
        let mut nearest: Option<Self> = None;
        let mut compared = 0;
        for name in names.into_iter().take(MANIFESTS_MAX) {
            if Instant::now() >= deadline {
                break;
            }
            let Some(differences) = compare(root, &name, namespace) else {
                continue;
            };
            compared += 1;
            if nearest
                .as_ref()
                .is_none_or(|found| differences.len() < found.differences.len())
            {
                nearest = Some(Self {
                    name,
                    differences,
                    compared: 0,
                });
            }
        }
        nearest.map(|found| Self { compared, ..found })
    }
}

fn compare(root: &Folder, name: &str, namespace: &Namespace) -> Option<Vec<String>> {
    let folder = root.folder(name).ok()?;
    // Opening a FIFO would wait for whoever writes to it.
    let status = folder.status(MANIFEST_NAME).ok()??;
    let manifest = status.is_file.then(|| read_manifest(&folder).ok())??;
    Some(namespace.differences(&manifest))
}

impl fmt::Display for Nearest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = self.differences.iter().take(DIFFERENCES_MAX);
        let told: Vec<&str> = told.map(String::as_str).collect();
        let others = match self.compared {
            1 => "the only other one here".to_owned(),
            count => format!("the nearest of {count} others here"),
        };
        write!(out, "{}, {others}: {}", self.name, told.join("; "))?;
        match self.differences.len().saturating_sub(DIFFERENCES_MAX) {
            0 => Ok(()),
            more => write!(out, "; and {more} more differences"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::io::FolderRules;

    fn namespace(model: &str, number: usize) -> Namespace {
        let identity = json!({"number": number, "even": number.is_multiple_of(2)});
        Namespace::new(model, identity.as_object().unwrap().clone()).unwrap()
    }

    fn add(root: &Path, namespace: &Namespace) {
        let folder = root.join(namespace.directory_name());
        std::fs::create_dir(&folder).unwrap();
        let text = serde_json::to_vec(namespace.document()).unwrap();
        std::fs::write(folder.join(MANIFEST_NAME), text).unwrap();
    }

    fn find(root: &Path, namespace: &Namespace, limit: Duration) -> Option<Nearest> {
        let root = Folder::open(root, FolderRules::default()).unwrap();
        Nearest::find(&root, namespace, Instant::now() + limit)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_nearest_has_the_fewest_differences_and_few_manifests_are_read() {
        let root = tempfile::tempdir().unwrap();
        let ours = namespace("m", 0);
        assert_eq!(find(root.path(), &ours, LONG), None);
        add(root.path(), &ours);
        assert_eq!(find(root.path(), &ours, LONG), None);
        for number in [1, 2, 3] {
            add(root.path(), &namespace("m", number));
        }
        let found = find(root.path(), &ours, LONG).unwrap();
        assert_eq!(found.name, namespace("m", 2).directory_name());
        assert_eq!(found.differences, ["identity.number: 0 here, 2 there"]);
        assert_eq!(found.compared, 3);
        assert!(
            found
                .to_string()
                .contains("the nearest of 3 others here: identity.number"),
            "{found}"
        );
        assert_eq!(find(root.path(), &ours, Duration::ZERO), None);
        // Those of the same model's name come first, however many others there are.
        for number in 0..100 {
            add(root.path(), &namespace("a", number));
        }
        let found = find(root.path(), &ours, LONG).unwrap();
        assert_eq!(found.name, namespace("m", 2).directory_name());
        assert_eq!(found.compared, MANIFESTS_MAX);
    }

    #[test]
    fn a_long_list_is_cut() {
        let differences = (0..20).map(|index| format!("d{index}")).collect();
        let text = Nearest {
            name: "x".into(),
            differences,
            compared: 1,
        }
        .to_string();
        assert!(text.ends_with("d6; d7; and 12 more differences"), "{text}");
        assert!(
            text.starts_with("x, the only other one here: d0; "),
            "{text}"
        );
    }
}
