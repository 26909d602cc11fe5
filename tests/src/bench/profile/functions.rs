//! From addresses to functions.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use object::{Object, ObjectSymbol, SymbolKind};

/// Where the kernel begins; below are programs.
const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Whose instructions those are that nobody else's are.
const OTHERS: &str = "load generator and others";

/// A part of the address space, and the functions in it.
#[derive(Debug, Default)]
struct Part {
    name: String,
    start: u64,
    end: u64,
    /// Address, and name.
    symbols: Vec<(u64, String)>,
}

/// Where functions are.
#[derive(Debug, Default)]
pub struct Functions {
    kernel: Part,
    programs: Vec<Part>,
}

impl Functions {
    /// Takes note of a line that the guest has printed. `files` are the programs that it has.
    ///
    /// # Errors
    /// When the line is none of these, or a program cannot be read.
    pub fn learn(&mut self, line: &str, files: &[PathBuf]) -> Result<()> {
        let address = |text: &str| u64::from_str_radix(text, 16).context("an address");
        match line.split(' ').collect::<Vec<_>>().as_slice() {
            ["kernel", at, name] => {
                self.kernel.symbols.push((address(at)?, (*name).to_owned()));
            }
            ["program", name, start, end] => {
                let file = files.iter().find(|file| file.file_name().is_some_and(|it| it == *name));
                let file = file.with_context(|| format!("there is no program {name}"))?;
                let (start, end) = (address(start)?, address(end)?);
                let symbols = symbols_of(file, start)?;
                self.programs.push(Part { name: (*name).to_owned(), start, end, symbols });
            }
            _ => anyhow::bail!("not a function: {line}"),
        }
        Ok(())
    }

    /// To be called when all lines have been learnt.
    pub fn finish(mut self) -> Self {
        self.kernel.name = "kernel".to_owned();
        (self.kernel.start, self.kernel.end) = (KERNEL, u64::MAX);
        self.kernel.symbols.sort();
        self
    }

    /// What the plugin has counted, by function.
    ///
    /// # Errors
    /// When a line is not of the plugin.
    pub fn table(&self, counts: &str) -> Result<Table> {
        let mut table = Table::default();
        for line in counts.lines() {
            let words: Vec<_> = line.split(' ').collect();
            let [address, instructions, executions] = words[..] else {
                anyhow::bail!("not a count: {line}");
            };
            let address = u64::from_str_radix(address, 16)?;
            let executed = instructions.parse::<f64>()? * executions.parse::<f64>()?;
            let (part, function) = self.of(address);
            *table.0.entry((part.to_owned(), function.to_owned())).or_default() += executed;
        }
        Ok(table)
    }

    fn of(&self, address: u64) -> (&str, &str) {
        let parts = std::iter::once(&self.kernel).chain(&self.programs);
        let part = parts.into_iter().find(|part| (part.start..part.end).contains(&address));
        let Some(part) = part else { return (OTHERS, "all of it") };
        let behind = part.symbols.partition_point(|(at, _)| *at <= address);
        let symbol = behind.checked_sub(1).and_then(|index| part.symbols.get(index));
        (&part.name, symbol.map_or("?", |(_, name)| name))
    }
}

/// The functions of a program that is mapped from an address on.
fn symbols_of(file: &PathBuf, start: u64) -> Result<Vec<(u64, String)>> {
    let data = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
    let program = object::File::parse(&*data)?;
    let mut symbols = Vec::new();
    for symbol in program.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
        let name = format!("{:#}", rustc_demangle::demangle(symbol.name()?));
        symbols.push((start + symbol.address(), name));
    }
    symbols.sort();
    Ok(symbols)
}

/// A number for each part and function.
#[derive(Debug, Default, PartialEq)]
pub struct Table(BTreeMap<(String, String), f64>);

impl Table {
    /// What this has more than another one.
    pub fn less(mut self, other: &Self) -> Self {
        for (function, number) in &other.0 {
            *self.0.entry(function.clone()).or_default() -= number;
        }
        self
    }

    /// As parts of `requests`.
    pub fn of_each(mut self, requests: u64) -> Self {
        #[allow(clippy::cast_precision_loss)] // some tens of thousands
        self.0.values_mut().for_each(|number| *number /= requests as f64);
        self
    }

    /// As text: each part with its functions, those of at least `least` for themselves.
    pub fn lines(&self, least: f64) -> Vec<String> {
        let mut parts: BTreeMap<&str, Vec<(&str, f64)>> = BTreeMap::new();
        for ((part, function), number) in &self.0 {
            parts.entry(part).or_default().push((function, *number));
        }
        let all: f64 = self.0.values().sum();
        let mut lines = vec![format!("{all:8.0}  in all")];
        for (part, mut functions) in parts {
            let all: f64 = functions.iter().map(|(_, number)| number).sum();
            lines.extend([String::new(), format!("{all:8.0}  {part}")]);
            functions.sort_by(|one, other| other.1.total_cmp(&one.1));
            let (large, small): (Vec<_>, Vec<_>) =
                functions.into_iter().partition(|(_, number)| number.abs() >= least);
            lines.extend(large.iter().map(|(name, number)| format!("{number:8.0}    {name}")));
            let rest = 0.0 + small.iter().map(|(_, number)| number).sum::<f64>();
            lines.push(format!("{rest:8.0}    others of less than {least}"));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn functions() -> Functions {
        let mut functions = Functions::default();
        for line in ["kernel ffffffff81000200 second", "kernel ffffffff81000000 first"] {
            functions.learn(line, &[]).unwrap();
        }
        let symbols = vec![(0x7f00_0000_1000, "push".to_owned())];
        let (start, end) = (0x7f00_0000_0000, 0x7f00_0001_0000);
        functions.programs.push(Part { name: "server".into(), start, end, symbols });
        functions.finish()
    }

    #[test]
    fn addresses_are_of_the_function_before_them() {
        let functions = functions();
        for (address, expected) in [
            (0xffff_ffff_8100_0000, ("kernel", "first")),
            (0xffff_ffff_8100_01ff, ("kernel", "first")),
            (0xffff_ffff_8100_0200, ("kernel", "second")),
            (0xffff_8000_0000_0000, ("kernel", "?")),
            (0x7f00_0000_1234, ("server", "push")),
            (0x7f00_0001_0000, (OTHERS, "all of it")),
        ] {
            assert_eq!(functions.of(address), expected, "{address:x}");
        }
    }

    #[test]
    fn the_difference_of_two_runs_is_one() {
        let functions = functions();
        let once = functions.table("ffffffff81000000 3 100\n7f0000001004 1 50\n").unwrap();
        let twice =
            "ffffffff81000000 3 150\nffffffff81000010 2 20\n7f0000001004 1 60\n400000 1 9\n";
        let cost = functions.table(twice).unwrap().less(&once).of_each(10);
        let lines = cost.lines(2.0);
        let text = lines.iter().map(|line| line.trim()).filter(|line| !line.is_empty());
        assert_eq!(
            text.collect::<Vec<_>>(),
            [
                "21  in all",
                "19  kernel",
                "19    first",
                "0    others of less than 2",
                "1  load generator and others",
                "1    others of less than 2",
                "1  server",
                "1    others of less than 2",
            ]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        let mut functions = functions();
        for line in ["", "kernel", "kernel xyz name", "program ublk-target 1000 2000"] {
            assert!(functions.learn(line, &[]).is_err(), "{line}");
        }
        assert!(functions.table("ffffffff81000000 3\n").is_err());
        assert!(functions.table("ffffffff81000000 three 1\n").is_err());
    }
}
