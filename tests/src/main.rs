//! `vm`: makes the guest image, boots it, and runs programs and all tests in it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use vm_harness::config::{Kernel, VmConfig};
use vm_harness::payload::{SHELL, Set};
use vm_harness::runner::{self, Selection};
use vm_harness::{bench, cleanup, demo, image, setup, shell, ui};

/// VM harness of ublk-target.
///
/// Everything that needs the ublk driver runs in a QEMU guest. The guest image is
/// made from distribution packages. The first run makes it (about a minute) and
/// keeps it under ${XDG_CACHE_HOME:-~/.cache}/ublk-target/vm. Missing host
/// packages are installed with apt.
///
/// UBLK_VM_MIRROR: the Debian mirror for the image, if apt on this machine has
/// none.
#[derive(Parser)]
#[command(name = "vm", bin_name = "cargo vm", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install missing host packages
    Setup,
    /// Make the guest image if it is missing or outdated, and print its directory
    Image {
        /// Print the directory of the kernel's user-space headers instead
        #[arg(long)]
        headers: bool,
    },
    /// Run all checks and tests: formatting, lints, docs, host tests, memory, guest tests
    Test(TestArgs),
    /// Boot a guest and open a shell in it
    Shell(GuestArgs),
    /// Boot a guest, run one program in it, and exit with its code
    Run {
        #[command(flatten)]
        guest: GuestArgs,
        /// Kill the program after this time, and exit with code 124
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
        /// The program in the guest, and its arguments
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
    /// Demonstrate ublk-target: a device, a file system, verification, speed
    Demo(demo::DemoArgs),
    /// Count instructions per request and measure throughput of ublk-target and of other drivers
    Bench(bench::BenchArgs),
}

#[derive(Args)]
struct GuestArgs {
    /// Which kernel to boot
    #[arg(long, value_enum, default_value_t = KernelArg::Backports)]
    kernel: KernelArg,
    /// Emulated NVMe drives of 1 GiB each (serial numbers drive0, drive1, …)
    #[arg(long, value_name = "N", default_value_t = 2)]
    drives: u32,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    /// Memory of the guest in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u32,
    /// Poll queues of each NVMe drive
    #[arg(long, value_name = "N", default_value_t = 0)]
    poll_queues: u32,
    /// Count each instruction as one nanosecond of guest time; implies one CPU
    #[arg(long)]
    icount: bool,
    /// Build the programs as users install them, for measuring; this takes longer
    #[arg(long)]
    release: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum KernelArg {
    /// The newest kernel, with all ublk features
    Backports,
    /// The kernel of the Debian release, without zero copy
    Stable,
}

impl GuestArgs {
    fn config(&self) -> VmConfig {
        let kernel = match self.kernel {
            KernelArg::Backports => Kernel::Backports,
            KernelArg::Stable => Kernel::Stable,
        };
        VmConfig {
            kernel,
            cpus: if self.icount { 1 } else { self.cpus.max(1) },
            memory_mib: self.memory,
            poll_queues: self.poll_queues,
            icount: self.icount,
            ..VmConfig::default()
        }
        .drives(self.drives)
    }

    /// The programs with their build profile.
    fn built(&self, set: Set) -> Set {
        if self.release { set.released() } else { set }
    }
}

#[derive(Args)]
struct TestArgs {
    /// Run only tests with this text in their names; the full name of a guest test
    /// boots one guest and builds only what it needs
    #[arg(long, value_name = "SUBSTRING")]
    filter: Option<String>,
    /// Print the names of the tests, and run nothing
    #[arg(long)]
    list: bool,
    /// Use more rounds, cases and seeds, and bigger data, in tests that support it
    #[arg(long)]
    long: bool,
    /// Run only the checks and tests of this machine
    #[arg(long, conflicts_with = "vm_only")]
    host_only: bool,
    /// Run only the guest tests
    #[arg(long)]
    vm_only: bool,
    /// Stop at the first failure
    #[arg(long)]
    fail_fast: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            ui::note(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    cleanup::handle_signals()?;
    match &command {
        Command::Test(args) if args.list => {}
        Command::Test(TestArgs { vm_only: false, .. }) | Command::Setup => {
            setup::ensure_with_checks()?;
        }
        Command::Demo(args) if args.native => {}
        Command::Test(_)
        | Command::Demo(_)
        | Command::Bench(_)
        | Command::Image { .. }
        | Command::Shell(_)
        | Command::Run { .. } => setup::ensure()?,
    }
    match command {
        Command::Setup => Ok(ExitCode::SUCCESS),
        Command::Image { headers } => {
            let image = image::ensure_image()?;
            let path = if headers { image.headers() } else { image.directory().to_owned() };
            ui::out(&path.display().to_string());
            Ok(ExitCode::SUCCESS)
        }
        Command::Test(args) => {
            let selection = Selection {
                filter: args.filter,
                host: !args.vm_only,
                guest: !args.host_only,
                long: args.long,
                fail_fast: args.fail_fast,
            };
            if args.list { runner::list(&selection) } else { runner::run(&selection) }
        }
        Command::Shell(guest) => shell::shell(&guest.config(), &guest.built(SHELL)),
        Command::Run { guest, timeout, command } => {
            let timeout = timeout.map(Duration::from_secs);
            let set = guest.built(Set::for_command(&command));
            shell::run(&guest.config(), &set, command, timeout)
        }
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
    }
}
