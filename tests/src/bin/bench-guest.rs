//! The guest's part of `vm bench`.

fn main() -> std::process::ExitCode {
    vm_harness::bench::in_guest()
}
