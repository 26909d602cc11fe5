//! Runs one test in the guest: `guest-tests NAME`, or prints the names.

use std::process::ExitCode;

use vm_harness::guest::{self, Code, Outcome, SKIP_EXIT_CODE};

fn main() -> ExitCode {
    let Some(name) = std::env::args().nth(1) else {
        for test in guest::all().filter(|test| matches!(test.code, Code::Guest(_))) {
            println!("{}", test.name);
        }
        return ExitCode::SUCCESS;
    };
    match guest::run(&name) {
        Ok(Outcome::Pass) => ExitCode::SUCCESS,
        Ok(Outcome::Skip(reason)) => {
            println!("{reason}");
            ExitCode::from(SKIP_EXIT_CODE)
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
