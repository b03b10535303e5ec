//! Whether this is a container.

use std::path::Path;

use super::mount::Mount;
use super::view::SystemView;

/// Words in `/proc/1/cgroup` that container engines put there (cgroup v1, or v2 without a
/// namespace of its own).
const ENGINES: [&str; 6] = ["docker", "kubepods", "containerd", "libpod", "crio", "lxc"];

/// Returns what shows that this is a container, `None` where nothing does.
///
/// A container without these marks is possible: the answer is for messages, not for decisions.
pub fn container_evidence(view: &SystemView) -> Option<String> {
    for mark in ["/.dockerenv", "/run/.containerenv"] {
        if view.exists(mark) {
            return Some(format!("there is {mark}"));
        }
    }
    if let Some(name) = view.line("/run/systemd/container") {
        return Some(format!("/run/systemd/container says {name}"));
    }
    let cgroup = view.text("/proc/1/cgroup").unwrap_or_default();
    if let Some(engine) = ENGINES.iter().find(|engine| cgroup.contains(**engine)) {
        return Some(format!("/proc/1/cgroup names {engine}"));
    }
    let root = Mount::of(view, Path::new("/"))?;
    (root.file_system == "overlay").then(|| "the root is an overlay".to_owned())
}
