//! Arguments and dispatch. Every failure is one line: what, why, what to do.

mod add;
mod device;
mod features;
mod logging;
mod manage;
mod partitions;
mod processes;
mod recover;
mod resize;
mod serve;
mod sight;
mod stats;
mod table;
mod terminal;
mod upgrade;
mod which;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use ublk_engine::target::Rule;
use ublk_engine::units::Bytes;
use ublk_target::delete;
use ublk_target::server::config::{DeviceError, ExtentConfig};
use ublk_target::server::recovery;
use uring_ext::control::Control;

use device::{Device, Life, seconds};
use logging::To;
use terminal::say;
use which::{One, Perhaps, Which};

/// Serves Linux block devices (/dev/ublkbN) from user space, without copying their data.
#[derive(Debug, Parser)]
#[command(name = "ublk-target", version, max_term_width = 100)]
struct Cli {
    /// Say more (-v: choices and their reasons, -vv: details)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Add a device and serve it
    #[command(subcommand)]
    Add(Target),
    /// Serve many devices with few threads, as a file says
    #[command(after_help = SERVE_HELP)]
    Serve(Serve),
    /// Delete devices, in whatever state they are; one that is open or mounted is refused
    #[command(after_help = DEL_HELP)]
    Del(Del),
    /// Give a device whose server is dead a new one
    Recover(Recover),
    /// Have devices served by another version of this program, while they are used
    Upgrade(Upgrade),
    /// Change the size of a device, while it is used
    Resize(Resize),
    /// Show devices
    List(List),
    /// Show what a device does: rates, lent slots, latencies
    Stats(Stats),
    /// Show what the ublk driver of this kernel can do
    Features(Features),
    /// Stop or remove a device for a process that must not do it itself
    #[command(hide = true)]
    StopDevice {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
        /// What to have the driver do
        #[arg(long, value_name = "WHAT", default_value = "stop")]
        command: delete::Command,
    },
    /// Make the I/O of a device wait for its next server
    #[command(hide = true)]
    QuiesceDevice {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
        /// Process id of its server, which has started this process
        #[arg(long, value_name = "PID")]
        server: u32,
    },
    /// Say whether this program could serve a device in the place of its present server
    #[command(hide = true)]
    CheckState {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
    },
    /// Wait until the kernel has looked for partitions on a device, for its server, which must not
    #[command(hide = true)]
    AwaitPartitions {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
    },
    /// Supervise the server of a device
    #[command(hide = true)]
    Supervise {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
        /// Process id of its server
        #[arg(long, value_name = "PID")]
        server: u32,
    },
}

// One may be within another, so they are made only as far as they are asked for.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Target {
    /// A device that forgets what is written to it and reads as zeros
    Null {
        /// Size of the device: bytes, or a number with K, M, G, T or P
        #[arg(long, default_value = "250G")]
        size: Bytes,
        #[command(flatten)]
        device: Device,
    },
    /// A file or block device, block for block
    Loop {
        /// The backing: a block device (opened exclusively) or a regular file (locked)
        #[arg(short, long, value_name = "PATH")]
        file: PathBuf,
        #[command(flatten)]
        device: Device,
    },
    /// Extents of files or block devices, one after the other
    Linear {
        /// An extent, in the order of the device: a backing, and where on it the extent begins
        /// (default 0) and how long it is (default: to the end)
        #[arg(short, long = "file", value_name = "PATH[,OFFSET[,LENGTH]]", required = true)]
        file: Vec<Extent>,
        #[command(flatten)]
        device: Device,
    },
    /// Chunks that go to files or block devices in turn (RAID 0)
    Stripe {
        /// A backing; 2 to 64 of them
        #[arg(short, long = "file", value_name = "PATH", required = true)]
        file: Vec<PathBuf>,
        /// Bytes of a chunk: a power of two of at least 4K
        #[arg(short, long, value_name = "SIZE", default_value = "64K")]
        chunk: Bytes,
        #[command(flatten)]
        device: Device,
    },
    /// Another target, some of whose requests fail, come short at first, or are held back
    #[command(after_help = FAULT_HELP, subcommand_value_name = "TARGET", subcommand_help_heading = "Targets")]
    Fault {
        /// Which requests meet what, see below; the first rule that applies decides
        #[arg(long, value_name = "RULE", required = true)]
        rule: Vec<Rule>,
        /// The same seed and requests meet the same faults
        #[arg(long, value_name = "N", default_value = "0")]
        seed: u64,
        #[command(subcommand)]
        target: Box<Target>,
    },
}

/// Their names.
const TARGETS: [&str; 5] = ["null", "loop", "linear", "stripe", "fault"];

const FAULT_HELP: &str = "\
Which requests a rule concerns:
  op=KIND+KIND…     read, write, flush, discard, write-zeroes [default: all that the effect fits]
  range=START-END   those that touch these bytes of the device; also START+LENGTH, with K, M, G, T
  p=P               with this probability [default: 1]
  count=N           at most N of each queue
What it does to them, one or more:
  error=NAME        answers with this error: EIO, ENOSPC, ETIMEDOUT, ENOLINK, EREMOTEIO, EBADE,
                    ENODATA, EILSEQ, ENODEV or ETIME; nothing is read or written
  short             reads or writes only a part at first, as a drive may; the server goes on with the rest
  delay=TIME        holds them for so long first: a number with ns, us, ms or s

The options of the device (-n, -q, -d, --lend, …) follow the target:
  ublk-target add fault --rule p=0.01,error=EIO loop -f /dev/nvme1n1 -n 3
  ublk-target add fault --rule op=write,range=1G+4K,count=1,error=ENOSPC --rule op=read,delay=10ms \\
      stripe -f /dev/nvme1n1 -f /dev/nvme2n1 --lend slot";

/// A part of a backing: `PATH[,OFFSET[,LENGTH]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extent(ExtentConfig);

impl std::str::FromStr for Extent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut fields = text.split(',');
        let file = PathBuf::from(fields.next().filter(|path| !path.is_empty()).ok_or("no path")?);
        let mut size = || fields.next().map(str::parse::<Bytes>).transpose();
        let offset = size().map_err(|error| error.to_string())?.unwrap_or_default();
        let len = size().map_err(|error| error.to_string())?;
        match fields.next() {
            None => Ok(Self(ExtentConfig { file, offset, len })),
            Some(_) => Err("more than a path, an offset and a length".to_owned()),
        }
    }
}

#[derive(Debug, Args)]
struct Serve {
    /// The file of the devices
    #[arg(short, long, value_name = "PATH", default_value = "/etc/ublk-target/serve.toml")]
    config: PathBuf,
    /// Say what is wrong with the file, its devices and their backings, and do no more
    #[arg(long)]
    check: bool,
}

const SERVE_HELP: &str = "\
The file is TOML. A device is a table with its target and the long options of `add TARGET`:
  lanes = 2                  # threads that serve I/O [default: one for each CPU]
  [[device]]
  id = 0
  target = \"loop\"
  file = \"/dev/nvme1n1\"
  queues = 2
  on-death = \"reissue\"
  [[device]]
  id = 1
  target = \"linear\"
  file = [\"/dev/nvme2n1,0,10G\", \"/srv/disk.img\"]
  rule = [\"p=0.01,error=EIO\"] # as if wrapped by the target `fault`
The process stays in the foreground, prints the devices when they are live, and tells systemd. SIGHUP has
it read the file again: devices that are new are added, those that are gone or have changed are deleted
if nobody uses them; with a fault in the file all stays as it was. SIGTERM takes all devices down. After
SIGKILL the next `serve` takes over those of `on-death` wait, reissue and error, and adds the others
again. Devices that poll, give NVMe commands, have an I/O lane or a `busy-wait` in microseconds get lanes
of their own. A device that stands on another one of the process, in whatever way, is refused.";

#[derive(Debug, Args)]
struct Del {
    #[command(flatten)]
    which: Which,
    /// Delete a device that is open or mounted all the same: I/O of its users fails. Kill its server
    /// if that does not end within 5 seconds
    #[arg(long)]
    force: bool,
}

const DEL_HELP: &str = "\
Works on devices that are live, wait for recovery or are just recovered, that were never started, or
whose server is dead. It returns when the device, its server and its supervisor are gone, and bounds
every wait. A server of several devices (`serve`) goes on without this one. --all also ends other servers
and supervisors of this program that have no device, and removes files in /run/ublk-target that belong to
none.";

#[derive(Debug, Args)]
struct Recover {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    life: Life,
}

#[derive(Debug, Args)]
struct Upgrade {
    #[command(flatten)]
    which: Which,
    /// The program that is to serve from now on [default: this one]
    #[arg(long, value_name = "PATH")]
    program: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Resize {
    #[command(flatten)]
    which: One,
    /// Size of the device: bytes, or a number with K, M, G, T or P [default: all of the backings, which
    /// may have grown]
    #[arg(long)]
    size: Option<Bytes>,
    /// Allow a smaller size; refused while the device is open or mounted
    #[arg(long)]
    shrink: bool,
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    which: Perhaps,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Stats {
    #[command(flatten)]
    which: One,
    /// Print JSON: one object, with --watch one a line
    #[arg(long)]
    json: bool,
    /// Go on until interrupted, or until the device is gone
    #[arg(long)]
    watch: bool,
    /// Look at so many seconds, whole or not
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    /// Name each lent slot and what borrows it
    #[arg(long)]
    slots: bool,
}

/// A number of seconds that lanes can be asked after again and again.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = seconds(text).ok().filter(|interval| *interval >= Duration::from_millis(100));
    interval.ok_or_else(|| "not a number of seconds from 0.1 to 86400".to_owned())
}

#[derive(Debug, Args)]
struct Features {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Parses the arguments and runs the command.
pub fn run() -> ExitCode {
    // Started as /proc/self/exe, it would be called `exe`; others know it by its name.
    let _ = nix::sys::prctl::set_name(c"ublk-target");
    // A server that this command starts must not keep what the caller has open. Kernels before 5.11
    // cannot be asked for it; the server closes it itself then.
    let _ = uring_ext::task::keep_files_from_children();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        // Without arguments: not one line, but the help.
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            return ExitCode::from(2);
        }
        Err(error) => {
            let arguments = std::env::args_os().skip(1);
            let words = arguments.map(|argument| argument.to_string_lossy().into_owned());
            let message = one_line(&error.render().to_string());
            say!("{message}; see `{} --help`", command_of(&words.collect::<Vec<_>>()));
            return ExitCode::from(2);
        }
    };
    // What the driver offers is told without a look at devices.
    let is_blind = matches!(cli.command, Command::Features(_));
    let sight = if is_blind { Ok(()) } else { sight::check() };
    let result = sight.and_then(|()| carry_out(&cli.command, cli.verbose));
    match result {
        Ok(code) => code,
        Err(error) => {
            say!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Carries out a command.
fn carry_out(command: &Command, verbose: u8) -> anyhow::Result<ExitCode> {
    let to_terminal = || logging::start(verbose, "warn", To::Terminal);
    match command {
        Command::Add(target) => add::add(target, verbose),
        Command::Serve(args) => serve::serve(args, verbose),
        Command::Del(del) => {
            to_terminal();
            manage::delete(del)
        }
        Command::List(list) => {
            to_terminal();
            manage::list(list)
        }
        Command::Stats(args) => {
            to_terminal();
            stats::stats(args)
        }
        Command::Recover(args) => recover::recover(args, verbose),
        Command::Supervise { id, server } => processes::supervise_device(*id, *server, verbose),
        Command::Upgrade(args) => {
            to_terminal();
            upgrade::upgrade(args)
        }
        Command::Resize(args) => {
            to_terminal();
            resize::resize(args)
        }
        Command::QuiesceDevice { id, server } => {
            to_terminal();
            let quiesced = ublk_target::server::upgrade::quiesce(*id, *server);
            quiesced.map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
        Command::CheckState { id } => {
            to_terminal();
            let control = Control::open().map_err(DeviceError::from);
            let checked = control.and_then(|control| recovery::check_upgrade(&control, *id));
            checked.map_err(Into::into).and_then(|()| {
                terminal::print_line(format_args!("{}", upgrade::can_serve(*id)))?;
                Ok(ExitCode::SUCCESS)
            })
        }
        Command::AwaitPartitions { id } => {
            to_terminal();
            partitions::await_scan(*id)
        }
        Command::StopDevice { id, command } => {
            to_terminal();
            manage::command(*id, *command)
        }
        Command::Features(args) => {
            to_terminal();
            features::features(args)
        }
    }
}

/// The parser's message without its layout.
fn one_line(message: &str) -> String {
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    let said: Vec<_> = lines.take_while(|line| !line.starts_with("Usage:")).collect();
    let said = said.into_iter().filter(|line| !line.starts_with("For more information"));
    said.collect::<Vec<_>>().join(" ")
}

/// The command whose help says more about these arguments.
fn command_of(arguments: &[String]) -> String {
    let mut named = vec!["ublk-target"];
    let root = Cli::command();
    let is_command =
        |word: &&str| root.get_subcommands().any(|it| it.get_name() == *word && !it.is_hide_set());
    let mut words = arguments.iter().map(String::as_str);
    named.extend(words.find(|word| !word.starts_with('-')).filter(is_command));
    if named.last() == Some(&"add") {
        for target in words.filter(|word| TARGETS.contains(word)) {
            named.push(target);
            // Only this one is followed by another.
            if target != "fault" {
                break;
            }
        }
    }
    named.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        let targets = ["null", "loop", "linear", "stripe", "fault", "fault --rule short fault"];
        let targets = targets.map(|target| format!("add {target}"));
        let commands = [
            "", "add", "serve", "del", "list", "stats", "features", "recover", "upgrade", "resize",
        ];
        let hidden =
            ["supervise", "stop-device", "quiesce-device", "check-state", "await-partitions"];
        let commands = commands.into_iter().chain(hidden).chain(targets.iter().map(String::as_str));
        for command in commands {
            // Clap looks for contradictions in the commands that it comes by.
            let line = format!("ublk-target {command} --help");
            let error = Cli::try_parse_from(line.split_whitespace()).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::DisplayHelp, "{line}: {error}");
        }
    }

    #[test]
    fn extents_are_read() {
        let table = [
            ("/dev/sda", "/dev/sda", 0, None),
            ("disk,1M", "disk", 1 << 20, None),
            ("disk,1M,4096", "disk", 1 << 20, Some(Bytes(4096))),
        ];
        for (text, file, offset, len) in table {
            let (file, offset) = (file.into(), Bytes(offset));
            assert_eq!(text.parse(), Ok(Extent(ExtentConfig { file, offset, len })), "{text}");
        }
    }

    #[test]
    fn targets_are_wrapped() {
        let line = "ublk-target add fault --rule short --rule delay=1ms fault --rule error=EIO \
                    --seed 7 linear -f disk,1M -n 3 -q 2 -d 64 --lend slot";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Add(Target::Fault { rule, seed: 0, target }) = cli.command else {
            panic!("{line}")
        };
        assert_eq!(rule.len(), 2);
        let Target::Fault { rule, seed: 7, target } = *target else { panic!("{line}") };
        assert_eq!(rule, ["error=EIO".parse().unwrap()]);
        let Target::Linear { device, .. } = *target else { panic!("{line}") };
        assert_eq!((device.id, device.queues, device.depth), (Some(3), 2, 64));
    }

    #[test]
    fn devices_are_named_in_each_way() {
        for device in ["3", "ublkb3", "/dev/ublkb3", "-n 3", "-n3", "--id=3"] {
            let parsed = |command: &str| {
                let line = format!("ublk-target {command} {device}");
                Cli::try_parse_from(line.split_whitespace()).expect(&line).command
            };
            let mut found = Vec::new();
            if let Command::Del(del) = parsed("del") {
                found.push(del.which.id());
            }
            if let Command::List(list) = parsed("list --json") {
                found.push(list.which.id());
            }
            if let Command::Stats(stats) = parsed("stats --watch") {
                found.push(Some(stats.which.id()));
            }
            if let Command::Recover(recover) = parsed("recover --supervise") {
                found.push(recover.which.id());
            }
            if let Command::Resize(resize) = parsed("resize --size 1.5G") {
                found.push(Some(resize.which.id()));
            }
            if let Command::Upgrade(upgrade) = parsed("upgrade") {
                found.push(upgrade.which.id());
            }
            assert_eq!(found, [Some(3); 6], "{device}");
        }
        let all = Cli::try_parse_from(["ublk-target", "del", "--all"]).unwrap().command;
        let Command::Del(Del { which, .. }) = all else { panic!("{all:?}") };
        assert_eq!(which.id(), None);
    }

    #[test]
    fn the_help_that_says_more_is_named() {
        let table = [
            ("", "ublk-target"),
            ("--frobnicate", "ublk-target"),
            ("frobnicate", "ublk-target"),
            ("-v del 0 1", "ublk-target del"),
            ("stats -n add", "ublk-target stats"),
            ("stop-device", "ublk-target"),
            ("add", "ublk-target add"),
            ("add teapot", "ublk-target add"),
            ("add loop -q 0", "ublk-target add loop"),
            ("add loop -f stripe", "ublk-target add loop"),
            ("add fault", "ublk-target add fault"),
            ("add fault --rule short linear", "ublk-target add fault linear"),
        ];
        for (line, expected) in table {
            let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
            assert_eq!(command_of(&words), expected, "{line}");
            let help = format!("{expected} --help");
            let error = Cli::try_parse_from(help.split_whitespace()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DisplayHelp, "{help}");
        }
        let targets = Target::augment_subcommands(clap::Command::new("add"));
        assert!(targets.get_subcommands().map(clap::Command::get_name).eq(TARGETS));
    }

    #[test]
    fn wrong_arguments_are_one_line() {
        let table: [(&[&str], &str); 22] = [
            (&["add", "loop"], "--file"),
            (&["add", "null", "-q", "0"], "0 is not in 1..=4096"),
            (&["add", "null", "-d", "4097"], "4097 is not in 1..=4096"),
            (&["add", "null", "--lend", "magic"], "auto, fused, slot, user-copy, copy"),
            (&["add", "null", "--size", "big"], "is not a size"),
            (&["del"], "--all"),
            (&["add", "linear", "-f", "a,1M,2M,3M"], "more than a path"),
            (&["add", "linear", "-f", "a,start"], "is not a size"),
            (&["add", "stripe"], "--file"),
            (&["add", "fault", "null"], "--rule"),
            (&["add", "fault", "--rule", "short"], "requires a subcommand"),
            (&["add", "fault", "--rule", "p=2,short", "null"], "`2` is no probability"),
            (&["add", "fault", "--rule", "error=EAGAIN", "null"], "use EIO or ETIMEDOUT"),
            (&["add", "fault", "--rule", "short", "teapot"], "teapot"),
            (&["stats"], "--id"),
            (&["stats", "-n", "abc"], "the number N of a device /dev/ublkbN"),
            (&["stats", "abc"], "the number N of a device /dev/ublkbN"),
            (&["add", "null", "-n", "/dev/ublkb3"], "the number alone: 3"),
            (&["del", "0", "--all"], "cannot be used with"),
            (&["del", "0", "-n", "1"], "cannot be used with"),
            (&["list", "/dev/sda"], "ublkbID"),
            (&["stats", "-n", "0", "--interval", "0.01"], "seconds from 0.1 to 86400"),
        ];
        for (arguments, expected) in table {
            let arguments = [&["ublk-target"], arguments].concat();
            let error = Cli::try_parse_from(&arguments).unwrap_err();
            let line = one_line(&error.render().to_string());
            assert!(line.contains(expected) && !line.contains('\n'), "{arguments:?}: {line}");
        }
    }
}
