use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::super::{IoFile, OpenMode};
use super::*;

fn open(path: &Path) -> Folder {
    Folder::open(path, FolderRules::default()).unwrap()
}

fn mode_of(path: &Path) -> u32 {
    std::fs::symlink_metadata(path)
        .unwrap()
        .permissions()
        .mode()
        & 0o7777
}

/// A tree with a good file, and links to it, to its folder and to the outside.
fn tree() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("inside/a/b")).unwrap();
    std::fs::create_dir(root.path().join("outside")).unwrap();
    for file in ["inside/a/b/file", "outside/file"] {
        std::fs::write(root.path().join(file), file).unwrap();
    }
    let link = |target: &Path, name: &str| symlink(target, root.path().join(name)).unwrap();
    link(Path::new("b"), "inside/a/to-b");
    link(&root.path().join("outside"), "inside/a/to-outside");
    link(&root.path().join("outside/file"), "inside/a/b/to-file");
    link(Path::new("a"), "inside/to-a");
    root
}

#[test]
fn no_link_is_followed_with_openat2_and_without() {
    let root = tree();
    let inside = open(&root.path().join("inside"));
    let flags = OFlags::RDONLY;
    if !kernel_resolves() {
        eprintln!("skipped in part: this kernel has no openat2");
    }
    for kernel in [false, kernel_resolves()] {
        let open = |below: &str| {
            open_below(
                inside.as_fd(),
                Path::new(below),
                flags,
                Mode::empty(),
                kernel,
            )
        };
        assert!(open("a/b/file").is_ok());
        assert!(open("a").is_ok());
        for link in [
            "to-a",
            "to-a/b/file",
            "a/to-b/file",
            "a/to-outside/file",
            "a/b/to-file",
        ] {
            let errno = open(link).unwrap_err();
            assert!(
                matches!(errno, Errno::LOOP | Errno::NOTDIR),
                "{link} with openat2 {kernel}: {errno:?}"
            );
        }
        for outside in ["..", "../outside/file", "a/../a/b/file", "/etc/passwd", ""] {
            assert_eq!(open(outside).unwrap_err(), Errno::INVAL, "{outside}");
        }
        assert_eq!(open("a/b/none").unwrap_err(), Errno::NOENT);
    }
}

#[test]
fn a_link_is_no_folder_and_no_file_but_it_can_be_removed() {
    let root = tree();
    let inside = open(&root.path().join("inside"));
    assert!(inside.folder("a/to-outside").is_err());
    assert!(inside.make("a/to-outside/new", false).is_err());
    assert!(!root.path().join("outside/new").exists());
    assert_eq!(inside.status("a/to-outside/file").unwrap(), None);
    assert!(!inside.holds("a/to-outside/file").unwrap());
    let link = inside.status("a/b/to-file").unwrap().unwrap();
    assert!(!link.is_file && !link.is_folder);
    assert!(inside.holds("a/b/to-file").unwrap());
    let b = inside.folder("a/b").unwrap();
    b.remove_file("to-file").unwrap();
    assert!(root.path().join("outside/file").exists());
    let made = IoFile::open_in(&inside, "a/to-outside/new", OpenMode::CreateNew, false);
    assert!(made.is_err() && !root.path().join("outside/new").exists());
}

#[test]
fn bits_are_exact_whatever_the_umask_and_old_ones_stay() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("old")).unwrap();
    std::fs::set_permissions(
        root.path().join("old"),
        std::fs::Permissions::from_mode(0o2711),
    )
    .unwrap();
    for (bits, folder_bits) in [(0o600, 0o700), (0o660, 0o770), (0o644, 0o755)] {
        let rules = FolderRules {
            permissions: Permissions::of_files(bits),
            observer: None,
        };
        let name = format!("{bits:o}");
        let below = format!("old/{name}/x");
        let made = Folder::open(root.path(), rules)
            .unwrap()
            .make(&below, false)
            .unwrap();
        drop(IoFile::open_in(&made, "file", OpenMode::CreateNew, false).unwrap());
        let path = root.path().join(&below);
        assert_eq!(mode_of(&path) & 0o777, folder_bits);
        // What the folder above gives on, such as its group, is not taken away.
        assert_eq!(mode_of(&path) & 0o2000, 0o2000);
        assert_eq!(mode_of(&path.join("file")), bits);
        assert_eq!(mode_of(&root.path().join("old")), 0o2711);
    }
}

#[test]
fn a_renamed_folder_is_not_mistaken_and_steps_are_told_in_order() {
    let root = tempfile::tempdir().unwrap();
    let steps: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = Arc::clone(&steps);
    let base = root.path().to_path_buf();
    let rules = FolderRules {
        observer: Some(Observer::new(move |step| {
            let text = format!("{step:?}").replace(&format!("{}/", base.display()), "");
            seen.lock().unwrap().push(text);
        })),
        ..FolderRules::default()
    };
    let top = Folder::open(root.path(), rules).unwrap();
    let made = top.make("a/b", true).unwrap();
    drop(IoFile::open_in(&made, "file", OpenMode::CreateNew, false).unwrap());
    made.rename("file", &top, "file").unwrap();
    assert!(made.rename("../file", &top, "file").is_err());
    assert!(top.rename_to_free("a", &made, "file/x").is_err());
    top.remove_file("file").unwrap();
    assert!(top.remove_file("a/b").is_err());
    made.sync().unwrap();
    let steps = steps.lock().unwrap().join("\n");
    let expected = [
        r#"MakeFolder("a")"#.to_owned(),
        format!("SyncFolder({:?})", root.path()),
        r#"MakeFolder("a/b")"#.to_owned(),
        r#"SyncFolder("a")"#.to_owned(),
        r#"CreateFile("a/b/file")"#.to_owned(),
        r#"Rename { source: "a/b/file", target: "file" }"#.to_owned(),
        r#"Remove("file")"#.to_owned(),
        r#"SyncFolder("a/b")"#.to_owned(),
    ];
    assert_eq!(steps, expected.join("\n"));
}

#[test]
fn a_configured_path_is_made_with_its_parents() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a/b");
    let rules = FolderRules::default();
    make_path(&path, &rules, true).unwrap();
    make_path(&path, &rules, true).unwrap();
    assert_eq!(
        (mode_of(&path), mode_of(&root.path().join("a"))),
        (0o700, 0o700)
    );
    std::fs::write(root.path().join("file"), "").unwrap();
    let error = make_path(&root.path().join("file"), &rules, false).unwrap_err();
    assert_eq!(
        error.os_error().unwrap().kind(),
        std::io::ErrorKind::NotADirectory
    );
    // A user's own path may lead through links.
    symlink(&path, root.path().join("link")).unwrap();
    make_path(&root.path().join("link/c"), &rules, false).unwrap();
    assert!(path.join("c").is_dir());
}

proptest! {
    /// Whatever the text: what opens lies inside.
    #[test]
    fn no_text_leads_outside(below in "[a-b./]{0,12}|.{0,20}") {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("inside/a/b")).unwrap();
        let inside = open(&root.path().join("inside"));
        for kernel in [false, kernel_resolves()] {
            let opened = open_below(
                inside.as_fd(), Path::new(&below), OFlags::PATH, Mode::empty(), kernel,
            );
            if let Ok(opened) = opened {
                let inode = rustix::fs::fstat(&opened).unwrap().st_ino;
                let a = rustix::fs::stat(root.path().join("inside/a")).unwrap().st_ino;
                let b = rustix::fs::stat(root.path().join("inside/a/b")).unwrap().st_ino;
                prop_assert!(inode == a || inode == b, "{below:?}");
            }
        }
    }
}
