//! What is known of a chunk on one rank.

use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvrail::store::capacity::{Eviction, EvictionReason, Stamp, evictions};
use kvrail::store::inspect::{
    self, ChunkFile, NamespaceInfo, QuarantinedChunk, find_chunk, verify_chunk,
};
use kvrail::{ChunkKey, Part};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{age_seconds, human_age, human_bytes};

/// Why a chunk was a hit, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Verdict {
    /// It is there and, where it was read, whole.
    #[serde(rename = "hit")]
    Hit,
    /// It is there, and is not what was stored.
    #[serde(rename = "damaged")]
    Damaged,
    /// It was set aside.
    #[serde(rename = "in quarantine")]
    InQuarantine,
    /// It was removed to make room, for its age or because somebody asked for it.
    #[serde(rename = "evicted")]
    Evicted,
    /// Nothing here knows of it.
    #[serde(rename = "never seen")]
    NeverSeen,
}

impl Verdict {
    /// Returns the word for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Damaged => "damaged",
            Self::InQuarantine => "in quarantine",
            Self::Evicted => "evicted",
            Self::NeverSeen => "never seen",
        }
    }
}

/// What is known of a chunk on one rank.
#[derive(Debug, Serialize)]
pub(super) struct Finding {
    pub(super) rank: Part,
    pub(super) verdict: Verdict,
    /// All of it in words.
    pub(super) detail: String,
    /// Bytes of its file, where it is or was.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    /// When it was last stored or used, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    used_milliseconds: Option<i64>,
    /// When it was evicted or set aside, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    gone_milliseconds: Option<i64>,
    /// Tokens of the chunk, as its head says.
    #[serde(skip)]
    pub(super) tokens: Option<u64>,
}

/// What a namespace keeps of chunks that are not in their place any more.
pub(super) struct Traces {
    aside: Vec<QuarantinedChunk>,
    /// Evictions of the chunks that are asked for, oldest first.
    evicted: Vec<Eviction>,
}

impl Traces {
    /// Reads what is known of `keys`.
    ///
    /// # Errors
    /// The quarantine cannot be read.
    pub(super) fn read(namespace: &NamespaceInfo, keys: &[ChunkKey]) -> Result<Self, Failure> {
        let wanted: HashSet<&ChunkKey> = keys.iter().collect();
        Ok(Self {
            aside: inspect::quarantined(&namespace.directory)?,
            evicted: evictions(&namespace.directory)
                .filter(|eviction| wanted.contains(&eviction.key))
                .collect(),
        })
    }
}

/// Looks for a chunk on one rank, and reads all of it unless `quick`.
///
/// # Errors
/// The system does not tell whether it is there.
pub(super) fn look(
    namespace: &NamespaceInfo,
    traces: &Traces,
    place: (u32, Part, ChunkKey),
    quick: bool,
) -> Result<Finding, Failure> {
    if let Some(chunk) = find_chunk(&namespace.directory, place)? {
        return Ok(present(namespace, &chunk, quick));
    }
    let (_, rank, _) = place;
    let aside = traces.aside.iter();
    let last = aside
        .filter(|chunk| (chunk.group, chunk.rank, chunk.key) == place)
        .max_by_key(|chunk| chunk.since);
    let evicted = traces.evicted.iter();
    let evicted = evicted
        .rev()
        .find(|eviction| (eviction.group, eviction.rank, eviction.key) == place)
        .filter(|eviction| {
            last.is_none_or(|chunk| chunk.since <= time(eviction.evicted_milliseconds))
        });
    let finding = |verdict, detail| Finding {
        rank,
        verdict,
        detail,
        bytes: None,
        used_milliseconds: None,
        gone_milliseconds: None,
        tokens: None,
    };
    Ok(match (evicted, last) {
        (Some(eviction), _) => {
            let why = match eviction.reason {
                EvictionReason::Size => "max_size left no room for it",
                EvictionReason::Space => "min_free asked for its space",
                EvictionReason::Age => "nobody used it for ttl",
                EvictionReason::Request => "kvrail gc was asked to",
            };
            let at = ago(time(eviction.evicted_milliseconds));
            let used = ago(time(eviction.used_milliseconds));
            Finding {
                bytes: Some(eviction.bytes),
                used_milliseconds: Some(eviction.used_milliseconds),
                gone_milliseconds: Some(eviction.evicted_milliseconds),
                ..finding(
                    Verdict::Evicted,
                    format!("evicted {at}: {why}; last used {used}"),
                )
            }
        }
        (None, Some(chunk)) => {
            let reason = chunk.reason.as_deref().unwrap_or("nothing says why");
            let text = format!("set aside {}: {reason}", ago(chunk.since));
            Finding {
                bytes: Some(chunk.bytes),
                gone_milliseconds: Some(milliseconds(chunk.since)),
                ..finding(Verdict::InQuarantine, text)
            }
        }
        (None, None) => finding(
            Verdict::NeverSeen,
            "absent: not stored here yet, or removed without a record".to_owned(),
        ),
    })
}

fn present(namespace: &NamespaceInfo, chunk: &ChunkFile, quick: bool) -> Finding {
    let checked = match &namespace.manifest {
        Ok(manifest) if !quick => verify_chunk(chunk, manifest).map(Some),
        _ => Ok(None),
    };
    let since_1970 = chunk.modified.duration_since(UNIX_EPOCH);
    let since_1970 = since_1970.unwrap_or_default();
    let stamp = Stamp::from_time(
        i64::try_from(since_1970.as_secs()).unwrap_or(i64::MAX),
        i64::from(since_1970.subsec_nanos()),
    );
    let used = match stamp.uses() {
        // A file system with coarse times does not say whether there was a use.
        0 => format!("stored or used {}", ago(chunk.modified)),
        uses => format!("last hit {}, used again {uses} times", ago(chunk.modified)),
    };
    let bytes = human_bytes(chunk.bytes);
    let (verdict, detail) = match &checked {
        Ok(Some(_)) => (Verdict::Hit, format!("present and whole: {bytes}, {used}")),
        Ok(None) => (Verdict::Hit, format!("present, not read: {bytes}, {used}")),
        Err(error) => (
            Verdict::Damaged,
            format!("present and bad, the next load sets it aside: {error}"),
        ),
    };
    Finding {
        rank: chunk.rank,
        verdict,
        detail,
        bytes: Some(chunk.bytes),
        used_milliseconds: Some(stamp.milliseconds()),
        gone_milliseconds: None,
        tokens: checked.ok().flatten().map(|summary| summary.tokens),
    }
}

fn ago(moment: SystemTime) -> String {
    format!("{} ago", human_age(age_seconds(moment)))
}

/// Returns the moment that many milliseconds after 1970.
fn time(milliseconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(milliseconds).unwrap_or_default())
}

fn milliseconds(moment: SystemTime) -> i64 {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
