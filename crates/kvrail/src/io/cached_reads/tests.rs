//! What is cached comes from the page cache, all else from the engine, and no byte from both.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use proptest::prelude::*;
use rustix::fs::{Advice, fadvise};

use super::*;
use crate::io::{Folder, FolderRules, OpenMode, PosixEngine};

const PAGES: usize = 24;
const BYTES: usize = PAGES * PAGE_BYTES;

/// Does what posix does, and remembers what it was asked for.
#[derive(Debug)]
struct Recorder {
    posix: PosixEngine,
    asked: Mutex<Vec<(u64, usize)>>,
}

impl IoEngine for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }

    fn submit(&self, request: IoRequest) -> IoHandle {
        let asked = (request.offset, request.buffer.len());
        self.asked.lock().unwrap().push(asked);
        self.posix.submit(request)
    }
}

fn recorder() -> Arc<Recorder> {
    Arc::new(Recorder {
        posix: PosixEngine::new(2, Arc::new(|| ())).unwrap(),
        asked: Mutex::default(),
    })
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn content() -> Vec<u8> {
    (0..BYTES).map(|at| (at / 7 % 251) as u8).collect()
}

/// Makes a file of which the page cache has nothing but `pages`. `None`, said why, where the
/// directory for temporary files knows no O_DIRECT.
fn file_with_cached(folder: &Path, pages: &[bool]) -> Option<IoFile> {
    let path = folder.join("file");
    std::fs::write(&path, content()).unwrap();
    let file = File::open(&path).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    // One page at a time, nothing ahead.
    fadvise(&file, 0, None, Advice::Random).unwrap();
    for (page, _) in pages.iter().enumerate().filter(|(_, cached)| **cached) {
        let at = (page * PAGE_BYTES) as u64;
        file.read_exact_at(&mut [0; 1], at).unwrap();
    }
    let folder = Folder::open(folder, FolderRules::default()).unwrap();
    let opened = IoFile::open_in(&folder, "file", OpenMode::Read, true);
    let Some(opened) = opened
        .ok()
        .filter(|_| cached_pages(&path).as_deref() == Some(pages))
    else {
        eprintln!("skipped: no O_DIRECT, no cachestat(2), or pages that are not of 4 KiB");
        return None;
    };
    Some(opened)
}

/// Returns which pages of a file are in the page cache; `None` where the kernel does not tell.
fn cached_pages(path: &Path) -> Option<Vec<bool>> {
    let file = IoFile::open(path, OpenMode::Read, false).unwrap();
    let holds = |page| {
        let at = (page * PAGE_BYTES) as u64;
        Some(file.cached_bytes(at, PAGE_BYTES as u64).ok()? > 0)
    };
    (0..PAGES).map(holds).collect()
}

/// Gives a file the view that it would have after a look.
fn viewed(folder: &Path, file: IoFile) -> IoFile {
    let folder = Folder::open(folder, FolderRules::default()).unwrap();
    file.with_cached_view(&folder, "file")
}

/// Reads the whole file in parts of so many pages.
fn read(reads: &CachedReads, file: IoFile, parts: &[usize]) -> Result<Vec<u8>> {
    let pool = StagingPool::new(BYTES, BYTES).unwrap();
    let mut buffer = pool.take(soon()).unwrap();
    buffer.as_mut_slice().fill(0xEE);
    let (file, mut offset, mut requests) = (Arc::new(file), 0, Vec::new());
    let mut sizes = parts.iter().cycle();
    while !buffer.is_empty() {
        let part = buffer.split_to(sizes.next().unwrap() * PAGE_BYTES);
        let bytes = part.len() as u64;
        requests.push(IoRequest {
            operation: Operation::Read,
            file: Arc::clone(&file),
            offset,
            buffer: part,
        });
        offset += bytes;
    }
    let mut whole = Vec::new();
    for handle in reads.submit_all(requests) {
        whole.extend_from_slice(handle.wait(soon())?.as_slice());
    }
    Ok(whole)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_byte_comes_from_one_place_and_is_right(
        pages in prop::collection::vec(prop::bool::weighted(0.85), PAGES),
        parts in prop::collection::vec(1_usize..9, 1..6),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let Some(file) = file_with_cached(directory.path(), &pages) else { return Ok(()) };
        let engine = recorder();
        let reads = CachedReads::new(Arc::clone(&engine) as Arc<dyn IoEngine>);
        let folder = Folder::open(directory.path(), FolderRules::default()).unwrap();
        let file = reads.look_at(file, &folder, "file");
        prop_assert_eq!(file.cached_view().is_some(), pages.contains(&true));
        prop_assert_eq!(read(&reads, file, &parts).unwrap(), content());
        // The engine had the parts of which a page is missing, and no others.
        let (mut expected, mut page) = (Vec::new(), 0);
        for part in parts.iter().cycle() {
            let end = PAGES.min(page + part);
            if pages[page..end].contains(&false) {
                expected.push(((page * PAGE_BYTES) as u64, (end - page) * PAGE_BYTES));
            }
            page = end;
            if page == PAGES { break }
        }
        let asked = engine.asked.lock().unwrap().clone();
        let by_engine: usize = asked.iter().map(|(_, bytes)| bytes).sum();
        // Looking and direct reads leave the page cache as it was; if it is not, the system has
        // emptied it meanwhile, and more came from the engine.
        match cached_pages(&directory.path().join("file")) == Some(pages) {
            true => prop_assert_eq!(asked, expected),
            false => prop_assert!(asked.len() >= expected.len()),
        }
        prop_assert_eq!(by_engine + reads.bytes() as usize, BYTES);
    }

    #[test]
    fn what_goes_from_the_page_cache_meanwhile_comes_from_the_engine(
        pages in prop::collection::vec(prop::bool::weighted(0.85), PAGES),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let Some(file) = file_with_cached(directory.path(), &pages) else { return Ok(()) };
        let engine = recorder();
        let reads = CachedReads::new(Arc::clone(&engine) as Arc<dyn IoEngine>);
        let pool = StagingPool::new(BYTES, BYTES).unwrap();
        // As after a look that found all of it.
        let read = Box::new(CachedRead {
            request: IoRequest {
                operation: Operation::Read,
                file: Arc::new(viewed(directory.path(), file)),
                offset: 0,
                buffer: pool.take(soon()).unwrap(),
            },
            shared: Arc::clone(&reads.shared),
        });
        let back = read.wait(soon()).unwrap();
        prop_assert_eq!(back.as_slice(), content());
        let cached = pages.iter().take_while(|cached| **cached).count() * PAGE_BYTES;
        // Pages behind the first gap may have been read ahead before they were asked for.
        let copied = reads.bytes() as usize;
        let is_as_it_was = cached_pages(&directory.path().join("file"))
            .is_some_and(|now| now.iter().zip(&pages).all(|(now, before)| now >= before));
        prop_assert!(copied >= cached || !is_as_it_was, "{copied} of {cached}");
        prop_assert!(copied.is_multiple_of(PAGE_BYTES));
        let asked = engine.asked.lock().unwrap().clone();
        match copied == BYTES {
            true => prop_assert_eq!(asked, []),
            false => prop_assert_eq!(asked, [(copied as u64, BYTES - copied)]),
        }
    }
}

#[test]
fn a_file_that_ends_early_is_the_engines_to_judge() {
    let directory = tempfile::tempdir().unwrap();
    let Some(file) = file_with_cached(directory.path(), &[true; PAGES]) else {
        return;
    };
    let path = directory.path().join("file");
    let shorter = File::options().write(true).open(&path).unwrap();
    shorter.set_len((BYTES - 100) as u64).unwrap();
    let reads = CachedReads::new(recorder());
    let error = read(&reads, viewed(directory.path(), file), &[8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("expected"), "{error}");
}

#[test]
fn where_reads_cannot_be_asked_not_to_wait_that_is_remembered() {
    // Files of /proc know no such reads, as those of FUSE and NFS.
    let folder = Folder::open(Path::new("/proc/self"), FolderRules::default()).unwrap();
    let open = || IoFile::open_in(&folder, "limits", OpenMode::Read, false).unwrap();
    let engine = recorder();
    let reads = CachedReads::new(Arc::clone(&engine) as Arc<dyn IoEngine>);
    let is_off = || reads.shared.cache.is_unsupported.load(Ordering::Relaxed);
    let pool = StagingPool::new(PAGE_BYTES, PAGE_BYTES).unwrap();
    let mut request = IoRequest {
        operation: Operation::Read,
        file: Arc::new(open().with_cached_view(&folder, "limits")),
        offset: 0,
        buffer: pool.take(soon()).unwrap(),
    };
    assert!(request.file.cached_view().is_some());
    assert!(!is_off());
    assert_eq!(reads.shared.copy(&mut request), 0);
    assert!(is_off());
    // A file of which all is cached is not even looked at any more.
    let directory = tempfile::tempdir().unwrap();
    let Some(file) = file_with_cached(directory.path(), &[true; PAGES]) else {
        return;
    };
    let folder = Folder::open(directory.path(), FolderRules::default()).unwrap();
    let file = reads.look_at(file, &folder, "file");
    assert!(file.cached_view().is_none());
    assert_eq!(read(&reads, file, &[PAGES]).unwrap(), content());
    assert_eq!((engine.asked.lock().unwrap().len(), reads.bytes()), (1, 0));
}

#[test]
fn the_second_view_is_of_the_same_file_or_there_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let name = |name: &str| directory.path().join(name);
    std::fs::write(name("file"), "old").unwrap();
    std::fs::write(name("other"), "new").unwrap();
    let folder = Folder::open(directory.path(), FolderRules::default()).unwrap();
    let open = || IoFile::open_in(&folder, "file", OpenMode::Read, false).unwrap();
    assert!(
        open()
            .with_cached_view(&folder, "file")
            .cached_view()
            .is_some()
    );
    let opened = open();
    std::fs::rename(name("other"), name("file")).unwrap();
    assert!(
        opened
            .with_cached_view(&folder, "file")
            .cached_view()
            .is_none()
    );
    let opened = open();
    std::fs::remove_file(name("file")).unwrap();
    assert!(
        opened
            .with_cached_view(&folder, "file")
            .cached_view()
            .is_none()
    );
}

#[test]
fn with_another_engine_what_is_known_and_counted_stays() {
    let engine = || Arc::new(PosixEngine::new(1, Arc::new(|| ())).unwrap());
    let before = CachedReads::new(engine());
    before.shared.cache.bytes.store(7, Ordering::Relaxed);
    let after = before.with_engine(engine());
    before.shared.note(Errno::NOSYS);
    assert_eq!(after.bytes(), 7);
    assert!(after.shared.cache.is_unsupported.load(Ordering::Relaxed));
    assert!(!Arc::ptr_eq(&before.shared.engine, &after.shared.engine));
}
