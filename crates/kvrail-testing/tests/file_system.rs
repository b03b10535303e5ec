//! The faulty file system does what its script says, nothing else, and leaves nothing behind.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Mounted, mount};

const PAGE: usize = 4096;

fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * i % 251 + 1) as u8).collect()
}

/// Waits for what comes by itself, far longer than it takes.
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn without_rules_it_is_a_folder() {
    let Some(mounted) = mount(1) else {
        return;
    };
    let root = mounted.path();
    let content = noise(3 * PAGE + 100);
    fs::create_dir_all(root.join("a/b")).unwrap();
    fs::write(root.join("a/b/file"), &content).unwrap();
    fs::rename(root.join("a/b/file"), root.join("a/other")).unwrap();
    assert_eq!(fs::read(root.join("a/other")).unwrap(), content);
    assert_eq!(fs::read(mounted.source().join("a/other")).unwrap(), content);
    assert_eq!(
        fs::metadata(root.join("a/other")).unwrap().ino(),
        fs::metadata(mounted.source().join("a/other"))
            .unwrap()
            .ino()
    );
    let mut names: Vec<_> = fs::read_dir(root.join("a"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["b", "other"]);
    fs::remove_dir(root.join("a/b")).unwrap();
    fs::remove_file(root.join("a/other")).unwrap();
    assert_eq!(fs::read_dir(root.join("a")).unwrap().count(), 0);
    assert_eq!(mounted.hits(), 0);
}

#[test]
fn errors_come_at_the_operation_and_path_that_a_rule_names() {
    let Some(mounted) = mount(2) else {
        return;
    };
    let file = mounted.path().join("file");
    fs::write(&file, noise(PAGE)).unwrap();
    for (name, number) in [
        ("EIO", 5),
        ("ENOSPC", 28),
        ("EDQUOT", 122),
        ("ESTALE", 116),
        ("EACCES", 13),
        ("EROFS", 30),
        ("ENOENT", 2),
        ("EINTR", 4),
    ] {
        mounted.set(&format!("read,rename,statfs fil* error={name}"));
        let open = fs::File::open(&file).unwrap();
        let mut buffer = vec![0; PAGE];
        assert_eq!(
            open.read_at(&mut buffer, 0).unwrap_err().raw_os_error(),
            Some(number)
        );
        let renamed = fs::rename(&file, mounted.path().join("file2"));
        assert_eq!(renamed.unwrap_err().raw_os_error(), Some(number));
        assert!(fs::metadata(&file).is_ok());
    }
    assert!(mounted.hits() >= 16);
    mounted.heal();
    assert_eq!(fs::read(&file).unwrap(), noise(PAGE));
}

#[test]
fn transfers_are_short_and_bytes_change() {
    let Some(mounted) = mount(3) else {
        return;
    };
    let file = mounted.path().join("file");
    let content = noise(4 * PAGE);
    fs::write(&file, &content).unwrap();
    let read = || {
        let mut buffer = vec![0; 4 * PAGE];
        let count = fs::File::open(&file)
            .unwrap()
            .read_at(&mut buffer, 0)
            .unwrap();
        buffer.truncate(count);
        buffer
    };
    mounted.set("read * short");
    assert_eq!(read(), content[..2 * PAGE]);
    mounted.set("write * short");
    let open = fs::OpenOptions::new().write(true).open(&file).unwrap();
    assert_eq!(open.write_at(&content, 0).unwrap(), 2 * PAGE);
    for damage in ["flip", "zero", "swap"] {
        mounted.set(&format!("read * {damage}"));
        assert_ne!(read(), content, "{damage}");
        mounted.heal();
        assert_eq!(read(), content, "{damage} was on the way only");
    }
    mounted.set("write * flip");
    fs::write(&file, &content).unwrap();
    mounted.heal();
    assert_ne!(read(), content);
}

#[test]
fn what_hangs_goes_on_when_its_rule_is_gone_and_nothing_else_waits() {
    let Some(mounted) = mount(4) else {
        return;
    };
    let root = mounted.path().to_path_buf();
    fs::write(root.join("file"), "x").unwrap();
    mounted.set("open file hang\nopen slow delay=150ms");
    let hanging = std::thread::spawn({
        let path = root.join("file");
        move || fs::read(path).unwrap()
    });
    let start = Instant::now();
    fs::write(root.join("free"), "y").unwrap();
    fs::write(root.join("slow"), "y").unwrap();
    fs::read(root.join("slow")).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(150));
    assert!(!hanging.is_finished());
    mounted.heal();
    assert_eq!(hanging.join().unwrap(), b"x");
}

#[test]
fn names_appear_late_absence_is_remembered_and_clocks_differ() {
    let Some(mounted) = mount(5) else {
        return;
    };
    let root = mounted.path().to_path_buf();
    let listed = |name: &str| {
        let mut entries = fs::read_dir(&root).unwrap();
        entries.any(|entry| entry.unwrap().file_name().to_str() == Some(name))
    };
    fs::write(root.join("temp"), "x").unwrap();
    mounted.set("lookup seen late=400ms\nreaddir * late=800ms");
    fs::rename(root.join("temp"), root.join("seen")).unwrap();
    assert!(!root.join("seen").exists() && !listed("seen"));
    wait_until("the renamed file", || root.join("seen").exists());
    wait_until("its entry", || listed("seen"));

    mounted.set("lookup new stale=400ms");
    assert!(!root.join("new").exists());
    fs::write(mounted.source().join("new"), "made by another host").unwrap();
    assert!(
        !root.join("new").exists(),
        "absence is believed for a while"
    );
    wait_until("the other host's file", || root.join("new").exists());

    let real = fs::metadata(mounted.source().join("seen")).unwrap().mtime();
    for skew in [3600, -3600] {
        mounted.set(&format!("lookup,getattr * skew={skew}s"));
        assert_eq!(
            fs::metadata(root.join("seen")).unwrap().mtime(),
            real + skew
        );
    }
}

#[test]
fn a_mount_that_is_taken_away_ends_all_that_hangs_on_it() {
    let Some(mut mounted) = mount(6) else {
        return;
    };
    let root = mounted.path().to_path_buf();
    fs::write(root.join("file"), "x").unwrap();
    mounted.set("open file hang");
    let hanging = std::thread::spawn({
        let path = root.join("file");
        move || fs::read(path)
    });
    wait_until("the hang", || mounted.hits() > 0);
    mounted.mount.kill();
    assert!(hanging.join().unwrap().is_err());
    assert!(!is_mounted(&root));
}

#[test]
fn the_mount_goes_with_the_process_that_asked_for_it() {
    let Some(Mounted {
        folder,
        mount: mounted,
    }) = mount(7)
    else {
        return;
    };
    drop(mounted);
    // A shell that is killed while its fault-fs hangs on an open.
    let script = "exec \"$0\" \"$1\" \"$2\" --control \"$3\" --until-input-ends";
    let paths = ["source", "mount", "control"].map(|part| folder.path().join(part));
    fs::write(&paths[2], "open * hang").unwrap();
    fs::write(paths[0].join("file"), "x").unwrap();
    let mut holder = std::process::Command::new("sh")
        .args(["-c", &format!("sleep 3600 | ({script})")])
        .arg(env!("CARGO_BIN_EXE_fault-fs"))
        .args(&paths)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut word = [0; 7];
    holder.stdout.take().unwrap().read_exact(&mut word).unwrap();
    assert_eq!(&word, b"mounted");
    let (sender, receiver) = std::sync::mpsc::channel();
    let hanging = std::thread::spawn({
        let path = paths[1].join("file");
        move || {
            sender.send(rustix::thread::gettid()).unwrap();
            fs::read(path)
        }
    });
    // A thread that came late would find the mount gone, and nothing in its place.
    let thread = receiver.recv().unwrap().as_raw_nonzero();
    let call = format!("/proc/self/task/{thread}/syscall");
    // A thread in a call shows its number, one that runs does not.
    wait_until("the open", || {
        fs::read_to_string(&call).is_ok_and(|call| !call.starts_with("running"))
    });
    // The sleeping process holds the input; with it the input ends.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", holder.id()));
    for child in children.unwrap().split_whitespace() {
        let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
        if name.trim() == "sleep" {
            let process = rustix::process::Pid::from_raw(child.parse().unwrap()).unwrap();
            rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
        }
    }
    let error = hanging.join().unwrap().unwrap_err();
    assert_ne!(error.kind(), ErrorKind::NotFound);
    wait_until("the unmounting", || !is_mounted(&paths[1]));
    holder.wait().unwrap();
}

fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(4) == path.to_str())
}
