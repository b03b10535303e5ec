//! `soak [--seconds N] [--seed N] [--processes N]`: the model checker, with its report.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use kvrail_testing::fresh_seed;
use kvrail_testing::soak::worker;
use kvrail_testing::soak::{Plan, run};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, path] = words.as_slice()
        && flag == "--worker"
    {
        return match worker::serve(Path::new(path)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let option = |name: &str, default: u64| {
        let at = words.iter().position(|word| word == name);
        let value = at.and_then(|at| words.get(at + 1)?.parse().ok());
        value.unwrap_or(default)
    };
    let Ok(program) = std::env::current_exe() else {
        eprintln!("where this program lies is not known");
        return ExitCode::FAILURE;
    };
    let folder: PathBuf = std::env::temp_dir().join(format!("kvrail-soak-{}", std::process::id()));
    let plan = Plan {
        duration: Duration::from_secs(option("--seconds", 3600)),
        seed: option("--seed", fresh_seed()),
        processes: option("--processes", 8) as usize,
        folder: folder.clone(),
        fault_fs: program.with_file_name("fault-fs"),
        program,
    };
    println!("seed {}", plan.seed);
    let report = run(plan.clone());
    print!("{}", report.text(&plan));
    if report.is_good() {
        drop(std::fs::remove_dir_all(folder));
        ExitCode::SUCCESS
    } else {
        println!("the store is kept in {}", folder.display());
        ExitCode::FAILURE
    }
}
