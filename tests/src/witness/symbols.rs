//! The names of the running kernel's functions.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// A kernel, as far as witnesses look at it.
#[derive(Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// The text of `/proc/kallsyms`.
    pub symbols: String,
    /// Its ublk driver is loaded, so the driver's functions are among the symbols.
    pub has_driver: bool,
}

impl Kernel {
    /// The running one.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn running() -> Result<Self> {
        const SYMBOLS: &str = "/proc/kallsyms";
        Ok(Self {
            release: release()?,
            symbols: fs::read_to_string(SYMBOLS).with_context(|| format!("read {SYMBOLS}"))?,
            has_driver: Path::new("/sys/module/ublk_drv").exists(),
        })
    }
}

/// The running kernel's release.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn release() -> Result<String> {
    const RELEASE: &str = "/proc/sys/kernel/osrelease";
    let text = fs::read_to_string(RELEASE).with_context(|| format!("read {RELEASE}"))?;
    Ok(text.trim().to_owned())
}

/// The symbols that are a function: its own name, or, where the compiler has changed how it is
/// called, one with a suffix (`.isra.0`, `.constprop.0`). `.cold` is a part that is jumped to, and
/// `.part.0` one that is called for some cases only.
pub fn variants(symbols: &str, function: &str) -> Vec<String> {
    let found = symbols.lines().filter_map(|line| {
        // Address, type, name, and the module's if it is in one.
        let mut words = line.split_whitespace().skip(1);
        let (kind, symbol) = (words.next()?, words.next()?);
        let suffix = symbol.strip_prefix(function)?;
        let is_whole = !suffix.contains(".cold") && !suffix.contains(".part");
        let is_it = suffix.is_empty() || suffix.starts_with('.') && is_whole;
        (matches!(kind, "t" | "T") && is_it).then(|| symbol.to_owned())
    });
    found.collect()
}
