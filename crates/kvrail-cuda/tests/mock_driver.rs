//! The driver's objects, on a mock of libcuda: copies, kernels, limits, errors, balance.
#![expect(
    unsafe_code,
    reason = "hands addresses of the test's memory to the driver"
)]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::time::{Duration, Instant};

use kvrail_cuda::{Context, CopyDescriptor, Cuda, ErrorKind, HashDescriptor, Kernels, Priority};
use mock_support::Mocks;
use twox_hash::XxHash3_64;

fn start() -> (Mocks, Cuda) {
    let mocks = Mocks::load();
    let cuda = Cuda::load(&[mocks.cuda().to_path_buf()]).unwrap();
    (mocks, cuda)
}

/// Sends bytes to new device memory and returns it.
fn send(context: &Context, bytes: &[u8]) -> kvrail_cuda::DeviceMemory {
    let memory = context.allocate(bytes.len()).unwrap();
    let stream = context.stream(Priority::Low).unwrap();
    // SAFETY: both ranges are as long and stay until the stream was waited for.
    unsafe { stream.copy_to_device(memory.address(), bytes.as_ptr(), bytes.len()) }.unwrap();
    stream.synchronize().unwrap();
    memory
}

fn fetch(context: &Context, address: u64, bytes: usize) -> Vec<u8> {
    let mut target = vec![0; bytes];
    let stream = context.stream(Priority::High).unwrap();
    // SAFETY: as in `send`.
    unsafe { stream.copy_to_host(target.as_mut_ptr(), address, bytes) }.unwrap();
    let event = context.event().unwrap();
    stream.record(&event).unwrap();
    assert!(
        event
            .wait(Instant::now() + Duration::from_secs(20))
            .unwrap()
    );
    target
}

#[test]
fn memory_begins_at_a_page_where_that_is_asked_for() {
    let (mocks, cuda) = start();
    let context = cuda.retain_primary(0).unwrap();
    for bytes in [64, 70_000, 3 << 20] {
        let memory = context.allocate_at_page(bytes).unwrap();
        assert_eq!(memory.address() % (64 << 10), 0, "{bytes}");
        assert_eq!(memory.bytes(), bytes);
        // All of it is there.
        mocks.translate(memory.address(), bytes);
    }
    let small = context.allocate(64).unwrap();
    assert_ne!(
        small.address() % 4096,
        0,
        "as the driver gives small memory"
    );
    drop(small);
    mocks.script_cuda("cuMemAlloc nth=2 error=2");
    let error = context.allocate_at_page(64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
}

#[test]
fn bytes_go_there_and_back_and_everything_is_given_back() {
    let (mocks, cuda) = start();
    assert_eq!((cuda.device_count(), cuda.driver_version()), (2, (12, 8)));
    let device = cuda.device(1).unwrap();
    assert_eq!(
        (device.name.as_str(), device.compute_capability),
        ("Mock GPU", (9, 0))
    );
    assert_eq!(cuda.device(2).unwrap_err().kind(), ErrorKind::NoDevice);
    let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    std::thread::scope(|scope| {
        for ordinal in 0..2 {
            let (cuda, bytes) = (&cuda, &bytes);
            // Threads on which nobody made a context current.
            scope.spawn(move || {
                let context = cuda.retain_primary(ordinal).unwrap();
                let memory = send(&context, bytes);
                assert_eq!(fetch(&context, memory.address(), bytes.len()), *bytes);
                let copy = context.allocate(bytes.len()).unwrap();
                let stream = context.stream(Priority::Low).unwrap();
                let half = bytes.len() / 2;
                let targets = [copy.address() + half as u64, copy.address()];
                let sources = [memory.address(), memory.address() + half as u64];
                // SAFETY: the pieces lie in both allocations.
                unsafe { stream.copy_batch(&targets, &sources, &[half, half]) }.unwrap();
                stream.synchronize().unwrap();
                let found = fetch(&context, copy.address(), bytes.len());
                assert_eq!(found[..half], bytes[half..]);
                assert_eq!(found[half..], bytes[..half]);
            });
        }
    });
    assert_eq!(mocks.balance().0, 0);
}

#[test]
fn kernels_copy_and_hash() {
    let (mocks, cuda) = start();
    let context = cuda.retain_primary(0).unwrap();
    let kernels = Kernels::load(&context).unwrap();
    let bytes: Vec<u8> = (0..3 * 4096_u32).map(|i| (i * 13 % 255) as u8).collect();
    let (source, target) = (
        send(&context, &bytes),
        context.allocate(bytes.len()).unwrap(),
    );
    let copy = CopyDescriptor {
        source: source.address(),
        target: target.address() + 4096,
        bytes: 8192,
    };
    let hash = HashDescriptor {
        source: source.address(),
        first_page: 1,
        pages: 3,
    };
    let words = [
        copy.source,
        copy.target,
        copy.bytes,
        hash.source,
        hash.first_page,
        hash.pages,
    ];
    let descriptors = send(&context, &words.map(u64::to_ne_bytes).concat());
    let hashes = context.allocate(4 * 8).unwrap();
    let stream = context.stream(Priority::Low).unwrap();
    // SAFETY: descriptors and what they name lie in the allocations above.
    unsafe { kernels.copy(&stream, descriptors.address(), 1) }.unwrap();
    // SAFETY: as above.
    unsafe { kernels.hash_pages(&stream, descriptors.address() + 24, 1, 3, hashes.address()) }
        .unwrap();
    stream.synchronize().unwrap();
    assert_eq!(
        fetch(&context, target.address() + 4096, 8192),
        bytes[..8192]
    );
    let found = fetch(&context, hashes.address() + 8, 24);
    let expected: Vec<u8> = bytes
        .chunks(4096)
        .flat_map(|page| XxHash3_64::oneshot(page).to_le_bytes())
        .collect();
    assert_eq!(found, expected);
    // A context lives as long as anything made from it.
    drop(context);
    drop((stream, hashes, descriptors, source, target));
    drop(kernels);
    assert_eq!(mocks.balance().0, 0);
}

#[test]
fn errors_are_values_with_function_and_number() {
    let (mocks, cuda) = start();
    let context = cuda.retain_primary(0).unwrap();
    let error = context.allocate(2 << 30).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert_eq!(
        error.to_string(),
        "cuMemAlloc: asked for 2147483648 bytes, 1073741824 are free"
    );
    mocks.script_cuda("cuModuleLoadData error=222\ncuStreamCreateWithPriority nth=2 error=999");
    let error = Kernels::load(&context).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(
        error.to_string(),
        "cuModuleLoadData: 222, the PTX is newer than this driver"
    );
    let stream = context.stream(Priority::Low).unwrap();
    assert_eq!(context.stream(Priority::Low).unwrap_err().code(), Some(999));
    let memory = context.allocate(64).unwrap();
    let mut target = [0; 65];
    // SAFETY: refused: the range is longer than the allocation.
    unsafe { stream.copy_to_host(target.as_mut_ptr(), memory.address(), 65) }.unwrap();
    // As on a GPU, whoever waits learns of it.
    assert_eq!(stream.synchronize().unwrap_err().code(), Some(700));
    let mut pinned = vec![0_u8; 8192];
    let start = pinned.as_mut_ptr().expose_provenance();
    // SAFETY: the memory outlives the pin.
    let pin = unsafe { context.pin(start, 8192) }.unwrap();
    // SAFETY: as above.
    let again = unsafe { context.pin(start, 8192) };
    assert_eq!(again.unwrap_err().code(), Some(712));
    drop((pin, stream, memory, context));
    assert_eq!(mocks.balance().0, 0);
}

#[test]
fn streams_run_when_they_are_waited_for_and_in_the_order_of_events() {
    let (mocks, cuda) = start();
    let context = cuda.retain_primary(0).unwrap();
    let memory = context.allocate(16).unwrap();
    let (first, second) = (
        context.stream(Priority::Low).unwrap(),
        context.stream(Priority::High).unwrap(),
    );
    let (source, mut target) = ([7_u8; 16], [0_u8; 16]);
    // SAFETY: all ends stay until the stream was waited for.
    unsafe { first.copy_to_device(memory.address(), source.as_ptr(), 16) }.unwrap();
    let event = context.event().unwrap();
    first.record(&event).unwrap();
    second.wait_for(&event).unwrap();
    // SAFETY: as above.
    unsafe { second.copy_to_host(target.as_mut_ptr(), memory.address(), 16) }.unwrap();
    assert_eq!(target, [0; 16], "nobody waited yet");
    second.synchronize().unwrap();
    assert_eq!(target, source, "the second stream waited for the first");
    let (start, end) = (
        context.timed_event().unwrap(),
        context.timed_event().unwrap(),
    );
    for timed in [&start, &end] {
        second.record(timed).unwrap();
    }
    second.synchronize().unwrap();
    assert!(end.milliseconds_since(&start).unwrap() >= 0.0);
    assert!(end.milliseconds_since(&event).is_err(), "it only orders");
    drop((start, end));
    drop((event, first, second, memory, context));
    assert_eq!(mocks.balance().0, 0);
}

#[test]
fn calls_are_not_refused_while_another_thread_captures_a_graph() {
    type Push = extern "C" fn(usize) -> i32;
    type Allocate = unsafe extern "C" fn(*mut u64, usize) -> i32;
    type Exchange = unsafe extern "C" fn(*mut u32) -> i32;
    let (mocks, cuda) = start();
    let context = cuda.retain_primary(0).unwrap();
    // SAFETY: the mock is loaded already and has no initialisers.
    let library = unsafe { libloading::Library::new(mocks.cuda()) }.unwrap();
    // SAFETY: the types are those of cuda.h.
    let push = unsafe { library.get::<Push>(b"cuCtxPushCurrent_v2") }.unwrap();
    // SAFETY: as above.
    let allocate = unsafe { library.get::<Allocate>(b"cuMemAlloc_v2") }.unwrap();
    // SAFETY: as above.
    let exchange =
        unsafe { library.get::<Exchange>(b"cuThreadExchangeStreamCaptureMode") }.unwrap();
    mocks.capturing(true);
    let (mut address, mut mode) = (0, 0);
    assert_eq!(push(1), 0);
    // SAFETY: the pointer is to a live integer.
    let refused = unsafe { allocate(&raw mut address, 64) };
    assert_eq!(refused, 900, "the mock refuses nothing");
    let memory = send(&context, &[7; 64]);
    assert_eq!(fetch(&context, memory.address(), 64), [7; 64]);
    // SAFETY: as above.
    assert_eq!(unsafe { exchange(&raw mut mode) }, 0);
    assert_eq!(mode, 0, "the thread has its own mode again");
    mocks.capturing(false);
}
