//! When cuFile is not used: what the machine, the trial in another process and this one say.

use super::*;

/// Attaches on what `change` made of the machine or the mocks; the bytes must come and go by POSIX,
/// with this reason.
pub(crate) fn assert_posix(bench: &Bench, kind: Kind, reason: &str) {
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let cache = Cache::attach(bench, &store, 0, kind).unwrap();
    bench.mocks.script_cufile("");
    let report = store.describe().remove(0);
    assert_eq!(report.engine, "posix", "{reason}");
    assert!(report.reason.contains(reason), "{}", report.reason);
    let lines = store.take_notices();
    let lines: Vec<_> = lines
        .iter()
        .filter(|notice| notice.message.contains(reason))
        .collect();
    assert_eq!(lines.len(), 1, "{reason}: {lines:?}");
    let content = noise(3, cache.bytes());
    cache.write(&content);
    assert_eq!(cache.store(1, [4, 7]).stored, 1, "{reason}");
    assert_eq!(cache.load(1, 0, &[0, 1]).loaded, 1, "{reason}");
    let found = cache.read();
    assert!(
        block(kind, &found, 0) == block(kind, &content, 4),
        "{reason}"
    );
    assert!(
        block(kind, &found, 1) == block(kind, &content, 7),
        "{reason}"
    );
    assert_eq!(store.metrics().cufile_chunks_stored, 0);
}

#[test]
fn a_machine_where_cufile_must_not_be_touched_uses_posix() {
    type Change = fn(&mut Bench);
    let changes: [(&str, Change); 9] = [
        ("no /proc/modules", |bench| {
            bench.machine.without("proc/modules")
        }),
        ("/dev/nvidia-fs0 is not", |bench| {
            bench.machine.without("dev/nvidia-fs0")
        }),
        ("neither nvidia-fs nor P2PDMA", |bench| {
            bench.machine.without("proc/driver/nvidia-fs");
        }),
        ("running in a container?", |bench| {
            bench.machine.without("run/udev/data/b259:2")
        }),
        ("overlay is a container's own", |bench| {
            bench
                .machine
                .mount("22 1 0:50 / / rw - overlay overlay rw\n");
        }),
        ("tmpfs has no device", |bench| {
            bench.machine.mount("22 1 0:50 / / rw - tmpfs tmpfs rw\n");
        }),
        ("libkvrail-no-cufile.so.0", |bench| {
            bench.libraries.cufile = vec!["libkvrail-no-cufile.so.0".into()];
        }),
        ("no program was named", |bench| bench.probe = None),
        ("/nonexistent/probe was not started", |bench| {
            bench.probe.as_mut().unwrap().program = "/nonexistent/probe".into();
        }),
    ];
    for (reason, change) in changes {
        let mut bench = Bench::start();
        change(&mut bench);
        assert_posix(&bench, Kind::LayersOutermost, reason);
        assert_eq!(bench.mocks.cufile_calls("cuFileDriverOpen"), 0, "{reason}");
    }
    let mut bench = Bench::start();
    bench.config.use_cufile = false;
    assert_posix(&bench, Kind::BlocksOutermost, "turned off by `use_cufile`");
}

#[test]
fn a_machine_with_p2pdma_and_no_nvidia_fs_uses_cufile() {
    // SAFETY: no other thread of this test reads the environment now.
    unsafe { std::env::set_var("KVRAIL_MOCK_ONLY_P2PDMA", "1") };
    let bench = Bench::start();
    // Where nvidia-fs seems to be, P2PDMA is the user's choice, and this library has no direct path.
    assert_posix(&bench, Kind::LayersOutermost, "cuFileDriverOpen: 5001");
    bench.machine.with_p2pdma_only();
    for kind in KINDS {
        round_trip(&bench, kind);
    }
}

#[test]
fn whatever_fails_in_the_process_that_tries_it_never_reaches_this_one() {
    for (script, reason) in [
        ("cuFileDriverOpen error=5033", "cuFileDriverOpen: 5033"),
        (
            "cuFileDriverOpen hang",
            "cuFileDriverOpen did not return within 0.5 s",
        ),
        ("cuFileBufRegister error=5036", "BAR1 full?"),
        (
            "cuFileHandleRegister error=5027",
            "no udev record for this mount",
        ),
        (
            "cuFileHandleRegister error=5030",
            "cuFileHandleRegister: 5030",
        ),
        ("cuFileWrite error=5030", "cuFileWrite: 5030"),
        ("cuFileWrite short=4096", "expected 1048576 bytes, got 4096"),
        ("cuFileRead error=5048", "cuFileRead: 5048"),
        ("cuFileRead short=8192", "expected 1048576 bytes, got 8192"),
        ("cuFileRead flip", "what was read is not what was written"),
        ("cuFileRead hang", "did not return within 0.5 s"),
    ] {
        let mut bench = Bench::start();
        bench.config.wait_limit_seconds = 0.5;
        if !script.ends_with("hang") {
            bench.config.wait_limit_seconds = 20.0;
        }
        // SAFETY: no other thread of this test reads the environment now.
        unsafe { std::env::set_var("KVRAIL_MOCK_CUFILE_SCRIPT", script) };
        let folder = bench.folder();
        let store = bench.open(folder.path());
        drop(Cache::attach(&bench, &store, 0, Kind::LayersOutermost).unwrap());
        let report = store.describe().remove(0);
        assert_eq!(report.engine, "posix", "{script}");
        assert!(
            report.reason.contains(reason),
            "{script}: {}",
            report.reason
        );
        assert_eq!(bench.mocks.cufile_calls("cuFileDriverOpen"), 0, "{script}");
        assert_eq!(
            gpu_cache::leftovers(folder.path()),
            0,
            "{script}: a file is left"
        );
    }
    // SAFETY: as above.
    unsafe { std::env::remove_var("KVRAIL_MOCK_CUFILE_SCRIPT") };
}

#[test]
fn what_works_in_another_process_and_not_here_is_posix_too() {
    for (script, reason) in [
        ("cuFileDriverOpen error=5030", "cuFileDriverOpen: 5030"),
        (
            "cuFileDriverOpen hang",
            "cuFileDriverOpen did not return within",
        ),
        ("cuFileBufRegister error=5036", "BAR1 full?"),
        (
            "cuFileBufRegister hang",
            "cuFileBufRegister did not return within",
        ),
        (
            "cuFileHandleRegister error=5027",
            "no udev record for this mount",
        ),
        ("cuFileWrite error=5030", "cuFileWrite: 5030"),
        ("cuFileWrite short=0", "expected 4096 bytes, got 0"),
        ("cuFileRead error=5048", "cuFileRead: 5048"),
        ("cuFileRead flip", "what was read is not what was written"),
        ("cuFileRead hang", "did not answer in time"),
    ] {
        let mut bench = Bench::start();
        if script.ends_with("hang") {
            bench.config.wait_limit_seconds = 2.0;
        }
        bench.mocks.script_cufile(script);
        assert_posix(&bench, Kind::LayersOutermost, reason);
    }
}
