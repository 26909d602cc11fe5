//! The guest's part of `vm demo`.

fn main() -> std::process::ExitCode {
    vm_harness::demo::in_guest()
}
