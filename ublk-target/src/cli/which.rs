//! The device of a command: `-n ID`, or the device itself.

use clap::Args;
use ublk_target::device::paths::MAX_ID;

/// One device, or all.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Which {
    /// The device: ID, ublkbID or /dev/ublkbID
    #[arg(value_name = "DEVICE", value_parser = device)]
    device: Option<u32>,
    /// The device /dev/ublkbID
    #[arg(short = 'n', long, value_name = "ID", value_parser = id)]
    id: Option<u32>,
    /// All devices, except those of other programs
    #[arg(long)]
    all: bool,
}

impl Which {
    /// The id of the device; `None` means all.
    pub fn id(&self) -> Option<u32> {
        self.device.or(self.id)
    }

    /// The device that was given without `-n`.
    pub const fn positional(&self) -> Option<u32> {
        self.device
    }
}

/// One device.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct One {
    /// The device: ID, ublkbID or /dev/ublkbID
    #[arg(value_name = "DEVICE", value_parser = device)]
    device: Option<u32>,
    /// The device /dev/ublkbID
    #[arg(short = 'n', long, value_name = "ID", value_parser = id)]
    id: Option<u32>,
}

impl One {
    /// The id of the device.
    pub fn id(&self) -> u32 {
        // The parser requires one of the two.
        self.device.or(self.id).unwrap_or(u32::MAX)
    }
}

/// One device, where other words of the command could be taken for it.
#[derive(Debug, Args)]
pub struct OnlyOption {
    /// The device /dev/ublkbID
    #[arg(short = 'n', long, value_name = "ID", value_parser = id)]
    pub id: u32,
}

/// One device, or all if none is given.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct Perhaps {
    /// Only the device: ID, ublkbID or /dev/ublkbID
    #[arg(value_name = "DEVICE", value_parser = device)]
    device: Option<u32>,
    /// Only the device /dev/ublkbID
    #[arg(short = 'n', long, value_name = "ID", value_parser = id)]
    id: Option<u32>,
}

impl Perhaps {
    /// The id of the device.
    pub fn id(&self) -> Option<u32> {
        self.device.or(self.id)
    }
}

/// A device id, which is a number.
pub fn id(text: &str) -> Result<u32, String> {
    if let Some(id) = text.strip_prefix("/dev/").unwrap_or(text).strip_prefix("ublkb") {
        return Err(match number(id) {
            Ok(id) => format!("an id is the number alone: {id}"),
            Err(error) => error,
        });
    }
    number(text)
}

/// A device: its id, its name or its path.
fn device(text: &str) -> Result<u32, String> {
    let name = text.strip_prefix("/dev/").unwrap_or(text);
    match name.strip_prefix("ublkb") {
        Some(id) if id.contains('p') => Err("this is a partition; name the device".to_owned()),
        Some(id) => number(id),
        None if text == name => number(text),
        None => Err("a device is ID, ublkbID or /dev/ublkbID".to_owned()),
    }
}

fn number(text: &str) -> Result<u32, String> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number {
        return Err(format!("an id is the number N of a device /dev/ublkbN, from 0 to {MAX_ID}"));
    }
    let id = text.parse().ok().filter(|id| *id <= MAX_ID);
    id.ok_or_else(|| format!("the id is beyond the driver's limit of {MAX_ID}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read() {
        for text in ["3", "ublkb3", "/dev/ublkb3"] {
            assert_eq!(device(text), Ok(3));
        }
        let table = [
            ("abc", "number N of a device /dev/ublkbN"),
            ("", "number N of"),
            ("-1", "number N of"),
            ("+1", "number N of"),
            ("ublkb", "number N of"),
            ("1048576", "driver's limit of 1048575"),
            ("99999999999999999999", "driver's limit of 1048575"),
            ("/dev/ublkb3p1", "partition"),
            ("/dev/sda", "a device is ID, ublkbID or /dev/ublkbID"),
        ];
        for (text, expected) in table {
            let error = device(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn ids_are_numbers() {
        assert_eq!((id("0"), id("1048575")), (Ok(0), Ok(1_048_575)));
        let table = [
            ("abc", "number N of a device /dev/ublkbN"),
            ("/dev/ublkb7", "the number alone: 7"),
            ("ublkb7", "the number alone: 7"),
            ("1048576", "driver's limit of 1048575"),
        ];
        for (text, expected) in table {
            let error = id(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
