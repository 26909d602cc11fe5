//! What figures are compared with.

use super::column::COLUMNS;
use super::results::Results;
use super::row::{LOOP, RAW};

/// A line of the table of ratios.
#[derive(Debug, Clone, Copy)]
pub struct Ratio {
    /// What the table calls it.
    pub title: &'static str,
    /// The row.
    row: &'static str,
    /// What it is compared with: the best of these rows.
    with: &'static [&'static str],
    /// Only what both cost beyond `null_blk` itself is compared.
    beyond_raw: bool,
    /// The most that it is to be.
    pub limit: Option<f64>,
}

impl Ratio {
    const fn of(title: &'static str, row: &'static str, with: &'static [&'static str]) -> Self {
        Self { title, row, with, beyond_raw: false, limit: None }
    }

    const fn at_most(mut self, limit: f64) -> Self {
        self.limit = Some(limit);
        self
    }

    const fn beyond_raw(mut self) -> Self {
        self.beyond_raw = true;
        self
    }

    /// The ratio in each column, if all that it takes was measured.
    pub fn values(&self, results: &Results) -> [Option<f64>; COLUMNS.len()] {
        COLUMNS.map(|column| {
            let figure = |row: &str| results.figure(row, column.name);
            let rivals: Vec<f64> =
                self.with.iter().map(|row| figure(row)).collect::<Option<_>>()?;
            let base = if self.beyond_raw { figure(RAW)? } else { 0.0 };
            let best = rivals.into_iter().reduce(f64::min)? - base;
            (best > 0.0).then_some((figure(self.row)? - base) / best)
        })
    }
}

/// Ours compared with ours.
pub const AMONG_OURS: &[Ratio] = &[
    Ratio::of("linear / loop", "linear", &[LOOP]).at_most(1.03),
    Ratio::of("stripe within a chunk / loop", "stripe", &[LOOP]).at_most(1.05),
    Ratio::of("stripe crossing chunks / loop", "stripe-cross", &[LOOP]),
    Ratio::of("loop in slot mode / loop", "loop-slot", &[LOOP]),
    Ratio::of("loop in user-copy mode / loop", "loop-user-copy", &[LOOP]),
    Ratio::of("loop in copy mode / loop", "loop-copy", &[LOOP]),
    Ratio::of("loop with 1 layer / loop", "loop-fault", &[LOOP]),
    Ratio::of("loop with 4 layers / loop", "loop-fault-4", &[LOOP]),
    Ratio::of("loop with a throttle / loop", "loop-throttle", &[LOOP]),
];

/// Ours compared with rivals.
pub const WITH_RIVALS: &[Ratio] = &[
    Ratio::of("loop / the best rival", LOOP, &["rublk-loop", "kernel-loop"]).beyond_raw(),
    Ratio::of("loop / rublk loop", LOOP, &["rublk-loop"]).beyond_raw().at_most(0.90),
    Ratio::of("loop / kernel loop", LOOP, &["kernel-loop"]).beyond_raw(),
    Ratio::of("linear / dm-linear", "linear", &["dm-linear"]).beyond_raw(),
    Ratio::of("stripe within a chunk / dm-stripe", "stripe", &["dm-stripe"]).beyond_raw(),
    Ratio::of("stripe crossing chunks / dm-stripe", "stripe-cross", &["dm-stripe-cross"])
        .beyond_raw(),
];

/// Says of each criterion whether it is met, in a line.
pub fn verdicts(results: &Results) -> Vec<String> {
    let all = AMONG_OURS.iter().chain(WITH_RIVALS);
    let criteria = all.filter_map(|ratio| Some((ratio, ratio.limit?)));
    criteria.map(|(ratio, limit)| verdict(ratio, limit, ratio.values(results))).collect()
}

fn verdict(ratio: &Ratio, limit: f64, values: [Option<f64>; COLUMNS.len()]) -> String {
    let said = format!("{} at most {limit:.2}:", ratio.title);
    let Some(values) = values.into_iter().collect::<Option<Vec<_>>>() else {
        return format!("{said} not measured");
    };
    let above: Vec<String> = COLUMNS
        .iter()
        .zip(&values)
        .filter(|(_, value)| **value > limit)
        .map(|(column, value)| format!("{value:.3} in {}", column.title.join(" ")))
        .collect();
    if above.is_empty() {
        let most = values.into_iter().fold(0.0, f64::max);
        format!("{said} met, {most:.3} at most")
    } else {
        format!("{said} not met, {}", above.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::tests::flat;
    use crate::bench::row::row_named;

    #[test]
    fn all_rows_that_are_compared_exist() {
        for ratio in AMONG_OURS.iter().chain(WITH_RIVALS) {
            for row in ratio.with.iter().chain([&ratio.row]) {
                assert!(row_named(row).is_some(), "{row}");
            }
        }
    }

    #[test]
    fn ratios_need_all_their_figures() {
        let results = flat(&[("raw", 10), ("loop", 40), ("linear", 50), ("null", 0)]);
        let rows: [(Ratio, Option<f64>); 6] = [
            (Ratio::of("", "linear", &["loop"]), Some(1.25)),
            (Ratio::of("", "linear", &["linear", "loop"]), Some(1.25)),
            (Ratio::of("", "linear", &["stripe", "loop"]), None),
            (Ratio::of("", "linear", &["null"]), None),
            (Ratio::of("", "loop", &["linear"]).beyond_raw(), Some(0.75)),
            (Ratio::of("", "loop", &["raw"]).beyond_raw(), None),
        ];
        for (ratio, expected) in rows {
            assert_eq!(ratio.values(&results), [expected; COLUMNS.len()], "{ratio:?}");
        }
    }

    #[test]
    fn verdicts_name_what_is_above_the_limit() {
        let mut results = flat(&[("loop", 100), ("linear", 103)]);
        let said = verdicts(&results);
        assert_eq!(said[0], "linear / loop at most 1.03: met, 1.030 at most");
        assert_eq!(said[1], "stripe within a chunk / loop at most 1.05: not measured");
        results.rows[1].cells[3].runs = vec![104];
        let said = verdicts(&results);
        assert!(said[0].ends_with("not met, 1.040 in 128 KiB seq. read, QD8"), "{}", said[0]);
    }
}
