//! The commands that scrub, remove and explain, as a user runs them.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking; clippy spares only functions marked as tests"
)]

mod common;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use common::{
    CHUNKS, chunk_paths, json, key, kvrail, make_namespace, path_of, stderr, stdout, store,
};
use kvrail::store::capacity::usage;

/// Flips a bit of a file's payload.
fn damage(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn make_old(path: &Path, days: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    let then = SystemTime::now() - Duration::from_secs(days * 86_400);
    file.set_modified(then).unwrap();
}

/// Returns every file and folder below a directory.
fn tree(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![directory.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                folders.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    found
}

fn namespaces(directory: &Path) -> Vec<String> {
    let listing = json(&kvrail(&["ls", directory.to_str().unwrap(), "--json"]));
    let found = listing["namespaces"].as_array().unwrap().clone();
    found
        .iter()
        .map(|one| one["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn verify_sets_bad_chunks_aside_and_stat_and_explain_say_why() {
    let directory = store();
    let files = chunk_paths(&directory);
    damage(&files[2]);
    let repaired = kvrail(&["verify", path_of(&directory), "--repair", "--json"]);
    assert_eq!(repaired.status.code(), Some(1), "damage was found");
    let found = json(&repaired);
    assert_eq!(
        (&found["checked"], &found["damaged_count"]),
        (&CHUNKS.into(), &1.into())
    );
    assert_eq!(
        (&found["set_aside"], &found["removed"]),
        (&1.into(), &0.into())
    );
    assert!(!files[2].exists());
    let again = kvrail(&["verify", path_of(&directory)]);
    assert_eq!(again.status.code(), Some(0));
    assert!(
        stdout(&again).contains("checked 4 chunks"),
        "{}",
        stdout(&again)
    );

    let text = stdout(&kvrail(&["stat", path_of(&directory), "--chains"]));
    for expected in [
        "quarantined  1 (",
        "page 0 of 8 does not match its checksum",
        // Two chunks lie behind the one that is missing.
        "1 starts, 1 ends, the longest of 2 chunks, 2 unreachable, 0 unreadable",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    let keys: Vec<String> = (0..CHUNKS).map(|number| key(number).to_string()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let explained = kvrail(&[&["explain", path_of(&directory)][..], &keys].concat());
    let text = stdout(&explained);
    for expected in [
        "chunk 1 (tokens 256..512)  hit  ",
        "present and whole: ",
        "chunk 2 (tokens 512..768)  in quarantine  ",
        "chunk 3 (tokens 768..1024)  hit  ",
        "chunks behind the first that is missing are not loaded",
        "2 of 5 chunks can be loaded; the first miss is chunk 2 (tokens 512..768): set aside ",
        " ago: page 0 of 8 does not match its checksum",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

#[test]
fn explain_knows_damage_absence_and_other_namespaces() {
    let directory = store();
    make_namespace(directory.path(), "float8");
    let files = chunk_paths(&directory);
    damage(&files[0]);
    std::fs::remove_file(&files[1]).unwrap();
    let name = files[0].ancestors().nth(3).unwrap().file_name().unwrap();
    let name = name.to_str().unwrap();
    let keys = [
        key(0).to_string(),
        key(1).to_string().to_uppercase(),
        "ab".repeat(32),
    ];
    let explain = |extra: &[&str]| {
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        json(&kvrail(
            &[
                &["explain", path_of(&directory), "--json"][..],
                extra,
                &keys,
            ]
            .concat(),
        ))
    };
    let id = name.rsplit_once('-').unwrap().1;
    let found = explain(&["--namespace", id]);
    let chunks = &found["namespaces"][0]["chunks"];
    assert_eq!(found["namespaces"][0]["usable"], 0);
    let verdicts = [0, 1, 2].map(|index| chunks[index]["verdict"].as_str().unwrap());
    assert_eq!(verdicts, ["damaged", "never seen", "never seen"]);
    let other = &chunks[1]["elsewhere"][0];
    assert_ne!(other["namespace"], name);
    let differences = other["differences"].to_string();
    assert!(differences.contains("identity.kv_dtype"), "{differences}");
    assert_eq!(chunks[2]["elsewhere"].as_array().unwrap().len(), 0);
    let answer = found["namespaces"][0]["answer"].as_str().unwrap();
    assert!(
        answer
            .starts_with("0 of 3 chunks can be loaded; the first miss is chunk 0: present and bad"),
        "{answer}"
    );
    // Without a namespace, both have something to say.
    assert_eq!(explain(&[])["namespaces"].as_array().unwrap().len(), 2);

    let unknown = kvrail(&[
        "explain",
        path_of(&directory),
        "--namespace",
        "x",
        &"ab".repeat(32),
    ]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(stderr(&unknown).contains(name), "{}", stderr(&unknown));
    for bad in ["xyz", "ab", ""] {
        let refused = kvrail(&["explain", path_of(&directory), bad]);
        assert_eq!(refused.status.code(), Some(2), "{bad}");
    }
}

#[test]
fn a_sample_is_the_same_for_the_same_seed_and_has_the_size_that_was_asked_for() {
    let directory = store();
    let verify = |extra: &[&str]| {
        json(&kvrail(
            &[&["verify", path_of(&directory), "--json"][..], extra].concat(),
        ))
    };
    for count in ["1", "3", "5", "99"] {
        let found = verify(&["--sample", count, "--seed", "7"]);
        let expected = count.parse::<u64>().unwrap().min(CHUNKS.into());
        assert_eq!(found["checked"], expected, "{count}");
    }
    assert_eq!(verify(&["--sample", "100%"])["checked"], CHUNKS);
    // With all chunks damaged, the damaged ones are the sample.
    for file in chunk_paths(&directory) {
        damage(&file);
    }
    let drawn = |seed: &str| verify(&["--sample", "2", "--seed", seed])["damaged"].clone();
    assert_eq!(drawn("7"), drawn("7"));
    let seeds: Vec<_> = (0..20)
        .map(|seed| drawn(&seed.to_string()).to_string())
        .collect();
    assert!(
        seeds.iter().any(|one| *one != seeds[0]),
        "every seed draws the same"
    );
    let shares: u64 = (0..40)
        .map(|seed: u32| {
            verify(&["--sample", "40%", "--seed", &seed.to_string()])["checked"]
                .as_u64()
                .unwrap()
        })
        .sum();
    assert!(
        (40..120).contains(&shares),
        "{shares} of 200 were drawn, 80 expected"
    );
}

#[test]
fn an_interrupted_run_goes_on_and_a_file_of_another_run_is_refused() {
    let directory = store();
    let files = chunk_paths(&directory);
    damage(&files[0]);
    let state = directory.path().join("state.json");
    let state_path = state.to_str().unwrap();
    let namespace = files[0].ancestors().nth(3).unwrap().file_name().unwrap();
    // As if it had stopped behind the third chunk, with the damage found.
    let text = serde_json::json!({
        "version": 1, "directory": path_of(&directory), "selection": "all", "seed": 5,
        "namespace": namespace.to_str().unwrap(), "group": 0, "rank": 0,
        "key": key(2).to_string(), "checked": 3, "checked_bytes": 300, "damaged": 1,
    });
    std::fs::write(&state, text.to_string()).unwrap();
    let verify = |extra: &[&str]| {
        kvrail(
            &[
                &[
                    "verify",
                    path_of(&directory),
                    "--json",
                    "--resume",
                    state_path,
                ][..],
                extra,
            ]
            .concat(),
        )
    };
    let other = verify(&["--sample", "3"]);
    assert_eq!(other.status.code(), Some(2));
    assert!(
        stderr(&other).contains("of another run: all of"),
        "{}",
        stderr(&other)
    );
    let went_on = verify(&[]);
    assert_eq!(went_on.status.code(), Some(1), "damage found before counts");
    let found = json(&went_on);
    assert_eq!(
        (&found["checked"], &found["damaged_count"]),
        (&5.into(), &1.into())
    );
    assert_eq!(
        found["damaged"].as_array().unwrap().len(),
        0,
        "not read again"
    );
    assert!(!state.exists(), "the run came to its end");
    let anew = json(&verify(&[]));
    assert_eq!(
        (&anew["checked"], &anew["resumed"]),
        (&5.into(), &false.into())
    );
    for garbage in ["", "{}", "no", &"9".repeat(100_000)] {
        std::fs::write(&state, garbage).unwrap();
        let refused = verify(&[]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(stderr(&refused).contains("remove the file to begin anew"));
    }
}

#[test]
fn a_rate_is_kept() {
    let directory = store();
    let bytes: u64 = chunk_paths(&directory)
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .sum();
    // Half a second for all but the last chunk, which is read when the time of the others is over.
    let rate = format!("{}kB", 2 * bytes / 1000);
    let start = Instant::now();
    let output = kvrail(&[
        "verify",
        path_of(&directory),
        "--rate",
        &rate,
        "--threads",
        "3",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(380), "{took:?}");
}

#[test]
fn rm_removes_what_is_named_and_nothing_else() {
    let directory = store();
    make_namespace(directory.path(), "float8");
    let both = namespaces(directory.path());
    let before = tree(directory.path());
    let path = path_of(&directory);
    for wrong in [
        &["rm", path][..],
        &["rm", path, "--namespace", "nobody", "--yes"],
        &[
            "rm",
            path,
            "--namespace",
            &both[0],
            "--all-but",
            &both[1],
            "--yes",
        ],
        &["rm", path, "--older-than", "30", "--yes"],
        // No terminal to ask on.
        &["rm", path, "--namespace", &both[0]],
        &["rm", "/tmp", "--older-than", "1d", "--yes"],
        &[
            "rm",
            directory.path().join(&both[0]).to_str().unwrap(),
            "--older-than",
            "1d",
            "--yes",
        ],
    ] {
        let output = kvrail(wrong);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{wrong:?}: {}",
            stdout(&output)
        );
        assert_eq!(tree(directory.path()), before, "{wrong:?}");
    }
    let looked = stdout(&kvrail(&["rm", path, "--namespace", &both[0], "--dry-run"]));
    assert!(looked.contains("would remove 5 chunks"), "{looked}");
    assert_eq!(tree(directory.path()), before);
    // What is not kvrail's stays, with the folder that holds it.
    let kept = directory.path().join(&both[0]).join("g0r0/notes.txt");
    std::fs::write(&kept, "mine").unwrap();
    let removed = kvrail(&["rm", path, "--namespace", &both[0], "--yes", "--json"]);
    let found = json(&removed);
    assert_eq!(found["chunks"], CHUNKS, "{}", stderr(&removed));
    assert_eq!(
        found["namespaces"][0]["kept_folders"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    assert_eq!(namespaces(directory.path()), [both[1].clone()]);
    let left: Vec<PathBuf> = tree(&directory.path().join(&both[0]));
    assert_eq!(left, [kept.parent().unwrap().to_path_buf(), kept.clone()]);
    let output = kvrail(&["verify", path]);
    assert_eq!(output.status.code(), Some(0), "the other one is whole");
    // All but one: there is only that one.
    let output = stdout(&kvrail(&["rm", path, "--all-but", &both[1], "--yes"]));
    assert!(output.contains("removed 0 chunks"), "{output}");
    let output = stdout(&kvrail(&["rm", path, "--namespace", &both[1], "--yes"]));
    assert!(output.contains("removed 5 chunks"), "{output}");
    assert!(!directory.path().join(&both[1]).exists());
}

#[test]
fn rm_by_age_spares_what_was_used() {
    let directory = store();
    let files = chunk_paths(&directory);
    make_old(&files[1], 40);
    make_old(&files[3], 20);
    let path = path_of(&directory);
    let text = stdout(&kvrail(&["stat", path]));
    for expected in ["used < 1 h   3 (", "used < 30 d  1 (", "older        1 ("] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    let output = kvrail(&["rm", path, "--older-than", "30d", "--yes"]);
    assert!(
        stdout(&output).contains("removed 1 chunks"),
        "{}",
        stdout(&output)
    );
    let left = [true, false, true, true, true];
    assert_eq!(
        files.iter().map(|file| file.exists()).collect::<Vec<_>>(),
        left
    );
    damage(&files[0]);
    kvrail(&["verify", path, "--repair"]);
    let output = kvrail(&["rm", path, "--quarantine", "--yes"]);
    assert!(
        stdout(&output).contains("removed 1 chunks"),
        "{}",
        stdout(&output)
    );
    let aside = files[0].ancestors().nth(3).unwrap().join("quarantine");
    assert_eq!(tree(&aside), Vec::<PathBuf>::new());
    assert_eq!(chunk_paths(&directory).len(), 3);
}

#[test]
fn rm_follows_no_link() {
    let directory = store();
    let outside = tempfile::tempdir().unwrap();
    let files = chunk_paths(&directory);
    let folder = files[0].parent().unwrap();
    let target = outside.path().join("folder");
    std::fs::rename(folder, &target).unwrap();
    symlink(&target, folder).unwrap();
    let name = namespaces(directory.path()).remove(0);
    let output = kvrail(&[
        "rm",
        path_of(&directory),
        "--namespace",
        &name,
        "--yes",
        "--json",
    ]);
    assert_eq!(json(&output)["chunks"], CHUNKS - 1, "{}", stderr(&output));
    assert_eq!(tree(&target).len(), 1, "the chunk outside is still there");
    assert!(folder.symlink_metadata().unwrap().is_symlink());
}

#[test]
fn rm_corrects_the_account_of_the_directory() {
    let directory = store();
    let bytes = || -> u64 {
        let files = tree(directory.path()).into_iter();
        let chunks = files.filter(|path| path.extension().is_some_and(|end| end == "safetensors"));
        chunks.map(|path| path.metadata().unwrap().len()).sum()
    };
    let counted = || usage(directory.path()).unwrap().bytes.unwrap();
    let before = counted();
    assert_eq!((before, before > 0), (bytes(), true));
    // Some of it.
    make_old(&chunk_paths(&directory)[1], 40);
    let path = path_of(&directory);
    let done = json(&kvrail(&[
        "rm",
        path,
        "--older-than",
        "30d",
        "--yes",
        "--json",
    ]));
    assert_eq!(done["chunks"], 1);
    assert_eq!(counted(), before - done["bytes"].as_u64().unwrap());
    assert_eq!(counted(), bytes());
    // What lies in quarantine is counted as well, until it goes.
    damage(&chunk_paths(&directory)[0]);
    kvrail(&["verify", path, "--repair"]);
    assert_eq!(counted(), bytes());
    let done = json(&kvrail(&["rm", path, "--quarantine", "--yes", "--json"]));
    assert_eq!((&done["chunks"], counted()), (&1.into(), bytes()));
    // A dry run and a refusal change nothing, all of it leaves nothing.
    let before = counted();
    let name = namespaces(directory.path()).remove(0);
    kvrail(&["rm", path, "--namespace", &name, "--dry-run"]);
    kvrail(&["rm", path, "--namespace", &name]);
    assert_eq!((counted(), bytes()), (before, before));
    let done = kvrail(&["rm", path, "--namespace", &name, "--yes"]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert_eq!((counted(), bytes()), (0, 0));
}
