//! `fault-fs SOURCE MOUNT_POINT --control FILE [--seed N] [--until-input-ends]`: a file system over
//! SOURCE that fails as the rules in FILE say (see `kvrail_testing::Rules`).
//!
//! Two processes: one serves, the other one guards it. Whichever dies, the other one detaches the
//! mount and ends, and the end of the serving one ends every wait on the mount. With
//! `--until-input-ends` both end with the standard input, so with the process that holds it.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use rustix::mount::{UnmountFlags, unmount};

const USAGE: &str = "fault-fs SOURCE MOUNT_POINT --control FILE [--seed N] [--until-input-ends]";

struct Arguments {
    source: PathBuf,
    mount_point: PathBuf,
    control: PathBuf,
    seed: u64,
    until_input_ends: bool,
    serve: bool,
}

fn main() -> ExitCode {
    let Some(arguments) = parse(std::env::args().skip(1).collect()) else {
        eprintln!("usage: {USAGE}");
        return ExitCode::from(2);
    };
    if arguments.serve {
        serve(&arguments)
    } else {
        guard(&arguments)
    }
}

fn parse(words: Vec<String>) -> Option<Arguments> {
    let mut paths = Vec::new();
    let (mut control, mut seed) = (None, 1);
    let (mut until_input_ends, mut serve) = (false, false);
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--control" => control = Some(PathBuf::from(words.next()?)),
            "--seed" => seed = words.next()?.parse().ok()?,
            "--until-input-ends" => until_input_ends = true,
            "--serve" => serve = true,
            path => paths.push(PathBuf::from(path)),
        }
    }
    let mut paths = paths.into_iter();
    let arguments = Arguments {
        source: paths.next()?,
        mount_point: paths.next()?,
        control: control?,
        seed,
        until_input_ends,
        serve,
    };
    paths.next().is_none().then_some(arguments)
}

/// Starts the serving process and stays until it ends.
fn guard(arguments: &Arguments) -> ExitCode {
    let started = std::env::current_exe().and_then(|program| {
        Command::new(program)
            .args(std::env::args_os().skip(1))
            .arg("--serve")
            .stdin(Stdio::piped())
            .spawn()
    });
    let mut server = match started {
        Ok(server) => server,
        Err(error) => {
            eprintln!("start the serving process: {error}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.until_input_ends {
        let line = server.stdin.take();
        std::thread::spawn(move || {
            wait_for_end_of_input();
            // The serving process sees the end of its own input and detaches the mount.
            drop(line);
        });
    }
    let status = server.wait();
    // Whatever the serving process did not come to.
    let _ = unmount(&arguments.mount_point, UnmountFlags::DETACH);
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// Serves the file system until it is unmounted or the guard is gone.
fn serve(arguments: &Arguments) -> ExitCode {
    let mount_point = arguments.mount_point.clone();
    std::thread::spawn(move || {
        wait_for_end_of_input();
        let _ = unmount(&mount_point, UnmountFlags::DETACH);
        // Ends all that hangs: the kernel aborts the connection when its last holder is gone.
        std::process::exit(0);
    });
    let ready = || {
        println!("mounted");
        drop(std::io::stdout().flush());
    };
    let (source, point): (&Path, &Path) = (&arguments.source, &arguments.mount_point);
    let served = kvrail_testing::file_system::serve(
        source,
        point,
        &arguments.control,
        arguments.seed,
        ready,
    );
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mount at {}: {error}", point.display());
            ExitCode::FAILURE
        }
    }
}

fn wait_for_end_of_input() {
    let mut buffer = [0; 256];
    while std::io::stdin()
        .read(&mut buffer)
        .is_ok_and(|count| count > 0)
    {}
}
