//! The tables, in the terminal and in Markdown.

use super::column::{COLUMNS, Column};
use super::guest::{INSTRUCTIONS_A_MILLISECOND, RUNS};
use super::ratios::{AMONG_OURS, Ratio, WITH_RIVALS, verdicts};
use super::results::{Results, RowResult};
use super::row::row_named;
use crate::numbers::group;

const TITLE_WIDTH: usize = 36;
const CELL_WIDTH: usize = 14;
/// What stands where nothing was measured.
const NONE: &str = "-";

/// The heading of the table in the terminal.
pub fn heading() -> [String; 2] {
    [0, 1].map(|line| row("", &COLUMNS.map(|column| column.title[line].to_owned())))
}

/// A row of it; why something is missing follows in a line of its own.
pub fn figures(result: &RowResult) -> Vec<String> {
    let mut lines = vec![row(title(result), &COLUMNS.map(|column| figure(result, &column)))];
    lines.extend(result.failure.as_ref().map(|why| format!("  failed: {}", first_line(why))));
    lines
}

/// The ratios and criteria, in the terminal.
pub fn summary(results: &Results) -> Vec<String> {
    let mut lines = Vec::new();
    for (heading, ratios) in SECTIONS {
        let measured: Vec<_> = rows_of_ratios(results, ratios);
        if !measured.is_empty() {
            lines.push(String::new());
            lines.push(format!("{heading}:"));
            lines.extend(measured.iter().map(|(title, values)| row(title, values)));
        }
    }
    lines.push(String::new());
    lines.extend(verdicts(results));
    lines.push(spread(results));
    lines
}

const SECTIONS: [(&str, &[Ratio]); 2] = [
    ("Ours compared with ours", AMONG_OURS),
    ("Ours compared with rivals, both without what null_blk itself costs", WITH_RIVALS),
];

/// All of it as a document.
pub fn document(results: &Results) -> String {
    let mut text = format!("# Instructions for each request\n\n{}\n", introduction(results));
    let heads = COLUMNS.map(|column| column.title.join(" "));
    text.push_str(&table(
        "device",
        &heads,
        results
            .rows
            .iter()
            .map(|result| (title(result), COLUMNS.map(|column| figure(result, &column)))),
    ));
    for result in &results.rows {
        if let Some(why) = &result.failure {
            text.push_str(&format!("\n{} failed: {}\n", title(result), first_line(why)));
        }
    }
    text.push_str(&format!(
        "\n{}\n\n## Ratios\n\nAbove 1, the first of the two costs more.\n",
        spread(results)
    ));
    for (heading, ratios) in SECTIONS {
        text.push_str(&format!("\n{heading}:\n\n"));
        text.push_str(&table("", &heads, rows_of_ratios(results, ratios).into_iter()));
    }
    text.push_str("\nCriteria:\n\n");
    verdicts(results).iter().for_each(|line| text.push_str(&format!("- {line}\n")));
    text.push_str(CAVEATS);
    text
}

fn introduction(results: &Results) -> String {
    format!(
        "Made by `cargo bench-vm`, which overwrites this file. The figures of all runs are in
[instructions.json](instructions.json).

How many instructions a CPU executes for each request of a run: the load generator's, the kernel's,
and the server's if there is one. A guest with one emulated CPU counts one instruction as one
nanosecond (QEMU with `-icount shift=0,sleep=off`), and its backing, `null_blk`, completes each
request in the call that submits it, so the CPU is never idle and time is work. Every figure is the
median of {RUNS} runs. fio tells the time of a run in milliseconds, which is {} instructions for a
request in the first column and less than {} in the others.

| what | which |
|---|---|
| kernel | {} |
| emulator | {}, `-cpu max,-erms,-fsrm` |
| load | {}: io_uring, direct I/O, registered file, fixed buffers |
| backing | `null_blk queue_mode=2 irqmode=0 no_sched=1 bs=512 max_sectors=2048`, 1 to 4 of them; in the last column without the last option |
| ours | {}, default settings: one queue, mode fused; linear over 3 extents on 3 backings, stripe over 4 |
| rublk | {}, `add loop --zero-copy` |

Within a chunk means chunks of 64 KiB for requests of 4 KiB and of 512 KiB for those of 128 KiB.
Crossing means that every request becomes two of half its size on two backings: chunks of 4 KiB with
requests of 4 KiB that begin in the middle of one, and chunks of 64 KiB with requests of 128 KiB.

Without `max_sectors` the driver takes 127.5 KiB at most, so that requests of 128 KiB are split or cut
somewhere, as are those of clients that ask for more than a drive takes.

`null_blk` moves no data, and neither does what lies on it without a copy. The null target of ours
does: it fills what is read with zeros ([why](../adr/003-null-reads-are-filled.md)).
",
        per_request(COLUMNS[0].requests),
        COLUMNS[1..].iter().map(|column| per_request(column.requests)).max().unwrap_or(0) + 1,
        results.kernel,
        results.qemu,
        results.fio,
        results.ublk_target,
        results.rublk,
    )
}

/// What a millisecond comes to, in instructions.
fn per_request(requests: u64) -> u64 {
    INSTRUCTIONS_A_MILLISECOND / requests
}

const CAVEATS: &str = "
## What this does not prove

- How fast a drive is through any of these: there is none. Nothing is transferred, and nothing waits.
- How long an instruction takes. Cache misses, atomic operations between CPUs, mispredicted branches,
  system calls and page-table switches cost more on a processor than they count here. A copy counts
  an instruction for 8 bytes or so, which says little about its cost.
- What several CPUs do: with one, client and server take turns, and nobody is woken on another.
- That the order stays the same for other loads: these are five.
";

fn title(result: &RowResult) -> &'static str {
    row_named(result.row).map_or(result.row, |row| row.title)
}

fn figure(result: &RowResult, column: &Column) -> String {
    let cell = result.cells.iter().find(|cell| cell.column == column.name);
    cell.and_then(super::results::Cell::median).map_or_else(|| NONE.into(), group)
}

type Texts = [String; COLUMNS.len()];

fn rows_of_ratios(results: &Results, ratios: &[Ratio]) -> Vec<(&'static str, Texts)> {
    let text =
        |value: Option<f64>| value.map_or_else(|| NONE.into(), |value| format!("{value:.3}"));
    let rows = ratios.iter().map(|ratio| (ratio.title, ratio.values(results)));
    let measured = rows.filter(|(_, values)| values.iter().any(Option::is_some));
    measured.map(|(title, values)| (title, values.map(text))).collect()
}

fn spread(results: &Results) -> String {
    results.widest().map_or_else(
        || "Nothing was measured.".into(),
        |(row, column, spread)| {
            let title = row_named(row).map_or(row, |row| row.title);
            format!(
                "The runs of a cell lie at most {:.1}% apart ({title}, {column}).",
                spread * 100.0
            )
        },
    )
}

fn row(title: &str, cells: &Texts) -> String {
    let cells: String = cells.iter().map(|cell| format!("{cell:>CELL_WIDTH$}")).collect();
    format!("{title:<TITLE_WIDTH$}{cells}")
}

fn table(corner: &str, heads: &Texts, rows: impl Iterator<Item = (&'static str, Texts)>) -> String {
    let line = |title: &str, cells: &Texts| format!("| {title} | {} |\n", cells.join(" | "));
    let mut text = line(corner, heads);
    text.push_str(&format!("|---{}|\n", "|---:".repeat(heads.len())));
    rows.for_each(|(title, cells)| text.push_str(&line(title, &cells)));
    text
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or("?")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::tests::flat;
    use crate::bench::row::ROWS;

    #[test]
    fn columns_are_aligned_and_titles_fit() {
        let [first, second] = heading();
        let results = flat(&[("raw", 7249)]);
        let line = &figures(&results.rows[0])[0];
        assert_eq!([first.len(), second.len()], [line.len(); 2]);
        assert!(line.starts_with("null_blk itself ") && line.ends_with("         7,249"), "{line}");
        let titles = ROWS.iter().map(|row| row.title);
        let ratios = AMONG_OURS.iter().chain(WITH_RIVALS).map(|ratio| ratio.title);
        assert!(titles.chain(ratios).all(|title| title.len() < TITLE_WIDTH));
        assert!(COLUMNS.iter().flat_map(|c| c.title).all(|title| title.len() < CELL_WIDTH));
    }

    #[test]
    fn failures_are_told_in_both_forms() {
        let mut results = flat(&[("raw", 10), ("loop", 20)]);
        results.rows[1].cells.truncate(1);
        results.rows[1].failure = Some("no device\nmore".into());
        let lines = figures(&results.rows[1]);
        assert_eq!(lines[1], "  failed: no device");
        assert!(lines[0].ends_with(NONE));
        let text = document(&results);
        assert!(text.contains("| ours: loop | 20 | - | - | - | - |"), "{text}");
        assert!(text.contains("\nours: loop failed: no device\n"));
    }

    #[test]
    fn the_document_has_ratios_and_criteria() {
        let mut results = flat(&[("raw", 10), ("loop", 20), ("linear", 21)]);
        results.kernel = "7.2".into();
        let text = document(&results);
        assert!(
            text.contains("| linear / loop | 1.050 | 1.050 | 1.050 | 1.050 | 1.050 |"),
            "{text}"
        );
        assert!(text.contains("- linear / loop at most 1.03: not met, 1.050 in 4 KiB rand."));
        assert!(text.contains("| kernel | 7.2 |") && !text.contains("slot mode"));
        let summary = summary(&results).join("\n");
        assert!(summary.contains("Ours compared with ours:") && !summary.contains("rivals"));
        assert!(summary.contains("0.0% apart"));
    }
}
