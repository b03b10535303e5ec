//! `soak [--seconds N] [--seed N] [--processes N]`: the model checker, with its report.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use kvrail_testing::fresh_seed;
use kvrail_testing::soak::worker;
use kvrail_testing::soak::{Plan, run};

/// Many processes on one faulty mount, against a model of what the store promises.
#[derive(Parser)]
struct Options {
    /// How long it runs.
    #[arg(long, default_value_t = 3600)]
    seconds: u64,
    /// Repeats a run's choices; a fresh one otherwise.
    #[arg(long)]
    seed: Option<u64>,
    /// How many processes share the store.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    processes: u16,
    /// One of those processes: serves what it reads from its standard input.
    #[arg(long, hide = true)]
    worker: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(mount) = options.worker {
        return match worker::serve(&mount) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let Ok(program) = std::env::current_exe() else {
        eprintln!("where this program lies is not known");
        return ExitCode::FAILURE;
    };
    let folder: PathBuf = std::env::temp_dir().join(format!("kvrail-soak-{}", std::process::id()));
    let plan = Plan {
        duration: Duration::from_secs(options.seconds),
        seed: options.seed.unwrap_or_else(fresh_seed),
        processes: usize::from(options.processes),
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
