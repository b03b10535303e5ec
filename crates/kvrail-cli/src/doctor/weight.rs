//! What is recorded of a directory's bandwidth, by which it gets its share of the chunks beside
//! others, and what is measured now.

use std::path::Path;

use kvrail::io::{Folder, FolderRules, IoEngine, measure_bandwidth};
use kvrail::store::inspect::recorded_bandwidth;
use serde::Serialize;

/// The weight of a directory among several.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Weight {
    /// What stores go by; nothing where none has opened it beside another directory.
    recorded_mb_per_s: Option<u64>,
    /// What stores would find now; nothing where nothing is measured.
    measured_mb_per_s: Option<u64>,
    /// Why the record or the measurement says nothing.
    problem: Option<String>,
}

impl Weight {
    /// Reads the record, and measures as a store would if `measure` says so.
    pub(super) fn examine(
        engine: &dyn IoEngine,
        real: &Path,
        file_name: &str,
        direct: bool,
        measure: bool,
    ) -> Self {
        let mut problems = Vec::new();
        let mut note = |error: kvrail::Error| {
            problems.push(error.to_string().replace('\n', " "));
            None
        };
        let recorded = recorded_bandwidth(real).unwrap_or_else(&mut note);
        let measured = measure.then(|| {
            let folder = Folder::open(real, FolderRules::default())?;
            measure_bandwidth(engine, &folder, file_name, direct, &|| true)
        });
        let measured = measured.and_then(|found| found.map_or_else(&mut note, Some));
        Self {
            recorded_mb_per_s: recorded.map(|bandwidth| bandwidth.mb_per_s),
            measured_mb_per_s: measured.map(|bandwidth| bandwidth.mb_per_s),
            problem: (!problems.is_empty()).then(|| problems.join("; ")),
        }
    }

    /// Says it in a line.
    pub(super) fn text(&self) -> String {
        let recorded = match self.recorded_mb_per_s {
            Some(rate) => format!("{rate} MB/s recorded"),
            None => "not recorded".to_owned(),
        };
        let now = self.measured_mb_per_s;
        let now = now.map_or_else(String::new, |rate| format!(", {rate} MB/s now"));
        let problem = self.problem.as_ref();
        let problem = problem.map_or_else(String::new, |problem| format!(" ({problem})"));
        format!("{recorded}{now}{problem}")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvrail::io::PosixEngine;

    use super::*;

    #[test]
    fn the_record_and_what_is_measured_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let engine = PosixEngine::new(1, Arc::new(|| ())).unwrap();
        let examine =
            |measure| Weight::examine(&engine, directory.path(), ".weight", false, measure);
        assert_eq!(examine(false).text(), "not recorded");
        let now = examine(true);
        assert!(now.measured_mb_per_s > Some(0) && now.text().ends_with(" MB/s now"));
        let state = directory.path().join(".kvrail");
        std::fs::create_dir(&state).unwrap();
        let text = r#"{"format":1,"mb_per_s":42,"write_mb_per_s":30,"read_mb_per_s":60}"#;
        std::fs::write(state.join("bandwidth"), text).unwrap();
        assert_eq!(examine(false).text(), "42 MB/s recorded");
        std::fs::write(state.join("bandwidth"), "42").unwrap();
        let damaged = examine(false).text();
        assert!(damaged.starts_with("not recorded (") && damaged.contains("bandwidth"));
    }
}
