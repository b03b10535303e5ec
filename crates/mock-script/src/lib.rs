//! Which calls of a mock library fail, and how: lines of `FUNCTION [nth=N] [every=N] ACTION`.
//!
//! `nth=N` is the Nth call from the moment the script was set, `every=N` each Nth, and without
//! either it is every call. Actions: `error=CODE`, `short=BYTES`, `hang`, `delay_ms=N`, `flip`
//! (one bit of what is transferred).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It returns this code and does nothing.
    Error(i32),
    /// It transfers so many bytes only.
    Short(usize),
    /// It never returns.
    Hang,
    /// It takes so much longer.
    Delay(Duration),
    /// One bit of what it transfers is flipped.
    Flip,
}

#[derive(Debug)]
struct Rule {
    function: String,
    nth: Option<u64>,
    every: u64,
    action: Action,
    seen: u64,
}

#[derive(Debug)]
struct State {
    rules: Vec<Rule>,
    calls: Option<HashMap<String, u64>>,
}

/// A script in force, and the calls counted so far.
#[derive(Debug)]
pub struct Script {
    state: Mutex<State>,
}

impl Default for Script {
    fn default() -> Self {
        Self::new()
    }
}

impl Script {
    /// Makes an empty script.
    pub const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                rules: Vec::new(),
                calls: None,
            }),
        }
    }

    /// Replaces the script.
    ///
    /// # Errors
    /// The first line that is not understood; the old script stays in force.
    pub fn set(&self, text: &str) -> Result<(), String> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let rules = lines.map(parse).collect::<Result<Vec<_>, _>>()?;
        self.lock().rules = rules;
        Ok(())
    }

    /// Counts a call and returns what shall happen to it. Delays and hangs happen here.
    pub fn enter(&self, function: &str) -> Option<Action> {
        let action = self.next(function);
        match action {
            Some(Action::Hang) => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            Some(Action::Delay(time)) => {
                std::thread::sleep(time);
                None
            }
            action => action,
        }
    }

    /// Returns how often a function was called.
    pub fn calls(&self, function: &str) -> u64 {
        let state = self.lock();
        let calls = state.calls.as_ref().and_then(|calls| calls.get(function));
        calls.copied().unwrap_or(0)
    }

    fn next(&self, function: &str) -> Option<Action> {
        let mut state = self.lock();
        *state
            .calls
            .get_or_insert_default()
            .entry(function.to_owned())
            .or_default() += 1;
        let mut chosen = None;
        for rule in state
            .rules
            .iter_mut()
            .filter(|rule| rule.function == function)
        {
            rule.seen += 1;
            let applies = rule
                .nth
                .map_or(rule.seen % rule.every == 0, |nth| nth == rule.seen);
            if applies && chosen.is_none() {
                chosen = Some(rule.action);
            }
        }
        chosen
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(line: &str) -> Result<Rule, String> {
    let wrong = || format!("not a line of a fault script: {line:?}");
    let mut words = line.split_whitespace();
    let function = words.next().ok_or_else(wrong)?.to_owned();
    let (mut nth, mut every, mut action) = (None, 1, None);
    for word in words {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let number = || value.parse::<u64>().map_err(|_| wrong());
        match key {
            "nth" => nth = Some(number()?),
            "every" => every = number()?.max(1),
            "error" => action = Some(Action::Error(value.parse().map_err(|_| wrong())?)),
            "short" => action = Some(Action::Short(value.parse().map_err(|_| wrong())?)),
            "delay_ms" => action = Some(Action::Delay(Duration::from_millis(number()?))),
            "hang" => action = Some(Action::Hang),
            "flip" => action = Some(Action::Flip),
            _ => return Err(wrong()),
        }
    }
    Ok(Rule {
        function,
        nth,
        every,
        action: action.ok_or_else(wrong)?,
        seen: 0,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]
    use super::*;

    #[test]
    fn rules_say_which_call_meets_what() {
        let script = Script::new();
        script
            .set("read nth=2 error=5030\nwrite every=2 short=4096\n")
            .unwrap();
        let reads: Vec<_> = (0..3).map(|_| script.enter("read")).collect();
        assert_eq!(reads, [None, Some(Action::Error(5030)), None]);
        let writes: Vec<_> = (0..4).map(|_| script.enter("write")).collect();
        let short = Some(Action::Short(4096));
        assert_eq!(writes, [None, short, None, short]);
        assert_eq!((script.calls("read"), script.calls("other")), (3, 0));
        for line in ["read", "read error=x", "read nth=1", "read sing"] {
            assert!(script.set(line).is_err(), "{line}");
        }
    }
}
