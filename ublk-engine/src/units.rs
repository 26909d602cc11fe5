//! Newtypes for the kernel's numbers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A hardware queue of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Qid(pub u16);

/// The index of a request in its queue, below the queue's depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u16);

impl Tag {
    /// As an index into per-tag tables.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A number of sectors of 512 bytes, the block layer's unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sectors(pub u64);

/// A number of bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// The shift between sectors and bytes. Defined only here.
const SECTOR_SHIFT: u32 = 9;

impl From<Sectors> for Bytes {
    fn from(sectors: Sectors) -> Self {
        Self(sectors.0 << SECTOR_SHIFT)
    }
}

impl Sectors {
    /// The number of bytes. `None` on overflow.
    #[must_use]
    pub fn checked_bytes(self) -> Option<Bytes> {
        self.0.checked_mul(1 << SECTOR_SHIFT).map(Bytes)
    }
}

impl Bytes {
    /// The number of whole sectors.
    #[must_use]
    pub const fn sectors(self) -> Sectors {
        Sectors(self.0 >> SECTOR_SHIFT)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut unit = None;
        let mut hundredths = u128::from(self.0) * 100;
        for name in UNITS {
            if hundredths < 102_400 {
                break;
            }
            hundredths /= 1024;
            unit = Some(name);
        }
        match unit {
            None => write!(f, "{} B", self.0),
            Some(unit) if hundredths % 100 == 0 => write!(f, "{} {unit}", hundredths / 100),
            Some(unit) => write!(f, "{}.{:02} {unit}", hundredths / 100, hundredths % 100),
        }
    }
}

/// A text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a size: give bytes, or a number, as 1.5, with K, M, G, T or P (powers of 1024)"
)]
pub struct NotASize(String);

impl std::str::FromStr for Bytes {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let error = || NotASize(text.to_owned());
        let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = text[number.len()..].to_ascii_uppercase();
        let shift = match unit.strip_suffix("IB").unwrap_or(&unit) {
            "" | "B" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            "P" => 50,
            _ => return Err(error()),
        };
        bytes_of(number, 1 << shift).map(Self).ok_or_else(error)
    }
}

/// A time in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nanos(pub u64);

/// The longest time that is read: an hour.
const MAX_NS: f64 = 3600e9;
const NS_UNITS: [(&str, u64); 4] =
    [("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1000), ("ns", 1)];

/// A text is not a time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no time; give a number with ns, us, ms or s, at most 3600s")]
pub struct NotATime(String);

impl std::str::FromStr for Nanos {
    type Err = NotATime;

    fn from_str(text: &str) -> Result<Self, NotATime> {
        let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = NS_UNITS.iter().find(|(name, _)| *name == &text[number.len()..]);
        #[allow(clippy::cast_precision_loss, reason = "the units are small")]
        let ns = number.parse::<f64>().ok().zip(unit).map(|(it, (_, unit))| it * *unit as f64);
        let ns = ns.map(f64::round).filter(|ns| (0.0..=MAX_NS).contains(ns));
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is whole and in range"
        )]
        ns.map(|ns| Self(ns as u64)).ok_or_else(|| NotATime(text.to_owned()))
    }
}

/// In the largest unit of which it is a multiple.
impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = NS_UNITS.iter().find(|(_, unit)| self.0 % unit == 0);
        let (name, unit) = unit.copied().unwrap_or(("ns", 1));
        write!(f, "{}{name}", self.0 / unit)
    }
}

/// Parses a number, with or without a decimal point, of units of `unit` bytes. Rounds down to
/// bytes.
fn bytes_of(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|it| it.is_ascii_digit());
    let fraction = fraction.trim_end_matches('0');
    if !is_number(whole) || !(fraction.is_empty() || is_number(fraction)) || fraction.len() > 19 {
        return None;
    }
    if fraction.is_empty() && number.ends_with('.') {
        return None;
    }
    let bytes = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    let tenths = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let part = fraction.bytes().fold(0, |sum, digit| sum * 10 + u128::from(digit - b'0'));
    let part = u64::try_from(part * u128::from(unit) / tenths).ok()?;
    bytes.checked_add(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_are_512_bytes() {
        assert_eq!(Bytes::from(Sectors(8)), Bytes(4096));
        assert_eq!(Bytes(4097).sectors(), Sectors(8));
    }

    #[test]
    fn times_are_read_and_printed() {
        let table = [
            ("0s", 0, "0s"),
            ("100ms", 100_000_000, "100ms"),
            ("1.5s", 1_500_000_000, "1500ms"),
            ("2000us", 2_000_000, "2ms"),
            ("0.4us", 400, "400ns"),
            ("3600s", 3_600_000_000_000, "3600s"),
        ];
        for (text, ns, printed) in table {
            assert_eq!(text.parse(), Ok(Nanos(ns)), "{text}");
            assert_eq!(Nanos(ns).to_string(), printed);
        }
        for bad in ["", "s", "1", "-1s", "1 s", "3601s", "infs", "NaNs", "1m", "1S"] {
            let refused = bad.parse::<Nanos>().unwrap_err().to_string();
            assert!(refused.contains("is no time"), "{bad}: {refused}");
        }
    }

    #[test]
    fn sizes_are_read_and_printed() {
        let table = [
            ("0", 0, "0 B"),
            ("512", 512, "512 B"),
            ("4K", 4096, "4 KiB"),
            ("1536k", 1_572_864, "1.50 MiB"),
            ("250G", 250 << 30, "250 GiB"),
            ("1TiB", 1 << 40, "1 TiB"),
            ("1.5G", 3 << 29, "1.50 GiB"),
            ("0.50k", 512, "512 B"),
            ("0.001K", 1, "1 B"),
            ("2.25T", 9 << 38, "2.25 TiB"),
            ("1P", 1 << 50, "1 PiB"),
            ("1.5PiB", 3 << 49, "1.50 PiB"),
        ];
        for (text, bytes, printed) in table {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
            assert_eq!(Bytes(bytes).to_string(), printed);
        }
        for bad in [
            "",
            "G",
            "-1",
            "1.G",
            ".5G",
            "1.5.5G",
            "1.-5G",
            "1,5G",
            "1X",
            "99999999999T",
            "16384P",
            "4 K",
            "+4K",
            "0.00000000000000000001P",
        ] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
    }
}
