//! The script of faults: `OPERATIONS PATTERN EFFECT [limits]`, one rule a line.
//!
//! Operations are names with commas or `*`; a pattern is a path below the root of the file system
//! in which `*` stands for anything, also for nothing and for `/`. Effects:
//!
//! | effect | what happens |
//! | --- | --- |
//! | `error=EIO` | the operation fails with this error; any of the names in [`Rules::parse`] |
//! | `done=EIO` | what answers with nothing but success (rename, unlink, fsync, ...) is done, then fails |
//! | `delay=200ms` | it takes so much longer (`s` or `ms`) |
//! | `hang` | it waits until the rule is gone, then goes on |
//! | `short` | a read or write moves half of its bytes |
//! | `flip`, `zero`, `swap` | one bit is flipped, a page zeroed, two pages change places |
//! | `late=2s` | names whose file changed less than that ago are not there for `lookup`, not listed for `readdir` |
//! | `stale=2s` | what a `lookup` says, absence too, is believed by the kernel for so long |
//! | `skew=3600s` | times are shown so much later (`-3600s`: earlier) |
//! | `lie` | an engine's request does nothing and says that all went well |
//!
//! Limits: `probability=0.1` of all matching operations, `skip=3` of them go well first, of the rest
//! `every=2` is hit, and no more than `count=5` are. `#` begins a comment.

use std::time::Duration;

use crate::damage::Damage;
use crate::random::Random;

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this error number.
    Error(i32),
    /// It is done and fails with this error number.
    Done(i32),
    /// It moves half of its bytes.
    Short,
    /// Bytes are changed on the way.
    Damage(Damage),
    /// Names that changed less than that ago are not seen.
    Late(Duration),
    /// What it says is believed for so long.
    Stale(Duration),
    /// Times are shown so many seconds later.
    Skew(i64),
    /// It does nothing and says that all went well.
    Lie,
}

/// All that happens to one operation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fault {
    /// How much longer it takes.
    pub delay: Duration,
    /// Whether it waits until no rule makes it hang any more.
    pub hang: bool,
    /// What else happens to it.
    pub effect: Option<Effect>,
    /// A number for choices within the effect, such as which bit is flipped.
    pub choice: u64,
}

#[derive(Debug, Clone, PartialEq)]
enum Action {
    Delay(Duration),
    Hang,
    Effect(Effect),
}

#[derive(Debug, Clone)]
struct Rule {
    operations: Vec<String>,
    pattern: String,
    action: Action,
    probability: f64,
    skip: u64,
    every: u64,
    count: u64,
    seen: u64,
}

impl Rule {
    fn is_about(&self, operation: &str, path: &str) -> bool {
        let named = self
            .operations
            .iter()
            .any(|name| name == "*" || name == operation);
        named && matches_pattern(&self.pattern, path)
    }

    /// Returns whether the operation that was seen last is one of those that are hit.
    fn is_hit(&self) -> bool {
        let behind = (self.seen - 1).checked_sub(self.skip);
        behind.is_some_and(|behind| {
            behind.is_multiple_of(self.every) && behind / self.every < self.count
        })
    }
}

/// Rules in force, and where chances come from.
#[derive(Debug, Clone)]
pub struct Rules {
    rules: Vec<Rule>,
    random: Random,
    hits: u64,
}

/// Error numbers by name (errno(3) of Linux).
const ERRORS: [(&str, i32); 16] = [
    ("EPERM", 1),
    ("ENOENT", 2),
    ("EINTR", 4),
    ("EIO", 5),
    ("ENXIO", 6),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EACCES", 13),
    ("ENODEV", 19),
    ("ENOSPC", 28),
    ("EROFS", 30),
    ("ENOTCONN", 107),
    ("ETIMEDOUT", 110),
    ("EHOSTDOWN", 112),
    ("ESTALE", 116),
    ("EDQUOT", 122),
];

impl Rules {
    /// Makes an empty script; `seed` decides what happens by chance.
    pub fn new(seed: u64) -> Self {
        Self {
            rules: Vec::new(),
            random: Random::new(seed),
            hits: 0,
        }
    }

    /// Replaces the script.
    ///
    /// # Errors
    /// The first line that is not understood; the old script stays in force then.
    pub fn set(&mut self, script: &str) -> Result<(), String> {
        let lines = script.lines().map(str::trim);
        let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        self.rules = lines.map(parse_rule).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Returns what happens to an operation, and counts it.
    pub fn decide(&mut self, operation: &str, path: &str) -> Fault {
        let mut fault = Fault::default();
        let mut hit = false;
        for rule in &mut self.rules {
            if !rule.is_about(operation, path) {
                continue;
            }
            // Where the effect is taken already, the rule waits for the next operation.
            if matches!(rule.action, Action::Effect(_)) && fault.effect.is_some() {
                continue;
            }
            if rule.probability < 1.0 && !self.random.chance(rule.probability) {
                continue;
            }
            rule.seen += 1;
            if !rule.is_hit() {
                continue;
            }
            hit = true;
            match rule.action {
                Action::Delay(delay) => fault.delay += delay,
                Action::Hang => fault.hang = true,
                Action::Effect(effect) => fault.effect = Some(effect),
            }
        }
        if hit {
            self.hits += 1;
            fault.choice = self.random.number();
        }
        fault
    }

    /// Returns whether an operation that hangs shall go on hanging.
    pub fn still_hangs(&self, operation: &str, path: &str) -> bool {
        let mut rules = self.rules.iter();
        rules.any(|rule| rule.action == Action::Hang && rule.is_about(operation, path))
    }

    /// Returns how many operations were hit.
    pub fn hits(&self) -> u64 {
        self.hits
    }
}

fn parse_rule(line: &str) -> Result<Rule, String> {
    let wrong = |what: &str| format!("fault rule `{line}`: {what}");
    let mut words = line.split_whitespace();
    let (Some(operations), Some(pattern), Some(effect)) =
        (words.next(), words.next(), words.next())
    else {
        return Err(wrong("expected OPERATIONS PATTERN EFFECT"));
    };
    let action = parse_action(effect).ok_or_else(|| wrong("unknown effect"))?;
    let mut rule = Rule {
        operations: operations.split(',').map(str::to_owned).collect(),
        pattern: pattern.to_owned(),
        action,
        probability: 1.0,
        skip: 0,
        every: 1,
        count: u64::MAX,
        seen: 0,
    };
    for limit in words {
        let (name, value) = limit.split_once('=').ok_or_else(|| wrong(limit))?;
        let number = value.parse::<f64>().map_err(|_| wrong(limit))?;
        match name {
            "probability" => rule.probability = number,
            "skip" => rule.skip = number as u64,
            "every" => rule.every = (number as u64).max(1),
            "count" => rule.count = number as u64,
            _ => return Err(wrong(limit)),
        }
    }
    Ok(rule)
}

fn parse_action(text: &str) -> Option<Action> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    let effect = match name {
        "hang" => return Some(Action::Hang),
        "delay" => return parse_duration(value).map(Action::Delay),
        "error" => Effect::Error(error_number(value)?),
        "done" => Effect::Done(error_number(value)?),
        "short" => Effect::Short,
        "flip" => Effect::Damage(Damage::Flip),
        "zero" => Effect::Damage(Damage::Zero),
        "swap" => Effect::Damage(Damage::Swap),
        "late" => Effect::Late(parse_duration(value)?),
        "stale" => Effect::Stale(parse_duration(value)?),
        "skew" => Effect::Skew(value.strip_suffix('s')?.parse().ok()?),
        "lie" => Effect::Lie,
        _ => return None,
    };
    Some(Action::Effect(effect))
}

fn error_number(name: &str) -> Option<i32> {
    let known = ERRORS.iter().find(|(known, _)| *known == name);
    known.map(|(_, number)| *number)
}

fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.strip_suffix('s')?, 1.0),
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * unit).ok()
}

/// Returns whether a path fits a pattern in which `*` stands for anything.
pub fn matches_pattern(pattern: &str, path: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == path;
    };
    let Some(mut path) = path.strip_prefix(start) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = path.find(part) else {
            return false;
        };
        path = path.get(at + part.len()..).unwrap_or_default();
    }
    path.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, path, fits) in [
            ("*", "a/b", true),
            ("*", "", true),
            ("a/*", "a/b/c", true),
            ("*.safetensors", "m/g0r0/abc/x.safetensors", true),
            ("*/tmp/.chunk*", "m/tmp/.chunk.1", true),
            ("*/tmp/.chunk*", "m/tmp/.probe.1", false),
            ("a*b*b", "ab", false),
            ("a*b*b", "abb", true),
            ("a", "a", true),
            ("a", "ab", false),
        ] {
            assert_eq!(matches_pattern(pattern, path), fits, "{pattern} {path}");
        }
    }

    #[test]
    fn limits_count_what_matches() {
        let mut rules = Rules::new(1);
        rules
            .set("# comment\nread,write *x error=ESTALE skip=1 count=2\nread * delay=20ms")
            .unwrap();
        let mut decide = |operation, path| rules.decide(operation, path).effect;
        assert_eq!(decide("read", "y"), None);
        assert_eq!(decide("read", "x"), None, "skipped");
        assert_eq!(decide("write", "x"), Some(Effect::Error(116)));
        assert_eq!(decide("open", "x"), None);
        assert_eq!(decide("read", "x"), Some(Effect::Error(116)));
        assert_eq!(decide("read", "x"), None, "twice only");
        assert_eq!(rules.decide("read", "y").delay, Duration::from_millis(20));
        rules.set("read * error=EIO every=3 count=2").unwrap();
        let hits: Vec<bool> = (0..9)
            .map(|_| rules.decide("read", "x").effect.is_some())
            .collect();
        assert_eq!(hits.iter().filter(|hit| **hit).count(), 2);
        assert!(hits[0] && hits[3]);
    }

    #[test]
    fn the_same_seed_makes_the_same_faults() {
        let hits = |seed| {
            let mut rules = Rules::new(seed);
            rules.set("* * error=EIO probability=0.3").unwrap();
            (0..64)
                .map(|_| rules.decide("open", "x").effect.is_some())
                .collect::<Vec<_>>()
        };
        assert_eq!(hits(3), hits(3));
        assert_ne!(hits(3), hits(4));
    }

    #[test]
    fn a_wrong_line_changes_nothing() {
        let mut rules = Rules::new(1);
        rules.set("open * hang").unwrap();
        for wrong in ["open", "open * fly", "open * error=EWHAT", "open * hang x"] {
            assert!(rules.set(wrong).unwrap_err().contains(wrong));
        }
        assert!(rules.still_hangs("open", "x") && !rules.still_hangs("read", "x"));
    }
}
