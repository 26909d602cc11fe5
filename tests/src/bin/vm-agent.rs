//! The guest's side of the harness; the init script of the image starts it.

fn main() -> std::process::ExitCode {
    match vm_harness::agent::serve() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vm-agent: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
