//! Arguments and dispatch. Every error is one line: what failed, why, what to do.

mod add;
mod arguments;
mod device;
mod features;
mod interpose;
mod logging;
mod manage;
mod partitions;
mod processes;
mod recover;
mod resize;
mod role;
mod serve;
mod sight;
mod stats;
mod table;
mod terminal;
mod upgrade;
mod which;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use ublk_target::control::error::RecoverError;
use ublk_target::control::recoverable;
use uring_ext::control::Control;

use arguments::{
    Cli, Command, Del, Features, Interpose, List, Recover, Resize, Serve, Stats, TARGETS, Target,
    Upgrade,
};
use logging::To;
use terminal::say;

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
    // `features` does not need to see devices.
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
        Command::Interpose(args) => {
            to_terminal();
            interpose::interpose(args)
        }
        Command::Resize(args) => {
            to_terminal();
            resize::resize(args)
        }
        Command::QuiesceDevice { id, server } => {
            to_terminal();
            let quiesced = ublk_target::control::upgrade::quiesce(*id, *server);
            quiesced.map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
        Command::CheckState { id } => {
            to_terminal();
            let control = Control::open().map_err(RecoverError::from);
            let checked = control.and_then(|control| recoverable::check_upgrade(&control, *id));
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
    use clap::Subcommand;
    use ublk_engine::units::Bytes;
    use ublk_target::config::ExtentConfig;

    use super::arguments::Extent;
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
        let Command::Add(Target::Fault { faults, target }) = cli.command else { panic!("{line}") };
        assert_eq!((faults.rule.len(), faults.seed), (2, 0));
        let Target::Fault { faults, target } = *target else { panic!("{line}") };
        assert_eq!((faults.rule, faults.seed), (vec!["error=EIO".parse().unwrap()], 7));
        let Target::Linear { device, .. } = *target else { panic!("{line}") };
        assert_eq!((device.id, device.queues, device.depth), (Some(3), 2, 64));
    }

    #[test]
    fn a_layer_is_one_argument_or_a_command() {
        let fault = "fault --rule p=0.5,short --seed 3";
        let words = ["ublk-target", "add", "null", "--layer", "--name x fault --rule error=EIO"];
        let words = words.into_iter().chain(["--layer", fault]);
        let Command::Add(target) = Cli::try_parse_from(words).unwrap().command else { panic!() };
        let layers = add::config(&target).unwrap().0.layers;
        let names: Vec<_> = layers.iter().map(|layer| layer.name.as_str()).collect();
        assert_eq!(names, ["x", "fault"]);
        let line = format!("ublk-target interpose attach -n 3 --inside x {fault}");
        let command = Cli::try_parse_from(line.split_whitespace()).unwrap().command;
        let Command::Interpose(Interpose::Attach { which, inside, wait, layer, .. }) = command
        else {
            panic!("{line}")
        };
        assert_eq!((which.id, inside.unwrap().as_str()), (3, "x"));
        assert_eq!(wait.timeout, std::time::Duration::from_secs(5));
        assert_eq!(Some(layer.kind()), layers.iter().last().map(|layer| layer.kind.clone()));
    }

    /// `interpose list` prints the options of a layer so that they can be given again.
    #[test]
    fn options_of_layers_are_printed_as_they_are_read() {
        for layer in [
            "fault --rule p=0.5,short --rule op=read,delay=2ms --seed 3",
            "throttle --read-iops 100 --burst 100ms",
            "throttle --read-iops 1 --read-bps 4096 --write-iops 2 --write-bps 1 --burst 0s",
        ] {
            let line = format!("ublk-target interpose attach -n 3 {layer}");
            let command = Cli::try_parse_from(line.split_whitespace()).unwrap().command;
            let Command::Interpose(Interpose::Attach { layer: parsed, .. }) = command else {
                panic!("{line}")
            };
            let kind = parsed.kind();
            assert_eq!(format!("{} {}", kind.name(), interpose::options(&kind)), layer);
        }
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
            if let Command::Interpose(Interpose::List { which, .. }) = parsed("interpose list") {
                found.push(Some(which.id()));
            }
            assert_eq!(found, [Some(3); 7], "{device}");
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
        let table: [(&[&str], &str); 31] = [
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
            (&["add", "null", "--layer", "teapot"], "teapot"),
            (&["add", "null", "--layer", "fault"], "--rule"),
            (&["add", "null", "--layer", "throttle"], "--read-iops"),
            (&["add", "null", "--layer", "throttle --read-iops 0"], "at least 1"),
            (&["add", "null", "--layer", "throttle --write-bps 0"], "at least one byte"),
            (&["add", "null", "--layer", "throttle --read-iops 1 --burst 1"], "is no time"),
            (&["interpose", "attach", "-n", "0"], "requires a subcommand"),
            (&["interpose", "attach", "fault", "--rule", "short"], "--id"),
            (&["interpose", "detach", "-n", "0", "No"], "is no name of a layer"),
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
