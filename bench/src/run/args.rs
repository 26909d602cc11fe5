//! Options of `run`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use ublk_engine::units::Bytes;

use super::load::LOADS;
use super::subject::{NONE, SUBJECTS, Selection, SubjectKind, lend_modes};

/// The text after the options in the help.
pub const HELP: &str = "\
In each round, each load is measured on all subjects, one after the other. Their order changes from
round to round. A device exists only during its measurement, since each device claims the backing
exclusively. Subjects that cannot be measured here are listed with the reason. Ctrl-C ends the run and
keeps its results so far. The run removes everything that it has made; after a killed run, the next
one does.

The exit code is 0 if everything that can be measured here was measured, 1 if something failed, and
128 plus the signal number after an interruption.";

/// Options of the measurement.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// A whole drive, another block device, or a regular file; its beginning is overwritten
    #[arg(long, value_name = "PATH")]
    pub backing: PathBuf,
    /// How much to measure
    #[arg(long, value_name = "PROFILE", default_value = "quick")]
    pub profile: Profile,
    /// Measure only these subjects, and the backing itself
    #[arg(long, value_name = "SUBJECTS", value_delimiter = ',', value_parser = subjects())]
    pub only: Vec<String>,
    /// Of the rivals (drivers and servers of others), measure only these; `none` for none
    #[arg(long, value_name = "RIVALS", value_delimiter = ',', value_parser = rivals())]
    pub rivals: Vec<String>,
    /// Of ublk-target, measure only these lend modes
    #[arg(long, value_name = "MODES", value_delimiter = ',', value_parser = PossibleValuesParser::new(lend_modes()))]
    pub lend: Vec<String>,
    /// Measure only these loads [default: those of the profile]
    #[arg(long, value_name = "LOADS", value_delimiter = ',', value_parser = loads())]
    pub loads: Vec<String>,
    /// Number of rounds [default: that of the profile]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Length of a measurement in seconds, from 0.1 [default: that of the profile]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub sample: Option<Duration>,
    /// How much of the backing to use: bytes, or a number with K, M, G or T [default: that of the
    /// profile, or all of a smaller backing]
    #[arg(long, value_name = "SIZE")]
    pub span: Option<Bytes>,
    /// Never write: skip loads that write, and do not ask. Most drives read unwritten blocks faster
    /// than written ones
    #[arg(long)]
    pub read_only: bool,
    /// Overwrite the backing without asking
    #[arg(long)]
    pub yes: bool,
    /// Where to write the results: a directory, or a prefix of the file names
    #[arg(long, value_name = "DIR|PREFIX", default_value = ".")]
    pub output: PathBuf,
    /// The ublk-target to measure [default: the one beside this program, or in PATH]
    #[arg(long, value_name = "PROGRAM")]
    pub ublk_target: Option<PathBuf>,
    /// The rublk to measure [default: the one in PATH; `cargo install rublk` installs it]
    #[arg(long, value_name = "PROGRAM")]
    pub rublk: Option<PathBuf>,
}

impl RunArgs {
    /// The selection of subjects.
    pub fn selection(&self) -> Selection {
        let Self { only, rivals, lend, .. } = self.clone();
        Selection { only, rivals, lend }
    }
}

fn subjects() -> PossibleValuesParser {
    PossibleValuesParser::new(SUBJECTS.iter().map(|subject| subject.name))
}

fn rivals() -> PossibleValuesParser {
    let rivals = SUBJECTS.iter().filter(|subject| SubjectKind::is_rival(subject));
    PossibleValuesParser::new(std::iter::once(NONE).chain(rivals.map(|subject| subject.name)))
}

fn loads() -> PossibleValuesParser {
    PossibleValuesParser::new(LOADS.iter().map(|load| load.name))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    let seconds = seconds.ok_or("not a number of seconds from 0.1 to 3600")?;
    Ok(Duration::from_secs_f64(seconds))
}

/// How much to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Five loads, 3 rounds of 2 seconds, 4 GiB
    Quick,
    /// All loads, 5 rounds of 10 seconds, 16 GiB
    Full,
    /// For emulated drives: five loads, 7 rounds of 0.5 seconds, 512 MiB
    Vm,
}

/// The settings of a profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Its name in results.
    pub name: &'static str,
    /// Rounds.
    pub rounds: u32,
    /// The duration of a measurement.
    pub sample: Duration,
    /// How much of the backing to use.
    pub span: Bytes,
    /// Measure only the essential loads.
    pub only_essential: bool,
}

impl Profile {
    /// Its settings.
    pub const fn settings(self) -> Settings {
        let (name, rounds, millis, mib, only_essential) = match self {
            Self::Quick => ("quick", 3, 2_000, 4 << 10, true),
            Self::Full => ("full", 5, 10_000, 16 << 10, false),
            Self::Vm => ("vm", 7, 500, 512, true),
        };
        let (sample, span) = (Duration::from_millis(millis), Bytes(mib << 20));
        Settings { name, rounds, sample, span, only_essential }
    }
}

/// An estimate of the duration of this many measurements, including making the devices and starting
/// fio.
pub fn estimate(measurements: usize, sample: Duration) -> Duration {
    let each = sample + warm_up(sample) + Duration::from_secs(1);
    each * u32::try_from(measurements).unwrap_or(u32::MAX)
}

/// The duration of the warm-up before a measurement of this length.
pub fn warm_up(sample: Duration) -> Duration {
    (sample / 4).clamp(Duration::from_millis(200), Duration::from_secs(2))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: RunArgs,
    }

    fn parse(line: &str) -> Result<RunArgs, clap::Error> {
        let words = ["x", "--backing", "/dev/x"].into_iter().chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.args)
    }

    #[test]
    fn names_are_checked() {
        let args = parse("--only raw,ours-copy --rivals none --lend copy,slot --span 2G").unwrap();
        assert_eq!(args.only, ["raw", "ours-copy"]);
        assert_eq!((args.rivals, args.span), (vec![NONE.to_owned()], Some(Bytes(2 << 30))));
        for bad in ["--only ours", "--rivals ours-copy", "--lend auto", "--loads x", "--rounds 0"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for bad in ["--sample 0.05", "--sample x", "--sample 1e9", "--sample NaN"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_estimate_counts_all_of_a_measurement() {
        assert_eq!(estimate(100, Duration::from_secs(2)), Duration::from_secs(350));
    }

    #[test]
    fn warm_ups_are_neither_short_nor_long() {
        let warm_up = |seconds| warm_up(Duration::from_secs_f64(seconds)).as_secs_f64();
        assert_eq!([0.1, 2.0, 60.0].map(warm_up), [0.2, 0.5, 2.0]);
    }
}
