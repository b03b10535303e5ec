//! `kvrail bench --prompts`: a store under requests as a serving engine makes them.
//!
//! Prompts share prefixes, as [`Workload`] says. Each is looked up, what is there of it is loaded,
//! the rest is stored, by as many clients at the same time as there may be requests in flight.
//! Nothing is computed in between, so that the store is what is waited for.
//!
//! - [`server`] answers with kvrail, [`bare`] with bare system calls
//! - [`report`] works the figures out
//!
//! In each round all sides answer the same prompts, one after the other, and which goes first
//! changes. The store grows from round to round; the first round is not counted.

mod bare;
mod report;
mod server;

use std::collections::HashSet;
use std::path::PathBuf;

pub(crate) use self::report::{PromptsReport, write};

use self::bare::Bare;
use self::server::{Answers, Server};
use super::clients::Sample;
use super::plan::Plan;
use super::run::{each, sync_file_system};
use super::sides::{Side, in_turn};
use crate::failure::Failure;
use crate::output::progress_bar;
use crate::workload::{Request, Trace, Workload};

/// What the prompts are made from: each run has the same ones.
const SEED: u64 = 1;

/// Which prompts to answer.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub(crate) workload: Workload,
    /// Prompts of a round.
    pub(crate) requests: usize,
    /// `max_size` of each path of the store.
    pub(crate) max_size: Option<u64>,
}

impl Wish {
    /// Returns the prompts of all rounds, the one that is not counted first.
    fn requests(&self, plan: &Plan) -> Vec<Request> {
        let count = self.requests * (plan.rounds + 1);
        Trace::new(self.workload, SEED).take(count).collect()
    }

    /// Returns how many chunk files there are in the end, at most, of all sides on `paths` paths.
    pub(crate) fn files_at_most(&self, plan: &Plan, paths: usize) -> u64 {
        let requests = self.requests(plan);
        let chunks = requests.iter().flat_map(|request| &request.chunks);
        let distinct = chunks.collect::<HashSet<_>>().len() as u64;
        let stores = plan.engines.len() as u64;
        match self.max_size {
            Some(bytes) => {
                let fitting = bytes * paths as u64 / plan.geometry.payload_bytes().max(1) as u64;
                stores * distinct.min(fitting + 1)
            }
            None => (stores + 1) * distinct,
        }
    }
}

/// What the sides did in one round.
#[derive(Debug, Default)]
struct Round {
    /// Of each engine.
    answers: Vec<Answers>,
    /// `None` where chunks are evicted: the bare side knows nothing like it.
    bare: Option<Sample>,
}

/// Measures one geometry below `directories`, one on each path: a report for each engine.
pub(crate) fn measure(
    plan: &Plan,
    wish: &Wish,
    directories: &[PathBuf],
) -> Result<Vec<PromptsReport>, Failure> {
    let engines = plan.engines.iter().enumerate();
    let servers = engines
        .map(|(index, engine)| {
            let paths = each(directories, &format!("store-{index}"));
            Server::open(plan, wish, *engine, &paths)
        })
        .collect::<Result<Vec<_>, Failure>>()?;
    let file_bytes = servers.first().map_or(0, Server::file_bytes);
    let mut bare = match wish.max_size {
        None => Some(Bare::new(plan, each(directories, "raw"), file_bytes)?),
        Some(_) => None,
    };
    let mut sides: Vec<Side> = (0..servers.len()).map(Side::Kvrail).collect();
    sides.extend(bare.as_ref().map(|_| Side::Raw));
    let requests = wish.requests(plan);
    let bar = progress_bar(
        (requests.len() * sides.len()) as u64,
        "{msg} [{bar:40}] {pos}/{len} prompts, {per_sec}, {eta} left",
    );
    bar.set_message(plan.geometry.name);
    let mut rounds = Vec::new();
    for (number, requests) in requests.chunks(wish.requests).enumerate() {
        let mut round = Round::default();
        round.answers.resize_with(servers.len(), Answers::default);
        for side in in_turn(&sides, number) {
            match (side, &mut bare) {
                (Side::Kvrail(index), _) => {
                    let (server, place) = servers
                        .get(index)
                        .zip(round.answers.get_mut(index))
                        .ok_or_else(|| Failure::new(format!("there is no engine {index}")))?;
                    *place = server.answer(requests, &bar)?;
                }
                (_, Some(bare)) => round.bare = Some(bare.answer(requests, &bar)?),
                (_, None) => {}
            }
            directories
                .iter()
                .try_for_each(|directory| sync_file_system(directory))?;
        }
        if number > 0 {
            rounds.push(round);
        }
    }
    bar.finish_and_clear();
    let closed = servers.iter().map(Server::close);
    let closed = closed.collect::<Result<Vec<_>, _>>()?;
    Ok(PromptsReport::all(plan, wish, &rounds, &closed))
}
