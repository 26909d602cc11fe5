//! Newtypes for the kernel's numbers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A hardware queue of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Qid(pub u16);

/// A request's place in its queue, below the queue's depth.
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

/// The one place where the shift between sectors and bytes stands.
const SECTOR_SHIFT: u32 = 9;

impl From<Sectors> for Bytes {
    fn from(sectors: Sectors) -> Self {
        Self(sectors.0 << SECTOR_SHIFT)
    }
}

impl Sectors {
    /// In bytes, unless that overflows.
    #[must_use]
    pub fn checked_bytes(self) -> Option<Bytes> {
        self.0.checked_mul(1 << SECTOR_SHIFT).map(Bytes)
    }
}

impl Bytes {
    /// Whole sectors in it, rounded down.
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

/// Why a size could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size: give bytes, or a number with K, M, G or T (powers of 1024)")]
pub struct NotASize(String);

impl std::str::FromStr for Bytes {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let error = || NotASize(text.to_owned());
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let number: u64 = digits.parse().map_err(|_| error())?;
        let unit = text[digits.len()..].to_ascii_uppercase();
        let shift = match unit.strip_suffix("IB").unwrap_or(&unit) {
            "" | "B" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(error()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(error)
    }
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
    fn sizes_are_read_and_printed() {
        let table = [
            ("0", 0, "0 B"),
            ("512", 512, "512 B"),
            ("4K", 4096, "4 KiB"),
            ("1536k", 1_572_864, "1.50 MiB"),
            ("250G", 250 << 30, "250 GiB"),
            ("1TiB", 1 << 40, "1 TiB"),
        ];
        for (text, bytes, printed) in table {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
            assert_eq!(Bytes(bytes).to_string(), printed);
        }
        for bad in ["", "G", "-1", "1.5G", "1X", "99999999999T", "4 K"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
    }
}
