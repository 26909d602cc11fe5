//! The program `ublk-bench`.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    ublk_bench::cli::run()
}
