//! `kvrail doctor` as a user runs it: on real directories, and on machines that are folders.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking; clippy spares only functions marked as tests"
)]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use mock_support::Mocks;
use serde_json::Value;
use tempfile::TempDir;

const DRIVER: &str =
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (x@y)\n";

/// The command, away from whatever this machine's environment has.
fn doctor(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvrail"));
    command
        .arg("doctor")
        .args(arguments)
        .env_remove("VIRTUAL_ENV")
        .env_remove("CONDA_PREFIX")
        .env_remove("KVRAIL_CUFILE_LIBRARY")
        .stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    doctor(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {} {}", stdout(output), stderr(output)))
}

fn text_of(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn entries(directory: &Path) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// Writes a machine's files into a folder.
fn machine(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    folder
}

#[test]
fn a_directory_is_examined_measured_and_left_clean() {
    let directory = tempfile::tempdir().unwrap();
    let path = text_of(directory.path());
    let output = run(&[path, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(entries(directory.path()), 0, "nothing is left");
    let report = json(&output);
    assert_eq!(report["ok"], true);
    assert!(report["machine"]["system"]["kernel"].is_string());
    let found = &report["directories"][0];
    assert_eq!(found["path"], path);
    assert_eq!(
        (&found["usable"], &found["problem"]),
        (&true.into(), &Value::Null)
    );
    assert!(found["mount"]["file_system"].is_string());
    assert!(found["space"]["available_bytes"].as_u64().unwrap() > 0);
    // What measures best here, if there is io_uring at all.
    let (engine, uring) = (found["engine"]["name"].as_str().unwrap(), &found["uring"]);
    assert!(["posix", "uring"].contains(&engine), "{engine}");
    assert!(engine == "posix" || uring["works"] == true, "{uring}");
    assert!(!uring["reason"].as_str().unwrap().is_empty());
    assert_eq!(found["engine"]["engine_reason"], uring["reason"]);
    assert_eq!(found["engine"]["direct"], found["direct_io"]["works"]);
    let measurements = found["measurements"].as_array().unwrap();
    let direct = found["engine"]["direct"].as_bool().unwrap();
    let engines = 1 + usize::from(uring["works"] == true);
    assert_eq!(measurements.len(), engines * (1 + usize::from(direct)));
    for measurement in measurements {
        assert!(measurement["bytes"].as_u64().unwrap() > 0);
        assert!(measurement["write_gb_per_second"].as_f64().unwrap() > 0.0);
        assert!(measurement["read_gb_per_second"].as_f64().unwrap() > 0.0);
    }
    let cufile = &found["cufile"];
    assert_eq!(cufile["works"], false);
    assert!(!cufile["reason"].as_str().unwrap().is_empty());

    let output = run(&[path, "--no-measure"]);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    for expected in [
        "machine\n",
        "  libcufile ",
        "  mount ",
        "  io_uring ",
        "  engine      posix",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    assert!(!text.contains("GB/S"), "{text}");
    assert_eq!(entries(directory.path()), 0);
}

#[test]
fn memory_is_named_as_such() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("skipped: /dev/shm cannot be written here");
        return;
    };
    let report = json(&run(&[text_of(directory.path()), "--json"]));
    let found = &report["directories"][0];
    assert_eq!(found["usable"], true);
    assert_eq!(found["mount"]["file_system"], "tmpfs");
    assert_eq!(found["engine"]["direct"], false);
    assert_eq!(found["cufile"]["refusal"]["kind"], "no_device");
    assert!(
        found["advice"][0]
            .as_str()
            .unwrap()
            .contains("use a directory on a disk")
    );
    assert_eq!(entries(directory.path()), 0);
}

#[test]
fn without_directories_only_the_machine_is_examined() {
    let output = run(&["--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["directories"], Value::Array(Vec::new()));
    assert_eq!(stdout(&run(&[])).lines().next(), Some("machine"));
}

#[test]
fn what_cannot_be_used_is_exit_code_1_and_the_rest_is_examined() {
    let directory = tempfile::tempdir().unwrap();
    let good = directory.path().join("good \u{e9}");
    let file = directory.path().join("file");
    let missing = directory.path().join("missing");
    let link = directory.path().join("link");
    std::fs::create_dir(&good).unwrap();
    std::fs::write(&file, "x").unwrap();
    symlink("missing", &link).unwrap();
    // sysfs takes no files of anybody, root or not.
    let cases = [
        (missing.as_path(), "does not exist", "create it"),
        (&link, "does not exist", "create it"),
        (&file, "is not a directory", "gds_path"),
        (
            &file.join("below"),
            "cannot be opened: Not a directory",
            "gds_path",
        ),
        (
            Path::new("/sys"),
            "cannot be written: open: ",
            "chunks can only be loaded",
        ),
    ];
    for (path, problem, advice) in cases {
        let path = text_of(path);
        let output = run(&[path, text_of(&good), "--no-measure", "--json"]);
        assert_eq!(output.status.code(), Some(1), "{path}: {}", stderr(&output));
        let report = json(&output);
        assert_eq!(report["ok"], false);
        let found = &report["directories"][0];
        assert_eq!(found["usable"], false);
        let text = found["problem"].as_str().unwrap();
        assert!(text.contains(problem), "{path}: {text}");
        let text = found["advice"].to_string();
        assert!(text.contains(advice), "{path}: {text}");
        assert_eq!(report["directories"][1]["usable"], true, "{path}");
    }
    let output = run(&[text_of(&missing)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("  problem     does not exist\n"));
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
    assert!(!missing.exists() && entries(&good) == 0);
}

#[test]
fn a_directory_that_may_not_be_written_says_whose_turn_it_is() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o555)).unwrap();
    if std::fs::write(directory.path().join("x"), "").is_ok() {
        eprintln!("skipped: this user may write everywhere (root)");
        return;
    }
    let output = run(&[text_of(directory.path())]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.contains("Permission denied"), "{text}");
    assert!(text.contains("give this user the right to write"), "{text}");
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for arguments in [
        vec!["--limit", "0"],
        vec!["--limit", "soon"],
        vec!["--what"],
        vec![""],
    ] {
        assert_eq!(run(&arguments).status.code(), Some(2), "{arguments:?}");
    }
    let help = stdout(&run(&["--help"]));
    for expected in ["Exit codes:", "KVRAIL_CUFILE_LIBRARY", "--cufile-library"] {
        assert!(help.contains(expected), "{expected} in {help}");
    }
    assert!(!help.contains("system-root"), "hidden");
}

#[test]
fn a_library_that_was_asked_for_must_be_one() {
    let output = run(&["--cufile-library", "/nonexistent/libcufile.so.0", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let report = json(&output);
    let error = report["machine"]["libcufile"]["error"].as_str().unwrap();
    assert!(error.contains("/nonexistent/libcufile.so.0"), "{error}");
    let by_environment = |value: &str| {
        let mut command = doctor(&[]);
        command.env("KVRAIL_CUFILE_LIBRARY", value);
        command.output().unwrap().status.code()
    };
    assert_eq!(by_environment("libc.so.6"), Some(1), "another library");
    assert_eq!(by_environment(""), Some(0), "empty is not set");
}

#[test]
fn odd_machines_are_described_and_break_nothing() {
    let nothing = machine(&[]);
    let noise = "\u{0}\u{1}: \n:\n 999999999999999999999 -\n";
    let odd = machine(&[
        ("proc/modules/folder", ""),
        ("proc/self/mountinfo", noise),
        ("proc/driver/nvidia/version", noise),
        ("proc/driver/nvidia/params", noise),
        ("proc/driver/nvidia/gpus/x/information", noise),
        ("proc/driver/nvidia-fs/version", noise),
        ("proc/driver/nvidia-fs/devcount", noise),
        ("proc/sys/kernel/osrelease", noise),
        ("proc/kallsyms", noise),
        ("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n"),
        ("sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n"),
        ("sys/bus/pci/devices/0000:01:00.0/resource", noise),
    ]);
    let directory = tempfile::tempdir().unwrap();
    for root in [nothing.path(), odd.path(), Path::new("/nonexistent")] {
        let arguments = [text_of(directory.path()), "--system-root", text_of(root)];
        for form in [&["--no-measure"][..], &["--json", "--no-measure"]] {
            let output = run(&[&arguments[..], form].concat());
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            assert!(stderr(&output).is_empty(), "{}", stderr(&output));
        }
    }
    let output = run(&["--system-root", text_of(odd.path())]);
    assert!(
        stdout(&output).contains("without NVIDIA's driver"),
        "{}",
        stdout(&output)
    );
    assert!(stdout(&output).contains("load NVIDIA's driver: 0000:01:00.0 has none"));
}

/// The mocks, and a folder where the loader finds libcuda.so.1.
fn libraries() -> (Mocks, TempDir) {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    symlink(mocks.cuda(), folder.path().join("libcuda.so.1")).unwrap();
    (mocks, folder)
}

/// Runs on a machine with GPUs, whose cuFile driver would never return from being opened.
fn run_with_gpus(root: &Path, arguments: &[&str]) -> Output {
    let mut arguments = arguments.to_vec();
    arguments.extend(["--limit", "2"]);
    run_with_cufile(root, "cuFileDriverOpen hang", &arguments)
}

/// Runs on a machine with GPUs, whose cuFile fails as the script says.
fn run_with_cufile(root: &Path, script: &str, arguments: &[&str]) -> Output {
    let (mocks, folder) = libraries();
    let mut command = doctor(arguments);
    command
        .args(["--system-root", text_of(root)])
        .args(["--cufile-library", text_of(mocks.cufile())])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("KVRAIL_MOCK_LIBCUDA", mocks.cuda())
        .env("KVRAIL_MOCK_CUFILE_SCRIPT", script);
    let start = Instant::now();
    let output = command.output().unwrap();
    assert!(start.elapsed() < Duration::from_secs(120), "it never hangs");
    output
}

#[test]
fn gpus_libraries_and_the_direct_path_are_shown() {
    let nvme = "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1";
    let resource =
        "0x0 0x0 0x0\n0xe000000000 0xe000ffffff 0x14220c\n0xe800000000 0xefffffffff 0x14220c\n";
    let root = machine(&[
        ("proc/modules", "nvidia_fs 1 0 - Live 0x0\n"),
        ("proc/sys/kernel/osrelease", "6.8.0-51-generic\n"),
        ("proc/driver/nvidia/version", DRIVER),
        (
            "proc/driver/nvidia/gpus/0000:65:00.0/information",
            "Model: \t NVIDIA H100\n",
        ),
        ("sys/bus/pci/devices/0000:65:00.0/resource", resource),
        ("proc/driver/nvidia-fs/version", "version: 2.26\n"),
        ("proc/driver/nvidia-fs/devcount", "16\n"),
        ("dev/nvidia-fs0", ""),
        (
            "proc/self/mountinfo",
            "22 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n",
        ),
        (&format!("{nvme}/size"), "8\n"),
        ("run/udev/data/b259:0", ""),
    ]);
    let link = root.path().join("sys/dev/block/259:0");
    std::fs::create_dir_all(link.parent().unwrap()).unwrap();
    symlink(root.path().join(nvme), link).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = text_of(directory.path());
    let output = run_with_gpus(root.path(), &[path, "--no-measure", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    let found = &report["machine"];
    assert_eq!(found["path"], "nvidia-fs", "{found}");
    assert_eq!(found["system"]["refusal"], Value::Null);
    assert_eq!(found["system"]["gpus"][0]["bar1_bytes"], 32_u64 << 30);
    let devices = found["libcuda"]["library"]["devices"].as_array().unwrap();
    assert!(!devices.is_empty());
    let library = PathBuf::from(found["libcufile"]["library"]["path"].as_str().unwrap());
    assert!(
        library.ends_with("libmock_libcufile.so"),
        "{}",
        library.display()
    );
    let mount = &report["directories"][0]["mount"];
    assert_eq!(
        (&mount["device"]["name"], &mount["device"]["kind"]),
        (&"nvme0n1".into(), &"nvme".into())
    );
    let cufile = &report["directories"][0]["cufile"];
    assert_eq!(cufile["refusal"], Value::Null, "{cufile}");
    // The driver of this mock never returns from being opened: that is seen from outside.
    let reason = cufile["reason"].as_str().unwrap();
    assert!(
        reason.contains("cuFileDriverOpen did not return"),
        "{cufile}"
    );
    assert_ne!(report["directories"][0]["engine"]["name"], "cufile");
    let works = run_with_cufile(root.path(), "", &[path, "--json"]);
    let found = &json(&works)["directories"][0];
    assert_eq!(found["engine"]["name"], "cufile", "{found}");
    let engines = found["measurements"].as_array().unwrap().iter();
    let engines: Vec<_> = engines.map(|row| row["engine"].as_str().unwrap()).collect();
    assert_eq!(engines.first(), Some(&"cufile"));
    let posix = engines.iter().filter(|name| **name == "posix").count();
    assert_eq!(posix, 2, "{engines:?}");
    assert_eq!(entries(directory.path()), 0, "a file was left");
    let text = stdout(&run_with_gpus(root.path(), &[]));
    for expected in [
        "BAR1 32.0 GiB",
        "cuFile      direct, through nvidia-fs",
        "nvidia-fs   2.26",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

#[test]
fn what_is_in_the_way_of_gpus_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = text_of(directory.path());
    let root = machine(&[
        ("proc/modules", ""),
        ("proc/driver/nvidia/version", DRIVER),
        ("proc/driver/nvidia-fs/version", "version: 2.26\n"),
        (
            "proc/self/mountinfo",
            "22 1 0:30 / / rw - overlay overlay rw\n",
        ),
    ]);
    let output = run_with_gpus(root.path(), &[path, "--no-measure", "--json"]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "POSIX works: {}",
        stderr(&output)
    );
    let report = json(&output);
    assert_eq!(report["machine"]["path"], "compat");
    assert_eq!(
        report["machine"]["system"]["refusal"]["kind"],
        "nvidia_fs_device_missing"
    );
    assert!(
        report["machine"]["advice"]
            .to_string()
            .contains("/dev/nvidia-fs*")
    );
    let found = &report["directories"][0];
    assert_eq!(found["cufile"]["refusal"]["kind"], "overlay");
    assert_eq!(
        found["cufile"]["reason"],
        "not tried: /proc/driver/nvidia-fs is there but /dev/nvidia-fs0 is not"
    );
    assert!(
        found["advice"]
            .to_string()
            .contains("mount a volume of the host")
    );
}

#[test]
fn a_mount_that_hangs_is_left_behind() {
    // A FUSE mount whose server never answers; it is gone with its last descriptor.
    const SCRIPT: &str = r#"
[ -r /dev/fuse ] && [ -w /dev/fuse ] || exit 99
exec 3<>/dev/fuse
mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 none "$1" || exit 99
"$2" doctor --limit 1 "$1" "$3" --no-measure --json
code=$?
umount -l "$1"
exit $code
"#;
    let (mount, good) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let start = Instant::now();
    let output = Command::new("sh")
        .args(["-c", SCRIPT, "sh", text_of(mount.path())])
        .args([env!("CARGO_BIN_EXE_kvrail"), text_of(good.path())])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if output.status.code() == Some(99) {
        eprintln!("skipped: no FUSE mount here: {}", stderr(&output));
        return;
    }
    assert!(start.elapsed() < Duration::from_secs(60), "it ends");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let report = json(&output);
    let found = &report["directories"][0];
    assert_eq!(
        found["problem"],
        "the directory did not return within 1.0 s"
    );
    assert_eq!(found["mount"]["file_system"], "fuse");
    assert_eq!(report["directories"][1]["usable"], true);
}
