//! The command line of `ublk-target`.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
