//! Reads and checks results, which are untrusted.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::results::{FORMAT, Latency, Results, Sample};

/// The maximum size of a file, in bytes.
const MAX_BYTES: u64 = 256 << 20;
/// The maximum length of a name or title, in characters.
const MAX_NAME: usize = 200;
/// The maximum length of other texts, in characters.
const MAX_TEXT: usize = 16 << 10;
/// The maximum number of subjects, and of loads.
const MAX_NAMED: usize = 200;
/// The maximum number of rounds.
pub(crate) const MAX_ROUNDS: u32 = 1000;
/// The maximum number of percentiles of a sample.
const MAX_PERCENTILES: usize = 1000;
/// The maximum of a figure: more than any machine reaches, and far from an overflow.
const MAX_FIGURE: f64 = 1e15;

/// Why results could not be read.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is longer than the file of any run.
    #[error("{} has more than {MAX_BYTES} bytes: it is not a file of `ublk-bench run`", .0.display())]
    TooLong(PathBuf),
    /// It is not a file of `run`.
    #[error("{} is not a file of `ublk-bench run`: {why}", path.display())]
    NotResults {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It was written by another version.
    #[error(
        "{} has format {format}, this program reads format {FORMAT}: use the ublk-bench that wrote it",
        path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// Its contents are invalid.
    #[error("{}: {invalid}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The invalid value.
        invalid: Invalid,
    },
}

/// An invalid value in results.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Too many of something.
    #[error("there are {count} {what}, and no run has more than {most}")]
    TooMany {
        /// The kind of items.
        what: &'static str,
        /// Their number.
        count: usize,
        /// The maximum.
        most: usize,
    },
    /// A text that is too long, or empty although it is required.
    #[error("{what} has {length} characters; it has 1 to {most}")]
    Length {
        /// Which text.
        what: String,
        /// Its length, in characters.
        length: usize,
        /// The maximum length.
        most: usize,
    },
    /// Two with the same name.
    #[error("two {what} are named `{name}`")]
    Twice {
        /// Subjects or loads.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A sample of an unknown subject or load.
    #[error("sample {sample} is of `{name}`, which is not among the {what}")]
    Unknown {
        /// Its index.
        sample: usize,
        /// Subjects or loads.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A second sample of one subject, load and round.
    #[error("sample {sample} is the second of `{subject}` with `{load}` in round {round}")]
    Again {
        /// Its index.
        sample: usize,
        /// The subject.
        subject: String,
        /// The load.
        load: String,
        /// The round.
        round: u32,
    },
    /// A figure that is no valid measurement.
    #[error("{what} is {figure}, which is invalid")]
    Figure {
        /// Which figure.
        what: String,
        /// Its value.
        figure: String,
    },
    /// Percentiles that are not ascending, or are invalid.
    #[error("the percentiles of sample {0} are not in order, or none")]
    Percentiles(usize),
}

/// Reads and checks a file of `run`.
///
/// # Errors
/// [`ReadError`].
pub fn read(path: &Path) -> Result<Results, ReadError> {
    let failed = |error| ReadError::Io { path: path.to_owned(), error };
    let mut text = Vec::new();
    let file = File::open(path).map_err(failed)?;
    let bytes = file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    if u64::try_from(bytes).is_ok_and(|bytes| bytes > MAX_BYTES) {
        return Err(ReadError::TooLong(path.to_owned()));
    }
    parse(path, &text)
}

/// The part of the file that every format has.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Results, ReadError> {
    let wrong = |error: serde_json::Error| {
        let why = error.to_string();
        ReadError::NotResults { path: path.to_owned(), why: clean(&why) }
    };
    let Format { format } = serde_json::from_slice(text).map_err(wrong)?;
    if format != FORMAT {
        return Err(ReadError::Format { path: path.to_owned(), format });
    }
    let results = serde_json::from_slice(text).map_err(wrong)?;
    check(&results).map_err(|invalid| ReadError::Invalid { path: path.to_owned(), invalid })?;
    Ok(results)
}

/// A text for one line of a terminal: without control characters, and of limited length.
#[must_use]
pub fn clean(text: &str) -> String {
    let mut shown: String =
        text.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(300).is_some() {
        shown.push('…');
    }
    shown
}

/// Checks everything that the types do not guarantee.
///
/// # Errors
/// The first invalid value.
pub fn check(results: &Results) -> Result<(), Invalid> {
    texts(results)?;
    let subjects = names("subjects", results.subjects.iter().map(|s| (&s.name, &s.title)))?;
    let loads = names("loads", results.loads.iter().map(|load| (&load.name, &load.title)))?;
    positive("the time that the run took", results.took_s)?;
    positive("the time of a sample", results.method.sample_s)?;
    positive("the time of the warm-up", results.method.warm_up_s)?;
    let mut seen = HashSet::new();
    for (index, sample) in results.samples.iter().enumerate() {
        for (what, names, name) in
            [("subjects", &subjects, &sample.subject), ("loads", &loads, &sample.load)]
        {
            if !names.contains(name.as_str()) {
                return Err(Invalid::Unknown { sample: index, what, name: clean(name) });
            }
        }
        figures(index, sample)?;
        if !seen.insert((sample.subject.as_str(), sample.load.as_str(), sample.round)) {
            let (subject, load) = (clean(&sample.subject), clean(&sample.load));
            return Err(Invalid::Again { sample: index, subject, load, round: sample.round });
        }
    }
    Ok(())
}

fn few(what: &'static str, count: usize, most: usize) -> Result<(), Invalid> {
    if count > most { Err(Invalid::TooMany { what, count, most }) } else { Ok(()) }
}

fn length(what: impl FnOnce() -> String, text: &str, most: usize) -> Result<(), Invalid> {
    match text.chars().count() {
        length if length > most => Err(Invalid::Length { what: what(), length, most }),
        _ => Ok(()),
    }
}

/// Unique names, with their titles.
fn names<'a>(
    what: &'static str,
    named: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<HashSet<&'a str>, Invalid> {
    let mut names = HashSet::new();
    for (name, title) in named {
        few(what, names.len() + 1, MAX_NAMED)?;
        for (kind, text) in [("name", name), ("title", title)] {
            let what = || format!("the {kind} `{}` among the {what}", clean(text));
            if text.trim().is_empty() {
                return Err(Invalid::Length { what: what(), length: 0, most: MAX_NAME });
            }
            length(what, text, MAX_NAME)?;
        }
        if !names.insert(name.as_str()) {
            return Err(Invalid::Twice { what, name: clean(name) });
        }
    }
    Ok(names)
}

/// The other texts are shown too, so their length is limited.
fn texts(results: &Results) -> Result<(), Invalid> {
    let (machine, backing) = (&results.machine, &results.backing);
    let mut all: Vec<&String> = vec![
        &results.version,
        &machine.kernel,
        &machine.cpu,
        &machine.fio,
        &backing.path,
        &backing.kind,
        &results.method.profile,
    ];
    let optional = [
        &results.incomplete,
        &machine.virtualization,
        &machine.governor,
        &backing.model,
        &backing.scheduler,
    ];
    few("arguments", results.arguments.len(), 1000)?;
    all.extend(optional.into_iter().flatten());
    all.extend(&results.arguments);
    for subject in &results.subjects {
        all.push(&subject.command);
        all.extend(subject.version.iter().chain(&subject.skipped));
    }
    all.extend(results.loads.iter().map(|load| &load.rw));
    let what = |text: &str| format!("the text `{}`", text.chars().take(20).collect::<String>());
    all.into_iter().try_for_each(|text| length(|| clean(&what(text)), text, MAX_TEXT))
}

fn positive(what: &str, figure: f64) -> Result<(), Invalid> {
    if (0.0..=MAX_FIGURE).contains(&figure) {
        return Ok(());
    }
    Err(Invalid::Figure { what: what.to_owned(), figure: figure.to_string() })
}

fn figures(index: usize, sample: &Sample) -> Result<(), Invalid> {
    if sample.round >= MAX_ROUNDS {
        let figure = sample.round.to_string();
        return Err(Invalid::Figure { what: format!("the round of sample {index}"), figure });
    }
    let cpu = &sample.cpu;
    for (what, figure) in [
        ("iops", sample.iops),
        ("bytes_per_s", sample.bytes_per_s),
        ("mean_ns", sample.latency.mean_ns),
        ("machine_us", cpu.machine_us),
        ("client_us", cpu.client_us),
        ("server_us", cpu.server_us.unwrap_or(0.0)),
    ] {
        positive(&format!("{what} of sample {index}"), figure)?;
    }
    percentiles(index, &sample.latency)
}

fn percentiles(index: usize, latency: &Latency) -> Result<(), Invalid> {
    let percentiles = &latency.percentiles;
    few("percentiles of a sample", percentiles.len(), MAX_PERCENTILES)?;
    let rising = percentiles.is_sorted_by(|one, next| one.0 < next.0 && one.1 <= next.1);
    let in_range = percentiles.iter().all(|(percentile, _)| (0.0..=100.0).contains(percentile));
    if rising && in_range { Ok(()) } else { Err(Invalid::Percentiles(index)) }
}

#[cfg(test)]
mod tests;
