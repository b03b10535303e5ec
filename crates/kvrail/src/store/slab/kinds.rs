//! The kinds of objects, and the store of each.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::object::Slab;
use crate::config::StoreConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::store::notice::{Notices, Topic};
use crate::store::{KvCache, Namespace, OpenOptions, Store};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Kinds at most: each has threads and staging memory of its own once it is used. A model has one
/// for each of its layouts of KV cache, which are three at most in the models that are served.
const KINDS_MAX: usize = 64;
/// Groups and ranks of a kind at most.
const CACHES_MAX: usize = 4096;
/// How long a kind whose store could not be opened is left alone. A mount that does not answer would
/// cost every task the whole wait limit.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// The slab as the KV cache of each group and rank.
type Caches = HashMap<(u32, u32), KvCache>;

/// What a kind of objects is known by in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KindId(usize);

/// All kinds.
#[derive(Debug)]
pub(super) struct Kinds {
    config: StoreConfig,
    options: OpenOptions,
    slab: Slab,
    notices: Arc<Notices>,
    table: Mutex<Vec<Arc<Kind>>>,
    /// The stores that are open, for whoever must not wait while another one is being opened.
    opened: Mutex<Vec<Store>>,
}

/// Objects of one length whose bytes are interchangeable when their names are equal.
#[derive(Debug)]
pub(super) struct Kind {
    namespace: Namespace,
    /// Bytes of an object.
    pub(super) bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Unopened,
    Open(Store, Caches),
    /// It could not be opened.
    Failed(Instant, ErrorKind, String),
    Closed,
}

impl KindId {
    /// Takes the number of a kind, for callers that keep it as one. A number that was never given
    /// out is no kind: its objects are missed.
    pub fn from_number(number: usize) -> Self {
        Self(number)
    }

    /// Returns the number of the kind.
    pub fn number(self) -> usize {
        self.0
    }
}

impl Kinds {
    pub(super) fn new(
        config: StoreConfig,
        options: OpenOptions,
        slab: Slab,
        notices: Arc<Notices>,
    ) -> Self {
        Self {
            config,
            options,
            slab,
            notices,
            table: Mutex::default(),
            opened: Mutex::default(),
        }
    }

    /// Returns the kind of `namespace` and `bytes`, and takes note of it. Opens nothing.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a length that the slab cannot hold, or one kind too many.
    pub(super) fn find(&self, namespace: Namespace, bytes: usize) -> Result<KindId> {
        self.slab.layout(bytes)?;
        let mut table = self.lock();
        let is_it = |kind: &Arc<Kind>| kind.bytes == bytes && kind.namespace == namespace;
        if let Some(index) = table.iter().position(is_it) {
            return Ok(KindId(index));
        }
        if table.len() >= KINDS_MAX {
            let message = format!("more than {KINDS_MAX} kinds of objects");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        table.push(Arc::new(Kind {
            namespace,
            bytes,
            state: Mutex::new(State::Unopened),
        }));
        Ok(KindId(table.len() - 1))
    }

    /// Returns a kind.
    pub(super) fn get(&self, id: KindId) -> Option<Arc<Kind>> {
        self.lock().get(id.0).cloned()
    }

    /// Returns the slab.
    pub(super) fn slab(&self) -> &Slab {
        &self.slab
    }

    /// Returns the store of a kind, opened now if it was not. Takes the wait limit at most.
    ///
    /// # Errors
    /// Those of [`Store::open`], also for a while after one; [`ErrorKind::Closed`].
    pub(super) fn store(&self, kind: &Kind) -> Result<Store> {
        let mut state = kind.lock();
        self.open(kind, &mut state).map(|(store, _)| store.clone())
    }

    /// Returns the slab as the KV cache of a group and rank of a kind.
    ///
    /// # Errors
    /// As [`Kinds::store`], and those of [`Store::attach`].
    pub(super) fn cache(&self, kind: &Kind, group: u32, rank: u32) -> Result<KvCache> {
        let mut state = kind.lock();
        let (store, caches) = self.open(kind, &mut state)?;
        if let Some(cache) = caches.get(&(group, rank)) {
            return Ok(cache.clone());
        }
        if caches.len() >= CACHES_MAX {
            let message = format!("more than {CACHES_MAX} groups and ranks of a kind of objects");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let (layout, blocks) = self.slab.layout(kind.bytes)?;
        let regions = vec![self.slab.region.clone()];
        let cache = store.attach(group, rank, layout, regions, blocks)?;
        caches.insert((group, rank), cache.clone());
        Ok(cache)
    }

    fn open<'a>(&self, kind: &Kind, state: &'a mut State) -> Result<(&'a Store, &'a mut Caches)> {
        let retry = match state {
            State::Unopened => true,
            State::Failed(at, ..) => at.elapsed() >= RETRY_AFTER,
            State::Open(..) | State::Closed => false,
        };
        if retry {
            let namespace = kind.namespace.clone();
            *state = match Store::open(&self.config, namespace, self.options.clone()) {
                Ok(store) => {
                    self.lock_opened().push(store.clone());
                    State::Open(store, Caches::new())
                }
                Err(error) => {
                    let message = error.to_string();
                    self.notices.warn(Topic::Start, || {
                        let seconds = RETRY_AFTER.as_secs();
                        format!("nothing is stored or loaded for {seconds} s: {message}")
                    });
                    State::Failed(Instant::now(), error.kind(), message)
                }
            };
        }
        match state {
            State::Open(store, caches) => Ok((store, caches)),
            State::Failed(_, kind, message) => Err(Error::new(*kind, message.clone())),
            State::Unopened | State::Closed => {
                Err(Error::new(ErrorKind::Closed, "the store was closed"))
            }
        }
    }

    /// Returns the stores that are open. Never waits for one that is being opened.
    pub(super) fn open_stores(&self) -> Vec<Store> {
        self.lock_opened().clone()
    }

    /// Closes all stores and opens none any more. One that is being opened is waited for, which ends
    /// within the wait limit.
    ///
    /// # Errors
    /// The first of [`Store::close`].
    pub(super) fn close(&self, deadline: Instant) -> Result<()> {
        let kinds = self.lock().clone();
        self.lock_opened().clear();
        let mut closed = Ok(());
        for kind in kinds {
            let state = std::mem::replace(&mut *kind.lock(), State::Closed);
            if let State::Open(store, _) = state {
                let left = deadline.saturating_duration_since(Instant::now());
                closed = closed.and(store.close(left));
            }
        }
        closed
    }

    fn lock_opened(&self) -> MutexGuard<'_, Vec<Store>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Kind>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kind {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
