//! The program `ublk-bench`.

fn main() -> std::process::ExitCode {
    ublk_bench::cli::run()
}
