//! What a user can change.

use super::directory::{Directory, Space};
use super::machine::{Found, Machine};

/// The part of a file system that stays free by default (`min_free`).
const MIN_FREE_PERCENT: u64 = 5;

/// Lists what to change on the machine for GPU-direct I/O, where there are signs of a GPU.
pub(super) fn for_machine(machine: &Machine) -> Vec<String> {
    let system = &machine.system;
    if let Some(gpu) = system.gpus.iter().find(|gpu| !gpu.has_driver) {
        let address = &gpu.pci_address;
        return vec![format!("load NVIDIA's driver: {address} has none")];
    }
    if matches!(machine.libcuda, Found::Error(_)) {
        return match system.driver {
            Some(_) => vec![
                "CUDA does not work though NVIDIA's driver is loaded: install the driver's libcuda; in a container, start it with --gpus all"
                    .to_owned(),
            ],
            None => Vec::new(),
        };
    }
    let mut advice = Vec::new();
    if matches!(machine.libcufile, Found::Error(_)) {
        advice.push(
            "for GPU-direct I/O, install libcufile: pip install nvidia-cufile, or CUDA's package; or name it with --cufile-library"
                .to_owned(),
        );
    }
    if let Some(refusal) = &system.refusal {
        advice.push(format!("for GPU-direct I/O: {}", refusal.advice));
    }
    advice
}

/// Lists what to change for a directory to be usable, or quicker; empty where all is well.
pub(super) fn for_directory(directory: &Directory, machine: &Machine) -> Vec<String> {
    let mut advice = Vec::new();
    if let Some(problem) = &directory.problem {
        advice.push(for_problem(problem).to_owned());
    }
    let mount = directory.mount.as_ref();
    match mount.map(|mount| mount.file_system.as_str()) {
        Some("tmpfs" | "ramfs") => advice.push(
            "chunks in memory are gone when the host restarts: use a directory on a disk"
                .to_owned(),
        ),
        Some("overlay") => advice.push(
            "chunks in a container's own file system are gone with it: mount a volume".to_owned(),
        ),
        Some(name) if is_buffered(directory) => advice.push(format!(
            "without O_DIRECT the page cache takes a copy of each byte: if {name} cannot do it, use ext4 or xfs"
        )),
        _ => {}
    }
    if let Some(Space {
        total_bytes,
        available_bytes,
    }) = directory.space
        && available_bytes < total_bytes / 100 * MIN_FREE_PERCENT
    {
        advice.push(format!(
            "less than {MIN_FREE_PERCENT}% is free, so kvrail stores nothing here: free space, or lower `min_free`"
        ));
    }
    // Only where there is a GPU that could profit.
    if let (Some(_), Some(cufile)) = (machine.libcuda.library(), &directory.cufile)
        && let Some(refusal) = &cufile.refusal
    {
        advice.push(format!("for GPU-direct I/O: {}", refusal.advice));
    }
    advice
}

fn is_buffered(directory: &Directory) -> bool {
    let direct_io = directory.direct_io.as_ref();
    direct_io.is_some_and(|direct_io| !direct_io.works)
}

/// Returns what to do about a problem, by the words that the system has for it.
fn for_problem(problem: &str) -> &'static str {
    const HANGS: &str =
        "check the mount's server and network: processes that use it will hang, too";
    let cases = [
        (
            "does not exist",
            "create it, or give the directory of `gds_path`",
        ),
        ("not a directory", "give the directory of `gds_path`"),
        ("Not a directory", "give the directory of `gds_path`"),
        (
            "Permission denied",
            "give this user the right to write there; as it is, chunks can only be loaded",
        ),
        (
            "Read-only file system",
            "mount it for writing; as it is, chunks can only be loaded",
        ),
        ("No space left", "free space there"),
        ("does not answer", HANGS),
        ("did not answer", HANGS),
    ];
    let found = cases.iter().find(|(words, _)| problem.contains(words));
    found.map_or("see the kernel's log (dmesg)", |(_, advice)| advice)
}
