//! The kernel as a witness: how often the driver copied a request's data, and how often it lent
//! the request's own pages. Tests and the demonstration both ask it.
//!
//! What is counted are calls of kernel functions, and their names change from version to version.
//! [`COPY`] and [`LEND`] list all that are known; docs/kernel-support.md says how to add one.
//! [`NvmeCommands`] are what the drives were told.

mod nvme;
mod probes;
mod symbols;

use std::fmt;

use anyhow::{Result, ensure};

pub use nvme::NvmeCommands;
use probes::Probe;
use symbols::Kernel;

/// What a driver does, and the kernel functions that it does it by.
#[derive(Debug)]
pub struct Act {
    /// In words.
    pub what: &'static str,
    /// All functions that are known, newest first.
    pub functions: &'static [Function],
    /// The name of the list, for those who have to add a function.
    list: &'static str,
    /// Functions of `drivers/block/ublk_drv.c` that call them.
    callers: &'static str,
}

/// A kernel function.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name in the source; a compiler may add a suffix.
    pub name: &'static str,
    /// The kernels whose driver was seen to call it.
    pub kernels: &'static str,
}

/// The driver copies between a request and the server's memory.
pub const COPY: Act = Act {
    what: "copies a request's data",
    functions: &[Function { name: "ublk_copy_user_pages", kernels: "6.12 to 7.3" }],
    list: "COPY",
    callers: "`ublk_map_io` and `ublk_unmap_io`",
};

/// The driver enters a request's pages into the server's ring.
pub const LEND: Act = Act {
    what: "lends a request's pages",
    functions: &[
        Function { name: "io_buffer_register_request", kernels: "7.3" },
        // 7.3 has a function of this name too, for other drivers.
        Function { name: "io_buffer_register_bvec", kernels: "6.15 to 7.2" },
    ],
    list: "LEND",
    callers: "`ublk_auto_buf_register` and `ublk_register_io_buf`",
};

impl Act {
    fn names(&self) -> String {
        let names = self.functions.iter();
        let names = names.map(|each| format!("{} (Linux {})", each.name, each.kernels));
        names.collect::<Vec<_>>().join(", ")
    }

    /// What is to be done where the known functions are not, or not all.
    fn advice(&self) -> String {
        format!(
            "see what {} of drivers/block/ublk_drv.c call there, and add it to `{}` in \
             tests/src/witness/mod.rs (docs/kernel-support.md)",
            self.callers, self.list
        )
    }

    /// The symbols of the running kernel that stand for the functions that are known.
    ///
    /// # Errors
    /// In a line, where there is none: what was looked for, on which kernel, and what to do.
    pub fn find(&self) -> Result<Vec<Found>> {
        self.find_on(&Kernel::running()?)
    }

    fn find_on(&self, kernel: &Kernel) -> Result<Vec<Found>> {
        let found = self.find_in(&kernel.symbols);
        ensure!(!found.is_empty(), "{}", self.none_found(kernel));
        Ok(found)
    }

    fn find_in(&self, symbols: &str) -> Vec<Found> {
        let all = self.functions.iter().flat_map(|function| {
            let symbols = symbols::variants(symbols, function.name);
            symbols.into_iter().map(|symbol| Found { function: function.name, symbol })
        });
        all.collect()
    }

    fn none_found(&self, kernel: &Kernel) -> String {
        if !kernel.has_driver {
            return format!(
                "Linux {} has no ublk driver loaded whose calls could be counted: run `modprobe \
                 ublk_drv`",
                kernel.release
            );
        }
        format!(
            "Linux {} has no function by which a driver {} that is known here: looked in \
             /proc/kallsyms for {}; {}",
            kernel.release,
            self.what,
            self.names(),
            self.advice()
        )
    }
}

/// A known function that the running kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its name in the source.
    pub function: &'static str,
    /// Its name in the kernel.
    pub symbol: String,
}

/// Counters of both acts, removed when dropped.
#[derive(Debug)]
pub struct Witness {
    release: String,
    copies: Vec<(Found, Probe)>,
    loans: Vec<(Found, Probe)>,
}

impl Witness {
    /// Starts to count. To be done while the device is idle.
    ///
    /// # Errors
    /// In a line: where the kernel has no function that is known ([`Act::find`]), or takes no probe
    /// on it.
    pub fn new() -> Result<Self> {
        let kernel = Kernel::running()?;
        let probes = |found: Vec<Found>| -> Result<Vec<(Found, Probe)>> {
            let probe = |found: Found| Ok((found.clone(), Probe::new(&found.symbol)?));
            found.into_iter().map(probe).collect()
        };
        let (copies, loans) = (COPY.find_on(&kernel)?, LEND.find_on(&kernel)?);
        let (copies, loans) = (probes(copies)?, probes(loans)?);
        probes::settle(copies.iter().chain(&loans).map(|(_, probe)| probe));
        Ok(Self { release: kernel.release, copies, loans })
    }

    /// What was counted so far.
    ///
    /// # Errors
    /// When the kernel does not say, or has missed calls.
    pub fn counts(&self) -> Result<Counts> {
        let count = |act, probes: &[(Found, Probe)]| -> Result<Count> {
            let mut calls = Vec::new();
            for (found, probe) in probes {
                calls.push((found.function, probe.hits()?));
            }
            Ok(Count { act, calls })
        };
        Ok(Counts {
            release: self.release.clone(),
            copies: count(&COPY, &self.copies)?,
            loans: count(&LEND, &self.loans)?,
        })
    }
}

/// How often a driver did something.
#[derive(Debug, Clone)]
pub struct Count {
    act: &'static Act,
    /// The calls of each function that the kernel has.
    calls: Vec<(&'static str, u64)>,
}

impl Count {
    /// How often, by whichever function.
    pub fn total(&self) -> u64 {
        self.calls.iter().map(|(_, calls)| calls).sum()
    }

    /// The functions that were called.
    pub fn called(&self) -> Vec<&'static str> {
        let called = self.calls.iter().filter(|(_, calls)| *calls > 0);
        called.map(|(function, _)| *function).collect()
    }
}

/// What was counted of both acts.
#[derive(Debug, Clone)]
pub struct Counts {
    release: String,
    /// Requests copied, once for each call.
    pub copies: Count,
    /// Buffers lent.
    pub loans: Count,
}

impl Counts {
    /// Fails unless at least so many requests were copied, and none was lent.
    ///
    /// # Errors
    /// In a line.
    pub fn ensure_copied(&self, requests: u64) -> Result<()> {
        self.ensure(&self.copies, &self.loans, requests)
    }

    /// Fails unless at least so many requests were lent, and none was copied.
    ///
    /// # Errors
    /// In a line.
    pub fn ensure_lent(&self, requests: u64) -> Result<()> {
        self.ensure(&self.loans, &self.copies, requests)
    }

    fn ensure(&self, wanted: &Count, unwanted: &Count, requests: u64) -> Result<()> {
        ensure!(
            unwanted.total() == 0,
            "not as it should be: the driver {}: {self}",
            unwanted.act.what
        );
        ensure!(
            wanted.total() >= requests,
            "{requests} requests were made, and the functions by which a driver {} were called \
             less often on Linux {}: {self}; if the driver does so by another function there, {}",
            wanted.act.what,
            self.release,
            wanted.act.advice()
        );
        Ok(())
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = |count: &Count| {
            let names = count.calls.iter().map(|(name, calls)| format!("{calls} {name}"));
            names.collect::<Vec<_>>().join(", ")
        };
        let (copies, loans) = (self.copies.total(), self.loans.total());
        write!(
            f,
            "{copies} copies ({}), {loans} buffers lent ({})",
            by(&self.copies),
            by(&self.loans)
        )
    }
}

#[cfg(test)]
mod tests;
