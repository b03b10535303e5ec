//! `kvrail bench --device cuda:N` on the mocks: what is measured, checked, skipped and refused. The
//! times are those of a mock and mean nothing.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use mock_support::Mocks;
use serde_json::Value;

/// The smallest geometry; two waves, the second one short.
const SMALL: [&str; 10] = [
    "bench",
    "--model",
    "smollm2-135m",
    "--chunks",
    "3",
    "--rounds",
    "2",
    "--memory-mib",
    "23",
    "--path",
];
const ROUNDS: u64 = 3;
const CHUNKS: u64 = 3;

/// The mocks, where the loader finds them, a machine on which cuFile may be tried, and a directory
/// to work in.
struct Bench {
    mocks: Mocks,
    libraries: tempfile::TempDir,
    machine: tempfile::TempDir,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let mocks = Mocks::load();
        let libraries = tempfile::tempdir().unwrap();
        symlink(mocks.cuda(), libraries.path().join("libcuda.so.1")).unwrap();
        let bench = Self {
            mocks,
            libraries,
            machine: tempfile::tempdir().unwrap(),
            // On a file system that takes O_DIRECT, as build folders are.
            directory: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        };
        bench.make_machine();
        bench
    }

    /// Makes a machine with an NVMe disk at `/` (ext4), udev's record of it, and nvidia-fs.
    fn make_machine(&self) {
        const NVME: &str = "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0";
        let disk = format!("{NVME}/nvme0n1");
        let place = |path: &str| {
            let path = self.machine.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        for (path, text) in [
            ("proc/modules", "nvme 1 2 - Live 0x0\n"),
            ("proc/sys/kernel/osrelease", "6.8.0-51-generic\n"),
            ("proc/driver/nvidia-fs/version", "version: 2.26\n"),
            (
                "proc/self/mountinfo",
                "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n",
            ),
            ("dev/nvidia-fs0", ""),
            ("run/udev/data/b259:2", "E:ID_FS_TYPE=ext4\n"),
            (&format!("{NVME}/transport"), "pcie\n"),
            (&format!("{disk}/nvme0n1p2/partition"), "2\n"),
        ] {
            std::fs::write(place(path), text).unwrap();
        }
        symlink("../../nvme0", place(&format!("{disk}/device"))).unwrap();
        let partition = format!("../../../{disk}/nvme0n1p2");
        symlink(partition, place("sys/dev/block/259:2")).unwrap();
    }

    /// Takes the direct path away.
    fn remove_nvidia_fs(&self) {
        std::fs::remove_dir_all(self.machine.path().join("proc/driver/nvidia-fs")).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvrail"));
        command
            .args(SMALL)
            .arg(self.directory.path())
            .arg("--system-root")
            .arg(self.machine.path())
            .env("LD_LIBRARY_PATH", self.libraries.path())
            .env("KVRAIL_CUFILE_LIBRARY", self.mocks.cufile())
            .env("KVRAIL_MOCK_LIBCUDA", self.mocks.cuda());
        command
    }

    fn is_clean(&self) -> bool {
        std::fs::read_dir(self.directory.path())
            .unwrap()
            .next()
            .is_none()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn report(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Returns the entries of a list whose fields have these values.
fn find<'a>(list: &'a Value, fields: &[(&str, &str)]) -> Vec<&'a Value> {
    let matches = |entry: &&Value| fields.iter().all(|(key, value)| entry[*key] == *value);
    list.as_array().unwrap().iter().filter(matches).collect()
}

/// Returns whether a number with its spread is one that can have been measured.
fn is_measured(spread: &Value) -> bool {
    let number = |key| spread[key].as_f64().unwrap();
    let (min, median, max) = (number("min"), number("median"), number("max"));
    min > 0.0 && min <= median && median <= max && max.is_finite()
}

#[test]
fn every_way_and_every_method_is_measured_and_every_byte_compared() {
    for layout in ["lb", "bl"] {
        let bench = Bench::new();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("report.json");
        let output = run(bench
            .command()
            .args(["--device", "cuda:1", "--layout", layout, "--json"])
            .arg(&file));
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(bench.is_clean());
        let table = text(&output.stdout);
        for expected in [
            "Mock GPU",
            "gather + hash, kernel",
            "store, posix",
            "compute stream held",
        ] {
            assert!(table.contains(expected), "{expected}: {table}");
        }
        let report = report(&file);
        assert_eq!(report["device"]["name"], "Mock GPU");
        assert_eq!(report["device"]["ordinal"], 1);
        assert_eq!(report["layout"], layout);
        let model = &report["models"][0];
        assert_eq!(model["chunks_in_memory"], 2, "two waves");
        for method in ["kernel", "batch copy", "copy per piece"] {
            for work in ["gather", "gather + hash", "scatter", "scatter + verify"] {
                let found = find(&model["copies"], &[("method", method), ("work", work)]);
                assert_eq!(found.len(), 1, "{method} {work}");
                assert!(is_measured(&found[0]["ratio"]), "{:?}", found[0]);
            }
        }
        for (work, rows) in [("gather + hash", 1), ("scatter + verify", 1), ("gather", 0)] {
            let row = [("method", "hashing kernel"), ("work", work)];
            let found = find(&model["copies"], &row);
            assert_eq!(found.len(), rows, "{work}");
            assert!(found.iter().all(|row| is_measured(&row["ratio"])));
        }
        let ways: &[&str] = match layout {
            "lb" => &["posix", "cufile"],
            _ => &["posix", "cufile", "direct"],
        };
        for operation in ["store", "load"] {
            for way in ways {
                let found = find(&model["moves"], &[("operation", operation), ("way", way)]);
                assert!(is_measured(&found[0]["ratio"]), "{:?}", found[0]);
                assert!(
                    is_measured(&found[0]["gb_per_cpu_second"]),
                    "{:?}",
                    found[0]
                );
                assert_eq!(found[0]["held_share"].is_null(), operation == "load");
                let limit = found[0]["limit"].as_str().unwrap();
                match *way {
                    "posix" => assert!(["raw files", "pinned copy"].contains(&limit), "{limit}"),
                    "cufile" => assert_eq!(limit, "bare cuFile"),
                    _ => assert_eq!(limit, "bare cuFile, block by block"),
                }
            }
            let mut limits = vec!["raw files", "pinned copy", "bare cuFile"];
            limits.extend((layout == "bl").then_some("bare cuFile, block by block"));
            assert_eq!(
                find(&model["limits"], &[("operation", operation)]).len(),
                limits.len()
            );
            for limit in limits {
                let found = find(
                    &model["limits"],
                    &[("operation", operation), ("limit", limit)],
                );
                assert!(is_measured(&found[0]["gb_per_second"]), "{:?}", found[0]);
            }
        }
        assert_eq!(model["skipped"], Value::Array(Vec::new()));
        let verified = ROUNDS * CHUNKS * ways.len() as u64;
        assert_eq!(model["verified_chunks"], verified);
    }
}

#[test]
fn without_a_direct_path_cufile_is_measured_in_its_compatible_mode() {
    let bench = Bench::new();
    bench.remove_nvidia_fs();
    let output = run(bench.command().args(["--device", "cuda:0", "--json"]));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mounts = find(&report["models"][0]["mounts"], &[("way", "cufile")]);
    let reason = mounts[0]["reason"].as_str().unwrap();
    assert!(reason.contains("compatible mode"), "{reason}");
}

#[test]
fn a_way_that_the_store_does_not_go_is_named_with_its_reason() {
    let bench = Bench::new();
    let output = run(bench
        .command()
        .args(["--device", "cuda:0", "--layout", "bl", "--json"])
        .env("KVRAIL_MOCK_CUFILE_SCRIPT", "cuFileDriverOpen error=5007"));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let model = &report["models"][0];
    for way in ["cufile", "direct"] {
        let found = find(&model["skipped"], &[("what", way)]);
        let reason = found[0]["reason"].as_str().unwrap();
        assert!(reason.contains("5007"), "{reason}");
    }
    assert_eq!(model["mounts"].as_array().unwrap().len(), 1);
    assert!(find(&model["limits"], &[("limit", "bare cuFile")]).is_empty());
    assert_eq!(model["verified_chunks"], ROUNDS * CHUNKS);
}

#[test]
fn numbers_of_another_way_are_not_passed_off() {
    let bench = Bench::new();
    // The probe's process and the check of the mount write a few times before the chunks.
    let output = run(bench
        .command()
        .args(["--device", "cuda:0"])
        .env("KVRAIL_MOCK_CUFILE_SCRIPT", "cuFileWrite nth=9 error=5030"));
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("5030"), "{error}");
    assert!(bench.is_clean());
}

#[test]
fn what_the_driver_lacks_is_skipped_and_said() {
    let bench = Bench::new();
    let output = run(bench.command().args(["--device", "cuda", "--json"]).env(
        "KVRAIL_MOCK_CUDA_SCRIPT",
        "cuMemcpyBatchAsync error=801\ncuModuleLoadData error=222",
    ));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let model = &report["models"][0];
    for (what, reason) in [
        ("gather by hashing kernel", "222"),
        ("gather by kernel", "222"),
        ("gather by batch copy", "801"),
        ("page hashes by the GPU", "222"),
    ] {
        let found = find(&model["skipped"], &[("what", what)]);
        assert!(
            found[0]["reason"].as_str().unwrap().contains(reason),
            "{found:?}"
        );
    }
    let methods: Vec<&Value> = find(&model["copies"], &[("method", "copy per piece")]);
    assert_eq!(methods.len(), model["copies"].as_array().unwrap().len());
    assert_eq!(
        methods.len(),
        2,
        "gather and scatter, no hashes: {methods:?}"
    );
}

#[test]
fn wrong_bytes_are_exit_code_1() {
    let scattered = "kvrail_scatter_grid every=3 flip
        kvrail_copy every=5 flip
        cuMemcpyBatchAsync every=5 flip
        cuMemcpyDtoDAsync every=5 flip";
    for (script, found) in [
        ("kvrail_gather_grid every=3 flip", "the GPU finds page"),
        (scattered, "chunk"),
    ] {
        let bench = Bench::new();
        // The first launch of each kernel is its check at start. What gathers wrongly is found out by
        // the hashes, what scatters wrongly by a look at what was loaded.
        let output = run(bench
            .command()
            .args(["--device", "cuda:0"])
            .env("KVRAIL_MOCK_CUDA_SCRIPT", script));
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{script}: {error}");
        assert!(error.starts_with("error: chunk"), "{error}");
        assert!(error.contains(found), "{error}");
        assert!(bench.is_clean());
    }
}

#[test]
fn a_machine_without_gpu_is_one_clear_error() {
    let bench = Bench::new();
    let no_device = run(bench
        .command()
        .args(["--device", "cuda:0"])
        .env("KVRAIL_MOCK_DEVICES", "0"));
    let no_such = run(bench.command().args(["--device", "cuda:7"]));
    let broken = tempfile::tempdir().unwrap();
    for name in ["libcuda.so.1", "libcuda.so"] {
        std::fs::write(broken.path().join(name), "no library").unwrap();
    }
    let no_driver = run(bench
        .command()
        .args(["--device", "cuda:0"])
        .env("LD_LIBRARY_PATH", broken.path()));
    for (output, words) in [
        (no_device, ["cuInit: 100", "--device cpu"]),
        (no_such, ["cuda:7", "2 devices"]),
        (no_driver, ["libcuda.so.1", "NVIDIA's driver"]),
    ] {
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(
            error.starts_with("error: ") && error.contains("\nhint: "),
            "{error}"
        );
        for word in words {
            assert!(error.contains(word), "{word}: {error}");
        }
        assert!(output.stdout.is_empty());
    }
    assert!(bench.is_clean());
}

#[test]
fn a_gpu_without_memory_says_what_to_give_less_of() {
    let bench = Bench::new();
    let output = run(bench
        .command()
        .args(["--device", "cuda:0"])
        .env("KVRAIL_MOCK_MEMORY_MIB", "16"));
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("--memory-mib"), "{error}");
    assert!(bench.is_clean());
}
