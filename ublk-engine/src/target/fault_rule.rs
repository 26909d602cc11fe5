//! Rules of the fault layer, in the form that the user writes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uring_ext::Errno;

use crate::request::{Request, RequestKind};
use crate::units::{Bytes, Nanos};

/// A rule: the requests that it matches, how often it applies, and its effect.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    /// The text of the rule.
    text: String,
    /// Kinds of requests, by [`RequestKind::index`].
    kinds: [bool; RequestKind::NAMES.len()],
    /// A range of the device in bytes. A request matches if it touches the range.
    range: Option<(u64, u64)>,
    pub(super) chance: Chance,
    /// The maximum number of times that it applies, on each queue.
    pub(super) count: u64,
    pub(super) answer: Answer,
    /// Delay in nanoseconds; 0 for none.
    pub(super) delay_ns: u64,
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The real result.
    Whole,
    /// This error.
    Error(Errno),
    /// The real result, after transfers that are short at first.
    Short,
}

/// A probability. Only one below 1 draws a random number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Chance(f64);

impl Chance {
    pub fn strikes(self, draw: impl FnOnce() -> u64) -> bool {
        // 53 bits are what an f64 holds exactly.
        #[allow(clippy::cast_precision_loss, reason = "no more than 53 bits are left")]
        let drawn = || (draw() >> 11) as f64 / (1_u64 << 53) as f64;
        self.0 >= 1.0 || drawn() < self.0
    }
}

impl Rule {
    /// Whether it matches a request of a device with blocks of `block` bytes.
    pub(super) fn concerns(&self, request: &Request, block: u64) -> bool {
        let touched = |(start, end)| request.offset < end && start < request.offset + request.len;
        let divisible = self.answer != Answer::Short || request.len / block > 1;
        self.kinds[request.kind.index()] && self.range.is_none_or(touched) && divisible
    }
}

/// Errors that the block layer has a status for (`blk_errors` in `block/blk-core.c`) and that are
/// final. All others would reach the user as `EIO`.
const ERRORS: [(&str, i32); 10] = [
    ("EIO", libc::EIO),
    ("ENOSPC", libc::ENOSPC),
    ("ETIMEDOUT", libc::ETIMEDOUT),
    ("ENOLINK", libc::ENOLINK),
    ("EREMOTEIO", libc::EREMOTEIO),
    ("EBADE", libc::EBADE),
    ("ENODATA", libc::ENODATA),
    ("EILSEQ", libc::EILSEQ),
    ("ENODEV", libc::ENODEV),
    ("ETIME", libc::ETIME),
];

/// Errors that make the caller try again.
const AGAIN: [&str; 7] =
    ["EAGAIN", "EWOULDBLOCK", "EINTR", "EBUSY", "ENOMEM", "EREMCHG", "EOPNOTSUPP"];

/// Why a rule is invalid, and what to do.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRule {
    /// It has no effect.
    #[error("it does nothing; add error=NAME, short or delay=TIME")]
    NoEffect,
    /// An unknown part.
    #[error(
        "`{0}` is no part of a rule; there are op=, range=, p=, count=, error=, short and delay="
    )]
    Unknown(String),
    /// A duplicate part.
    #[error("`{0}` is given twice; give it once, or use two rules")]
    Twice(String),
    /// An unknown kind of requests.
    #[error("`{0}` is no kind of request; there are {kinds}, joined by +", kinds = kind_names())]
    Kind(String),
    /// An invalid range.
    #[error("`{0}` is no range; give START-END or START+LENGTH in bytes or with K, M, G or T")]
    Range(String),
    /// An invalid probability.
    #[error("`{0}` is no probability; give a number greater than 0, at most 1")]
    Chance(String),
    /// An invalid count.
    #[error("`{0}` is no count; give a whole number of at least 1")]
    Count(String),
    /// An invalid delay.
    #[error("`{0}` is no delay; give a number with ns, us, ms or s, at most 3600s")]
    Delay(String),
    /// An error that makes the caller try again.
    #[error("{0} asks for another try and is no answer of a drive; use EIO or ETIMEDOUT")]
    Again(String),
    /// An error without a status in the block layer.
    #[error("the block layer has no status for `{0}`; use one of {names}", names = names())]
    Error(String),
    /// Two errors, or an error and a short transfer.
    #[error("error and short exclude each other; use two rules")]
    TwoAnswers,
    /// Short transfers for requests without data.
    #[error("only reads and writes can be short; leave op out, or give read, write or both")]
    ShortKind,
    /// A range for a rule that matches flushes only.
    #[error("a flush has no range; leave one of op and range out")]
    FlushRange,
}

fn kind_names() -> String {
    RequestKind::NAMES.join(", ")
}

fn names() -> String {
    ERRORS.map(|(name, _)| name).join(", ")
}

/// The parts of a rule that were read so far.
#[derive(Default)]
struct Parts<'a> {
    op: Option<&'a str>,
    range: Option<&'a str>,
    chance: Option<&'a str>,
    count: Option<&'a str>,
    error: Option<&'a str>,
    short: Option<&'a str>,
    delay: Option<&'a str>,
}

impl<'a> Parts<'a> {
    fn split(rule: &'a str) -> Result<Self, BadRule> {
        let mut parts = Self::default();
        for part in rule.split(',') {
            let (place, value) = match part.split_once('=') {
                None if part == "short" => (&mut parts.short, ""),
                Some(("op", value)) => (&mut parts.op, value),
                Some(("range", value)) => (&mut parts.range, value),
                Some(("p", value)) => (&mut parts.chance, value),
                Some(("count", value)) => (&mut parts.count, value),
                Some(("error", value)) => (&mut parts.error, value),
                Some(("delay", value)) => (&mut parts.delay, value),
                Some(_) | None => return Err(BadRule::Unknown(part.to_owned())),
            };
            if place.replace(value).is_some() {
                let name = part.split('=').next().unwrap_or(part);
                return Err(BadRule::Twice(name.to_owned()));
            }
        }
        Ok(parts)
    }

    fn answer(&self) -> Result<Answer, BadRule> {
        match (self.error, self.short) {
            (Some(_), Some(_)) => Err(BadRule::TwoAnswers),
            (Some(name), None) => errno(name).map(Answer::Error),
            (None, Some(_)) => Ok(Answer::Short),
            (None, None) if self.delay.is_some() => Ok(Answer::Whole),
            (None, None) => Err(BadRule::NoEffect),
        }
    }
}

impl FromStr for Rule {
    type Err = BadRule;

    fn from_str(text: &str) -> Result<Self, BadRule> {
        let parts = Parts::split(text)?;
        let answer = parts.answer()?;
        let is_short = answer == Answer::Short;
        let has_data = |index| index == RequestKind::Read.index() || index == WRITE;
        let kinds = match parts.op {
            Some(list) => kinds(list)?,
            None => std::array::from_fn(|index| !is_short || has_data(index)),
        };
        if is_short && (0..kinds.len()).any(|index| kinds[index] && !has_data(index)) {
            return Err(BadRule::ShortKind);
        }
        let range = parts.range.map(range).transpose()?;
        let only_flush = (0..kinds.len()).all(|index| kinds[index] == (index == FLUSH));
        if range.is_some() && only_flush {
            return Err(BadRule::FlushRange);
        }
        Ok(Self {
            text: text.to_owned(),
            kinds,
            range,
            chance: parts.chance.map_or(Ok(Chance(1.0)), chance)?,
            count: parts.count.map_or(Ok(u64::MAX), count)?,
            answer,
            delay_ns: parts.delay.map_or(Ok(0), delay_ns)?,
        })
    }
}

impl TryFrom<String> for Rule {
    type Error = BadRule;

    fn try_from(text: String) -> Result<Self, BadRule> {
        text.parse()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.text
    }
}

const WRITE: usize = RequestKind::Write { fua: false }.index();
const FLUSH: usize = RequestKind::Flush.index();

fn kinds(list: &str) -> Result<[bool; RequestKind::NAMES.len()], BadRule> {
    let mut kinds = [false; RequestKind::NAMES.len()];
    for name in list.split('+') {
        let index = RequestKind::NAMES.iter().position(|known| *known == name);
        kinds[index.ok_or_else(|| BadRule::Kind(name.to_owned()))?] = true;
    }
    Ok(kinds)
}

fn range(text: &str) -> Result<(u64, u64), BadRule> {
    let size = |text: &str| text.parse::<Bytes>().ok().map(|bytes| bytes.0);
    let range = match (text.split_once('-'), text.split_once('+')) {
        (Some((start, end)), None) => size(start).zip(size(end)),
        (None, Some((start, len))) => size(start)
            .zip(size(len))
            .and_then(|(start, len)| Some((start, start.checked_add(len)?))),
        _ => None,
    };
    range.filter(|(start, end)| start < end).ok_or_else(|| BadRule::Range(text.to_owned()))
}

fn chance(text: &str) -> Result<Chance, BadRule> {
    let chance = text.parse().ok().filter(|chance| *chance > 0.0 && *chance <= 1.0);
    chance.map(Chance).ok_or_else(|| BadRule::Chance(text.to_owned()))
}

fn count(text: &str) -> Result<u64, BadRule> {
    let count = text.parse().ok().filter(|count| *count > 0);
    count.ok_or_else(|| BadRule::Count(text.to_owned()))
}

fn delay_ns(text: &str) -> Result<u64, BadRule> {
    let ns = text.parse::<Nanos>().ok().filter(|ns| *ns > Nanos(0));
    ns.map(|ns| ns.0).ok_or_else(|| BadRule::Delay(text.to_owned()))
}

fn errno(name: &str) -> Result<Errno, BadRule> {
    if AGAIN.contains(&name) {
        return Err(BadRule::Again(name.to_owned()));
    }
    let known = ERRORS.iter().find(|(known, _)| *known == name);
    known.map(|(_, number)| Errno::new(*number)).ok_or_else(|| BadRule::Error(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Rule {
        text.parse().unwrap_or_else(|error: BadRule| panic!("{text}: {error}"))
    }

    #[test]
    fn rules_are_read() {
        let all = Rule {
            text: String::new(),
            kinds: [true; 5],
            range: None,
            chance: Chance(1.0),
            count: u64::MAX,
            answer: Answer::Whole,
            delay_ns: 10_000_000,
        };
        let data = [true, true, false, false, false];
        let error = |number| Answer::Error(Errno::new(number));
        let (eio, enospc) = (Rule { delay_ns: 0, answer: error(5), ..all.clone() }, error(28));
        let short = Rule { delay_ns: 0, answer: Answer::Short, kinds: data, ..all.clone() };
        let some = [true, false, true, false, true];
        let table = [
            ("delay=10ms", all.clone()),
            ("delay=0.01s", all.clone()),
            ("delay=10000us", all.clone()),
            ("delay=3ns", Rule { delay_ns: 3, ..all.clone() }),
            ("error=EIO", eio.clone()),
            ("short", short.clone()),
            ("op=read+write,short", short.clone()),
            ("op=read+flush+write-zeroes,error=EIO", Rule { kinds: some, ..eio.clone() }),
            ("range=4K-1M,error=EIO", Rule { range: Some((4096, 1 << 20)), ..eio.clone() }),
            ("error=EIO,range=512+1K", Rule { range: Some((512, 1536)), ..eio.clone() }),
            ("p=0.25,error=EIO,count=3", Rule { chance: Chance(0.25), count: 3, ..eio }),
            ("delay=10ms,error=ENOSPC", Rule { answer: enospc, ..all }),
            ("short,delay=3600s", Rule { delay_ns: 3_600_000_000_000, ..short }),
        ];
        for (text, expected) in table {
            assert_eq!(parse(text), Rule { text: text.to_owned(), ..expected }, "{text}");
        }
    }

    #[test]
    fn wrong_rules_say_what_to_do() {
        let table = [
            ("", "`` is no part of a rule"),
            ("op=read", "it does nothing; add error=NAME"),
            ("error=EIO,", "`` is no part of a rule"),
            ("fail", "`fail` is no part of a rule; there are op=, range="),
            ("short=3", "`short=3` is no part"),
            ("error=EIO,error=EIO", "`error` is given twice"),
            ("short,short", "`short` is given twice"),
            ("op=reads,short", "`reads` is no kind of request; there are read, write, flush"),
            ("op=,short", "`` is no kind"),
            ("range=5,short", "`5` is no range; give START-END"),
            ("range=8K-4K,short", "`8K-4K` is no range"),
            ("range=4K+0,short", "is no range"),
            ("range=1-2+3,short", "is no range"),
            ("range=1+18446744073709551615,short", "is no range"),
            ("p=0,short", "`0` is no probability; give a number greater than 0, at most 1"),
            ("p=1.1,short", "is no probability"),
            ("p=NaN,short", "is no probability"),
            ("count=0,short", "`0` is no count"),
            ("count=-1,short", "is no count"),
            ("delay=10", "`10` is no delay; give a number with ns, us, ms or s"),
            ("delay=ms", "is no delay"),
            ("delay=0ms", "is no delay"),
            ("delay=-1s", "is no delay"),
            ("delay=3601s", "at most 3600s"),
            ("delay=infs", "is no delay"),
            ("error=EAGAIN", "EAGAIN asks for another try"),
            ("error=ENOMEM", "use EIO or ETIMEDOUT"),
            ("error=EOPNOTSUPP", "asks for another try"),
            ("error=EPERM", "no status for `EPERM`; use one of EIO, ENOSPC"),
            ("error=5", "no status for `5`"),
            ("error=EIO,short", "exclude each other"),
            ("op=discard+read,short", "only reads and writes can be short"),
            ("op=flush,range=0-1M,error=EIO", "a flush has no range"),
        ];
        for (text, expected) in table {
            let error = text.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn rules_concern_what_they_say() {
        let request = |kind, offset, len| Request { kind, offset, len };
        let write = RequestKind::Write { fua: true };
        let table = [
            ("error=EIO", request(RequestKind::Flush, 0, 0), true),
            ("range=0-1T,error=EIO", request(RequestKind::Flush, 0, 0), false),
            ("op=write,error=EIO", request(write, 0, 512), true),
            ("op=read,error=EIO", request(write, 0, 512), false),
            ("range=4K-8K,error=EIO", request(RequestKind::Read, 0, 4096), false),
            ("range=4K-8K,error=EIO", request(RequestKind::Read, 512, 4096), true),
            ("range=4K-8K,error=EIO", request(RequestKind::Read, 0, 1 << 20), true),
            ("range=4K-8K,error=EIO", request(RequestKind::Discard, 7680, 512), true),
            ("range=4K-8K,error=EIO", request(RequestKind::Discard, 8192, 512), false),
            ("short", request(RequestKind::Read, 0, 4096), false),
            ("short", request(RequestKind::Read, 0, 8192), true),
            ("short", request(RequestKind::Discard, 0, 8192), false),
        ];
        for (rule, request, expected) in table {
            assert_eq!(parse(rule).concerns(&request, 4096), expected, "{rule}: {request:?}");
        }
    }

    #[test]
    fn chances_are_kept() {
        let struck = |chance, drawn| Chance(chance).strikes(|| drawn);
        assert!(struck(0.5, (1 << 63) - 1) && !struck(0.5, 1 << 63));
        assert!(struck(1e-9, 0) && !struck(1e-9, u64::MAX / 1_000_000));
        assert!(Chance(1.0).strikes(|| panic!("nothing is left to chance")));
    }
}
