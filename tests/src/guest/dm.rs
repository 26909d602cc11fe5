//! Device-mapper devices, for drives of which parts fail.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::drives::Drive;
use super::process;

/// A device that is removed with its handle.
#[derive(Debug)]
pub struct Mapper {
    name: String,
    removed: bool,
}

impl Mapper {
    /// Makes a device of the lines of a table, such as `0 2048 linear /dev/nvme1n1 0` or
    /// `2048 8 error`. Sectors are of 512 bytes.
    ///
    /// # Errors
    /// When the kernel does not take the table, or the name is taken.
    pub fn create(name: &str, table: &[impl AsRef<str>]) -> Result<Self> {
        process::run(&["modprobe", "dm_mod"])?;
        let mut file = tempfile::NamedTempFile::new()?; // arguments hold one line only
        for line in table {
            writeln!(file, "{}", line.as_ref())?;
        }
        let path = file.path().to_str().context("a path that is not UTF-8")?;
        process::run(&["dmsetup", "create", name, path])?;
        Ok(Self { name: name.to_owned(), removed: false })
    }

    /// Makes a device that is the whole drive, but that requests for the sectors `bad` (the first
    /// and how many) fail with `EIO`.
    ///
    /// # Errors
    /// As [`Mapper::create()`]; when the ranges are not in order or not on the drive.
    pub fn with_bad_sectors(name: &str, drive: &Drive, bad: &[(u64, u64)]) -> Result<Self> {
        Self::create(name, &bad_sectors(&drive.path(), drive.number("size")?, bad)?)
    }

    /// The block device.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }

    /// Removes it.
    ///
    /// # Errors
    /// When it is in use.
    pub fn remove(mut self) -> Result<()> {
        self.removed = true;
        remove(&self.name)
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        if !self.removed {
            // The test has failed already; what this leaves is found by the check for leaks.
            let _ = remove(&self.name);
        }
    }
}

fn remove(name: &str) -> Result<()> {
    // Again if udev has it open just now.
    process::run(&["dmsetup", "remove", "--retry", name]).map(drop)
}

/// The table of a device of `sectors` that lies on `backing`, but for the ranges `bad`.
fn bad_sectors(backing: &Path, sectors: u64, bad: &[(u64, u64)]) -> Result<Vec<String>> {
    let mut table = Vec::new();
    let mut next = 0;
    let linear = |start, end| {
        let nr_sectors = end - start;
        (nr_sectors > 0)
            .then(|| format!("{start} {nr_sectors} linear {} {start}", backing.display()))
    };
    for &(start, nr_sectors) in bad {
        ensure!(next <= start && nr_sectors > 0, "empty or not in order: {bad:?}");
        table.extend(linear(next, start));
        table.push(format!("{start} {nr_sectors} error"));
        next = start + nr_sectors;
    }
    ensure!(next <= sectors, "beyond the end of {sectors} sectors: {bad:?}");
    table.extend(linear(next, sectors));
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_cover_the_drive() {
        let rows: &[(&[(u64, u64)], &str)] = &[
            (&[], "0 100 linear /dev/x 0"),
            (&[(8, 8)], "0 8 linear /dev/x 0; 8 8 error; 16 84 linear /dev/x 16"),
            (&[(0, 1), (99, 1)], "0 1 error; 1 98 linear /dev/x 1; 99 1 error"),
            (&[(5, 1), (6, 2)], "0 5 linear /dev/x 0; 5 1 error; 6 2 error; 8 92 linear /dev/x 8"),
            (&[(0, 100)], "0 100 error"),
        ];
        for (bad, table) in rows {
            assert_eq!(bad_sectors(Path::new("/dev/x"), 100, bad).unwrap().join("; "), *table);
        }
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        let rows: &[&[(u64, u64)]] =
            &[&[(8, 0)], &[(8, 8), (0, 4)], &[(8, 8), (15, 5)], &[(99, 2)]];
        for bad in rows {
            assert!(bad_sectors(Path::new("/dev/x"), 100, bad).is_err(), "{bad:?}");
        }
    }
}
