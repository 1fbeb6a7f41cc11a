//! Runs the library and turns its result into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(mongorekey::run(std::env::args_os().collect()))
}
