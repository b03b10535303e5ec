//! One io_uring, with all that the requests in it own.
//!
//! The kernel reads and writes memory of ours between a submission and its completion, whatever
//! the caller does meanwhile. So buffer and file of each request lie in the ring's own table until
//! the completion was seen, and a ring that goes while the kernel still has requests leaves that
//! table, and itself, where they are: memory that is lost is better than memory that is reused.
#![expect(
    unsafe_code,
    reason = "hands addresses of staging memory to the kernel"
)]

use std::fmt;
use std::mem::{self, ManuallyDrop};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use rustix::io::Errno;

use super::counts::Counters;
use super::registration::Registration;
use crate::error::{Error, ErrorKind, Result};
use crate::io::posix::write_whole;
use crate::io::progress::{Progress, Step};
use crate::io::{IoRequest, Operation};
use crate::memory::StagingRange;

/// Requests in flight in one ring: 128 MiB in parts of 4 MiB keep any device busy.
pub(super) const REQUESTS_MAX: usize = 32;
/// Room for them and for a cancellation of each.
const ENTRIES: u32 = 2 * REQUESTS_MAX as u32;
/// Threads of the kernel for requests that cannot be done without waiting, for each thread of ours.
/// A mount that hangs holds one for each of its requests, and what is left must do for others.
const KERNEL_THREADS_MAX: u32 = 8 * REQUESTS_MAX as u32;
/// How often the kernel is asked again to end a request that hangs.
const CANCELLED_AGAIN: Duration = Duration::from_secs(1);
/// What a cancellation is called; no request has this number.
const CANCELLATION: u64 = u64::MAX;
/// The wait when the kernel takes no requests for the moment.
const PAUSE: Duration = Duration::from_millis(1);

/// A request that has ended, by the number its submitter gave it.
pub(super) type Ended = (usize, Result<StagingRange>);

/// A request that the kernel has, and what it owns.
#[derive(Debug)]
struct Flight {
    number: usize,
    request: IoRequest,
    progress: Progress,
    /// Whether a thread of the kernel does it from the start.
    is_handed_over: bool,
    is_cancelled: bool,
}

/// A ring and its requests. One thread at a time uses it.
pub(super) struct Ring {
    uring: ManuallyDrop<IoUring>,
    /// What is in flight, by the number that the kernel knows it by.
    flights: Vec<Option<Flight>>,
    in_flight: usize,
    /// When the kernel was asked last to end what is in flight.
    cancelled: Option<Instant>,
    registration: Option<Registration>,
    counters: Arc<Counters>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Ring")
            .field("in_flight", &self.in_flight)
            .field("registration", &self.registration)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// Makes a ring.
    ///
    /// # Errors
    /// The system's error; what it means is said by [`super::refusal`].
    pub(super) fn new(counters: Arc<Counters>) -> std::io::Result<Self> {
        // A child process must not see the ring: its memory is shared with the kernel.
        let uring = IoUring::builder().dontfork().build(ENTRIES)?;
        if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
            // Waits with an end, and completions that are never lost: Linux 5.11.
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        // Linux 5.15; before that the kernel's own bound holds, four for each CPU.
        let mut threads = [KERNEL_THREADS_MAX, 0];
        drop(uring.submitter().register_iowq_max_workers(&mut threads));
        Ok(Self {
            uring: ManuallyDrop::new(uring),
            flights: (0..REQUESTS_MAX).map(|_| None).collect(),
            in_flight: 0,
            cancelled: None,
            registration: None,
            counters,
        })
    }

    /// Returns the requests that the kernel has.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Returns whether one more can be started.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight < REQUESTS_MAX
    }

    /// Returns the arena whose memory the kernel has at hand.
    pub(super) fn registration(&self) -> Option<&Registration> {
        self.registration.as_ref()
    }

    /// Registers an arena, as the ring of `source` has it already or else anew.
    ///
    /// # Errors
    /// The system's error: most often the limit on locked memory.
    pub(super) fn register(
        &mut self,
        registration: Registration,
        source: Option<RawFd>,
    ) -> std::io::Result<()> {
        if self.registration.take().is_some() {
            self.uring.submitter().unregister_buffers()?;
        }
        let submitter = self.uring.submitter();
        let cloned = source.map(|source| submitter.register_buffers_clone(source));
        if !matches!(cloned, Some(Ok(()))) {
            let pieces = registration.pieces();
            // SAFETY: the pieces are parts of a live mapping, as the caller of `Registration::of`
            // sees to. The kernel keeps the pages themselves, so they stay valid for it when the
            // mapping goes, and the registration's number keeps us from using them then.
            unsafe { submitter.register_buffers(&pieces) }?;
        }
        self.registration = Some(registration);
        Ok(())
    }

    /// Puts a request into the ring; the kernel hears of it with the next wait or submission.
    ///
    /// # Errors
    /// The request, when there is no room for it.
    pub(super) fn start(&mut self, number: usize, request: IoRequest) -> Result<(), IoRequest> {
        let place = self.flights.iter().position(Option::is_none);
        let Some(place) = place.filter(|_| self.has_room()) else {
            return Err(request);
        };
        let progress = Progress::new(request.operation, request.offset, request.buffer.len());
        // Through the page cache a request may copy at once, on the thread that submits it, and
        // on many file systems it waits there; the others would wait behind it. Threads of the
        // kernel do them side by side.
        let is_handed_over = !request.file.is_prompt();
        let flight = Flight {
            number,
            request,
            progress,
            is_handed_over,
            is_cancelled: false,
        };
        self.in_flight += 1;
        self.push(place, flight).map_err(|flight| {
            self.in_flight -= 1;
            flight.request
        })
    }

    /// Queues what is left of a flight and keeps it at its place. Gives it back if there is no room.
    fn push(&mut self, place: usize, mut flight: Flight) -> Result<(), Flight> {
        let entry = self.entry(place, &mut flight);
        let Some(slot) = self.flights.get_mut(place) else {
            return Err(flight);
        };
        // SAFETY: the entry names memory and file of the flight, which lies in `flights` from the
        // next line on until its completion was seen; `drop` leaves it there for good if that
        // never comes. Nobody else holds the range, so nobody reads or writes it meanwhile.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        match pushed {
            Ok(()) => {
                *slot = Some(flight);
                Ok(())
            }
            Err(_full) => Err(flight),
        }
    }

    /// Describes what is left of a flight to the kernel.
    fn entry(&self, place: usize, flight: &mut Flight) -> Entry {
        let request = &mut flight.request;
        let done = flight.progress.done();
        let registered = self
            .registration
            .as_ref()
            .and_then(|registration| registration.index_of(&request.buffer));
        let rest = request.buffer.as_mut_slice().get_mut(done..);
        let rest = rest.unwrap_or_default();
        // At most 2 GiB: what is longer is continued like any other short transfer.
        let bytes = u32::try_from(rest.len()).unwrap_or(1 << 30);
        let address = rest.as_mut_ptr();
        let file = Fd(request.file.as_fd().as_raw_fd());
        let offset = flight.progress.rest_offset();
        let entry = match (request.operation, registered) {
            (Operation::Read, Some(index)) => opcode::ReadFixed::new(file, address, bytes, index)
                .offset(offset)
                .build(),
            (Operation::Read, None) => opcode::Read::new(file, address, bytes)
                .offset(offset)
                .build(),
            (Operation::Write, Some(index)) => opcode::WriteFixed::new(file, address, bytes, index)
                .offset(offset)
                .build(),
            (Operation::Write, None) => opcode::Write::new(file, address, bytes)
                .offset(offset)
                .build(),
        };
        let flags = match flight.is_handed_over {
            true => Flags::ASYNC,
            false => Flags::empty(),
        };
        entry.flags(flags).user_data(place as u64)
    }

    /// Tells the kernel of what was started, and does not wait.
    pub(super) fn submit(&mut self) -> Result<()> {
        match self.uring.submit() {
            Ok(_) => Ok(()),
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(broken(error)),
        }
    }

    /// Waits until a request ends, or until `deadline`, and adds all that have ended to `ended`.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the ring itself cannot be used any more.
    pub(super) fn wait(&mut self, deadline: Instant, ended: &mut Vec<Ended>) -> Result<()> {
        self.take_ended(ended);
        while ended.is_empty() && self.in_flight > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let limit = Timespec::from(left);
            let arguments = SubmitArgs::new().timespec(&limit);
            match self.uring.submitter().submit_with_args(1, &arguments) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(Errno::TIME.raw_os_error()) => {}
                // A signal; or no room for completions, which are taken below.
                Err(error) if is_passing(&error) => {
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        std::thread::sleep(PAUSE.min(left));
                    }
                }
                Err(error) => return Err(broken(error)),
            }
            self.take_ended(ended);
        }
        Ok(())
    }

    /// Takes the completions that are there. What moved a part only goes on.
    pub(super) fn take_ended(&mut self, ended: &mut Vec<Ended>) {
        let completions: Vec<(u64, i32)> = self
            .uring
            .completion()
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        let mut goes_on = false;
        for (place, result) in completions {
            if place == CANCELLATION {
                continue;
            }
            let taken = usize::try_from(place)
                .ok()
                .and_then(|place| Some((place, self.flights.get_mut(place)?.take()?)));
            let Some((place, flight)) = taken else {
                continue;
            };
            match self.settle(place, flight, result) {
                Some(end) => {
                    self.in_flight -= 1;
                    ended.push(end);
                }
                None => goes_on = true,
            }
        }
        if goes_on {
            // What is not submitted now is so by the next wait.
            drop(self.uring.submit());
        }
    }

    /// Takes note of a completion: the request's end, or `None` when it goes on.
    fn settle(&mut self, place: usize, mut flight: Flight, result: i32) -> Option<Ended> {
        let number = flight.number;
        let moved =
            usize::try_from(result).map_err(|_| Errno::from_raw_os_error(result.saturating_neg()));
        // The file system cannot do it without waiting, and the kernel did not wait in our place.
        let again = moved == Err(Errno::AGAIN) && !flight.is_handed_over;
        let is_write = flight.request.operation == Operation::Write;
        let step = match moved {
            Err(Errno::AGAIN) if again => {
                flight.is_handed_over = true;
                self.counters.handed_over.fetch_add(1, Ordering::Relaxed);
                Step::More
            }
            // What a thread of the kernel says of a write that moved a part only; of how much, it
            // says nothing (Linux 6.18).
            Err(Errno::AGAIN) if is_write && !flight.is_cancelled => self.write_here(&mut flight),
            // Not by us: the thread that handed it over has ended, and the kernel ends with it what
            // it had not begun. This thread, which waits for it, hands it over again.
            Err(Errno::CANCELED) if !flight.is_cancelled => Step::More,
            moved => flight.progress.advance(moved, &flight.request.file),
        };
        let error = match step {
            Step::Done => return Some((number, Ok(flight.request.buffer))),
            Step::Failed(error) => error,
            Step::More if flight.is_cancelled => {
                let error = Error::new(ErrorKind::Closed, "the request was given up");
                error.with_path(flight.request.file.path())
            }
            Step::More => {
                if !again {
                    self.counters.continued.fetch_add(1, Ordering::Relaxed);
                }
                match self.push(place, flight) {
                    Ok(()) => return None,
                    Err(flight) => Error::new(ErrorKind::Io, "the ring has no room")
                        .with_path(flight.request.file.path()),
                }
            }
        };
        Some((number, Err(error)))
    }

    /// Writes what is left of a flight on this thread, which is no worse off than one of posix.
    fn write_here(&self, flight: &mut Flight) -> Step {
        self.counters.continued.fetch_add(1, Ordering::Relaxed);
        let (offset, done) = (flight.progress.rest_offset(), flight.progress.done());
        let request = &flight.request;
        let rest = request.buffer.as_slice().get(done..).unwrap_or_default();
        match write_whole(&request.file, offset, rest) {
            Ok(()) => Step::Done,
            Err(error) => Step::Failed(error),
        }
    }

    /// Asks the kernel to end everything in flight; what it is at already goes on.
    pub(super) fn cancel(&mut self) {
        self.cancelled = Some(Instant::now());
        for place in 0..self.flights.len() {
            let Some(flight) = self.flights.get_mut(place).and_then(Option::as_mut) else {
                continue;
            };
            let is_first = !std::mem::replace(&mut flight.is_cancelled, true);
            let entry = opcode::AsyncCancel::new(place as u64).build();
            let entry = entry.user_data(CANCELLATION);
            // SAFETY: a cancellation names a number and no memory.
            let pushed = unsafe { self.uring.submission().push(&entry) };
            if pushed.is_ok() && is_first {
                self.counters.cancelled.fetch_add(1, Ordering::Relaxed);
            }
        }
        // What the kernel does not take now it takes with the next wait.
        drop(self.uring.submit());
    }

    /// Asks the kernel now and then once more to end what is in flight: it does not find what a thread
    /// of its own is just taking up.
    pub(super) fn cancel_again(&mut self) {
        let is_due = self
            .cancelled
            .is_none_or(|at| at.elapsed() > CANCELLED_AGAIN);
        if self.in_flight > 0 && is_due {
            self.cancel();
        }
    }

    /// Returns what other rings may copy this one's registration from.
    pub(super) fn source(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Nothing is begun any more for what is found to have ended.
        let flights = self.flights.iter_mut().flatten();
        flights.for_each(|flight| flight.is_cancelled = true);
        let mut ended = Vec::new();
        self.take_ended(&mut ended);
        if self.in_flight > 0 {
            mem::forget(mem::take(&mut self.flights));
            let lost = self.in_flight as u64;
            self.counters.leaked.fetch_add(lost, Ordering::Relaxed);
            return;
        }
        // SAFETY: this is the only place that drops it, and nothing uses it afterwards.
        unsafe { ManuallyDrop::drop(&mut self.uring) };
    }
}

/// Returns whether the kernel may take the requests a moment later: a signal, no memory for
/// requests, no room for completions.
fn is_passing(error: &std::io::Error) -> bool {
    let passing = [Errno::INTR, Errno::AGAIN, Errno::BUSY].map(|errno| Some(errno.raw_os_error()));
    passing.contains(&error.raw_os_error())
}

fn broken(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, "the ring cannot be used").with_source(error)
}
