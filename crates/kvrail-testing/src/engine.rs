//! An I/O engine that fails as a script says.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kvrail::Error;
use kvrail::io::{
    Completion, IoCounts, IoEngine, IoHandle, IoRequest, Operation, PosixEngine, UringEngine,
};
use kvrail::memory::StagingPool;

use crate::rules::{Effect, Fault, Rules};

/// How often a request that hangs looks whether it still has to.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Passes requests on to another engine, except for what its rules say of `read` and `write`.
///
/// Patterns are about whole paths. A request that is delayed or hangs waits on a thread of its
/// own, and keeps its memory meanwhile, as one in a kernel does.
#[derive(Clone)]
pub struct FaultEngine {
    inner: Arc<dyn IoEngine>,
    rules: Arc<Mutex<Rules>>,
}

impl fmt::Debug for FaultEngine {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_tuple("FaultEngine").field(&self.inner).finish()
    }
}

impl FaultEngine {
    /// Wraps a posix engine of four threads.
    ///
    /// # Panics
    /// When the threads cannot be started.
    pub fn new(seed: u64) -> Arc<Self> {
        Self::over(
            Arc::new(PosixEngine::new(4, Arc::new(|| ())).unwrap()),
            seed,
        )
    }

    /// Wraps a uring engine of four rings.
    ///
    /// # Panics
    /// Where there can be none.
    pub fn over_uring(seed: u64) -> Arc<Self> {
        Self::over(
            Arc::new(UringEngine::new(4, Arc::new(|| ())).unwrap()),
            seed,
        )
    }

    /// Wraps any engine.
    pub fn over(inner: Arc<dyn IoEngine>, seed: u64) -> Arc<Self> {
        let rules = Arc::new(Mutex::new(Rules::new(seed)));
        Arc::new(Self { inner, rules })
    }

    /// Puts a script in force, and lets go the requests that hang by a rule that is gone.
    ///
    /// # Panics
    /// For a script that is not understood.
    pub fn set(&self, script: &str) {
        self.with_rules(|rules| rules.set(script)).unwrap();
    }

    /// Returns how many requests were hit by a rule so far.
    pub fn hits(&self) -> u64 {
        self.with_rules(|rules| rules.hits())
    }

    fn with_rules<T>(&self, work: impl FnOnce(&mut Rules) -> T) -> T {
        work(&mut self.rules.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Does what is left of a request when its time has passed.
    fn perform(&self, mut request: IoRequest, fault: &Fault, completion: Completion) {
        let failed = |request: &IoRequest, number| {
            let source = std::io::Error::from_raw_os_error(number);
            Err(Error::io("injected", request.file.path(), source))
        };
        match fault.effect {
            Some(Effect::Error(number)) => completion.complete(failed(&request, number)),
            Some(Effect::Lie) => completion.complete(Ok(request.buffer)),
            Some(Effect::Short) => {
                // Half of it is done and the rest is not said to be missing: the worst engine.
                let mut rest = request.buffer;
                let half = rest.split_to(rest.len() / 2);
                request.buffer = half;
                let done = self.inner.submit(request).wait(far());
                completion.complete(done.map(|mut half| {
                    drop(half.rejoin(rest));
                    half
                }));
            }
            Some(Effect::Damage(damage)) if request.operation == Operation::Write => {
                damage.apply(request.buffer.as_mut_slice(), fault.choice);
                completion.complete(self.inner.submit(request).wait(far()));
            }
            Some(Effect::Damage(damage)) => {
                completion.complete(self.inner.submit(request).wait(far()).map(|mut buffer| {
                    damage.apply(buffer.as_mut_slice(), fault.choice);
                    buffer
                }));
            }
            _ => completion.complete(self.inner.submit(request).wait(far())),
        }
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

impl FaultEngine {
    /// Returns what the rules say of a request, `None` for nothing.
    fn decide(&self, request: &IoRequest) -> Option<Planned> {
        let operation = match request.operation {
            Operation::Read => "read",
            Operation::Write => "write",
        };
        let path = request.file.path().to_string_lossy().into_owned();
        let fault = self.with_rules(|rules| rules.decide(operation, &path));
        (fault != Fault::default()).then_some(Planned {
            operation,
            path,
            fault,
        })
    }

    /// Starts a request that a rule is about, on a thread of its own.
    fn submit_faulty(&self, request: IoRequest, planned: Planned) -> IoHandle {
        let (completion, handle) = IoHandle::pair();
        let engine = self.clone();
        thread::spawn(move || {
            let Planned {
                operation,
                path,
                fault,
            } = planned;
            thread::sleep(fault.delay);
            while fault.hang && engine.with_rules(|rules| rules.still_hangs(operation, &path)) {
                thread::sleep(LOOK_AGAIN);
            }
            engine.perform(request, &fault, completion);
        });
        handle
    }
}

/// What a rule does to a request.
struct Planned {
    operation: &'static str,
    path: String,
    fault: Fault,
}

impl IoEngine for FaultEngine {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn submit(&self, request: IoRequest) -> IoHandle {
        match self.decide(&request) {
            None => self.inner.submit(request),
            Some(planned) => self.submit_faulty(request, planned),
        }
    }

    fn submit_all(&self, requests: Vec<IoRequest>) -> Vec<IoHandle> {
        let mut clean = Vec::new();
        // In the order of the requests; `None` for one that is among the clean ones.
        let mut handles: Vec<Option<IoHandle>> = Vec::new();
        for request in requests {
            match self.decide(&request) {
                None => {
                    clean.push(request);
                    handles.push(None);
                }
                Some(planned) => handles.push(Some(self.submit_faulty(request, planned))),
            }
        }
        let mut clean = self.inner.submit_all(clean).into_iter();
        let handles = handles.into_iter();
        handles
            .map(|handle| handle.or_else(|| clean.next()).unwrap())
            .collect()
    }

    fn request_bytes(&self, operation: Operation) -> usize {
        self.inner.request_bytes(operation)
    }

    fn prepare(&self, pool: &StagingPool) -> Result<(), String> {
        self.inner.prepare(pool)
    }

    fn counts(&self) -> IoCounts {
        self.inner.counts()
    }
}
