//! Figures and what they come to.

use serde::{Deserialize, Serialize};

/// Instructions for each request in the runs of one row and column.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    /// The column's name.
    pub column: String,
    /// A figure for each run.
    pub runs: Vec<u32>,
}

impl Cell {
    /// The figure that counts.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.runs.clone();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        let [low, high] = [last / 2, last.div_ceil(2)].map(|middle| f64::from(sorted[middle]));
        Some(f64::midpoint(low, high))
    }

    /// How far the runs lie apart, as a part of their median.
    pub fn spread(&self) -> Option<f64> {
        let (low, high) = (self.runs.iter().min()?, self.runs.iter().max()?);
        self.median().filter(|median| *median > 0.0).map(|median| f64::from(high - low) / median)
    }
}

/// What came out for a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RowResult {
    /// The row's name.
    pub row: &'static str,
    /// The cells that were measured.
    pub cells: Vec<Cell>,
    /// Why some were not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// All that was measured, and where.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Results {
    /// What the figures are.
    pub unit: &'static str,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// Version of the emulator.
    pub qemu: String,
    /// Version of the load generator.
    pub fio: String,
    /// Version of rublk.
    pub rublk: String,
    /// Version of ublk-target.
    pub ublk_target: String,
    /// The rows.
    pub rows: Vec<RowResult>,
}

impl Results {
    /// What came out for a row, if it was asked for.
    pub fn row(&self, name: &str) -> Option<&RowResult> {
        self.rows.iter().find(|result| result.row == name)
    }

    /// The figure of a cell.
    pub fn figure(&self, row: &str, column: &str) -> Option<f64> {
        self.row(row)?.cells.iter().find(|cell| cell.column == column)?.median()
    }

    /// The whole as JSON, a line for each row.
    ///
    /// # Errors
    /// What serde says; these types always serialize.
    pub fn json(&self) -> serde_json::Result<String> {
        let rows: serde_json::Result<Vec<_>> =
            self.rows.iter().map(serde_json::to_string).collect();
        let rest = Self { rows: Vec::new(), ..self.clone() };
        let rest = serde_json::to_string_pretty(&rest)?;
        let rows = format!("\"rows\": [\n    {}\n  ]", rows?.join(",\n    "));
        Ok(rest.replace("\"rows\": []", &rows) + "\n")
    }

    /// The cell whose runs lie farthest apart: row, column, spread.
    pub fn widest(&self) -> Option<(&'static str, &str, f64)> {
        let cells = self.rows.iter().flat_map(|result| {
            result.cells.iter().map(|cell| (result.row, cell.column.as_str(), cell.spread()))
        });
        cells
            .filter_map(|(row, column, spread)| Some((row, column, spread?)))
            .max_by(|one, other| one.2.total_cmp(&other.2))
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::bench::column::COLUMNS;

    /// Results with the same figure in all columns of a row.
    pub fn flat(rows: &[(&'static str, u32)]) -> Results {
        let cells = |figure: u32| {
            COLUMNS.map(|column| Cell { column: column.name.into(), runs: vec![figure] }).to_vec()
        };
        let rows = rows
            .iter()
            .map(|(row, figure)| RowResult { row, cells: cells(*figure), failure: None })
            .collect();
        Results { rows, ..Results::default() }
    }

    fn cell(runs: &[u32]) -> Cell {
        Cell { column: "qd1".into(), runs: runs.to_vec() }
    }

    #[test]
    fn medians_and_spreads() {
        for (runs, median, spread) in [
            (&[][..], None, None),
            (&[7], Some(7.0), Some(0.0)),
            (&[9, 7], Some(8.0), Some(0.25)),
            (&[90, 10, 20], Some(20.0), Some(4.0)),
            (&[0], Some(0.0), None),
        ] {
            assert_eq!((cell(runs).median(), cell(runs).spread()), (median, spread), "{runs:?}");
        }
    }

    #[test]
    fn the_widest_cell_is_named() {
        let mut results = flat(&[("raw", 10), ("loop", 40)]);
        results.rows[1].cells[2].runs = vec![40, 41, 44];
        let (row, column, spread) = results.widest().unwrap();
        assert_eq!((row, column), ("loop", "qd32-write"));
        assert!((spread - 4.0 / 41.0).abs() < 1e-9);
        assert_eq!(Results::default().widest(), None);
    }

    #[test]
    fn json_has_a_line_for_each_row() {
        let mut results = flat(&[("raw", 10), ("loop", 40)]);
        results.rows[1].failure = Some("no".into());
        let text = results.json().unwrap();
        assert_eq!(text.lines().filter(|line| line.contains("\"row\":")).count(), 2);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["rows"][1]["cells"][3]["runs"][0], 40);
        assert_eq!(json["rows"][1]["failure"], "no");
        assert!(json["rows"][0].get("failure").is_none());
    }
}
