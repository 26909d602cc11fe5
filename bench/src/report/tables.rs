//! Tables of figures.

use maud::{Markup, html};

use super::look::Look;
use crate::summary::figure::{NONE, bandwidth, rate, time, with_interval};
use crate::summary::words::zero_copy_factors;
use crate::summary::{Cell, Summary};

/// Heads of columns that hold words.
const TEXTS: [&str; 2] = ["best rival", "made by"];

/// A table that scrolls if it is wider than the page.
#[must_use]
pub fn wide(caption: &str, head: &[&str], rows: Markup) -> Markup {
    html! {
        div class="wide" tabindex="0" role="region" aria-label=(caption) {
            table {
                caption { (caption) }
                thead {
                    tr {
                        @for title in head {
                            th scope="col" class=[TEXTS.contains(title).then_some("text")] { (title) }
                        }
                    }
                }
                tbody { (rows) }
            }
        }
    }
}

/// All figures of a load.
#[must_use]
pub fn load(summary: &Summary, load: usize) -> Markup {
    let head = [
        "device",
        "requests/s",
        "bandwidth",
        "of raw",
        "mean",
        "50 %",
        "99 %",
        "99.9 %",
        "99.99 %",
        "CPU",
        "client",
        "server",
        "rounds",
    ];
    let rows = html! {
        @for (subject, described) in summary.measured() {
            @if let Some(cell) = summary.cell(subject, load) {
                tr class=(Look::of(described).class()) {
                    th scope="row" { (described.title) }
                    (cells(summary, subject, load, cell))
                }
            }
        }
    };
    wide(&summary.results().loads[load].title, &head, rows)
}

fn cells(summary: &Summary, subject: usize, load: usize, cell: &Cell) -> Markup {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| NONE.to_owned());
    let of_raw = summary.of_raw(subject, load).map(|ratio| with_interval(&ratio));
    let percentiles = [50.0, 99.0, 99.9, 99.99].map(|each| cell.percentile_ns(each).map(time));
    let us = |us: f64| time(us * 1000.0);
    html! {
        td { (rate(cell.iops.median)) }
        td { (bandwidth(cell.bytes_per_s.median)) }
        td { (or_none(of_raw)) }
        td { (time(cell.mean_ns.median)) }
        @for percentile in percentiles { td { (or_none(percentile)) } }
        td { (us(cell.cpu.machine_us)) }
        td { (us(cell.cpu.client_us)) }
        td { (or_none(cell.cpu.server_us.map(us))) }
        td { (cell.samples.len()) }
    }
}

/// Ours compared with the limit and the best rival, with a row for each load; `None` without ours.
#[must_use]
pub fn ours(summary: &Summary) -> Option<Markup> {
    let ours = summary.ours()?;
    let subjects = &summary.results().subjects;
    let zero_copy = zero_copy_factors(summary);
    let estimate = |estimate| match estimate {
        Some(estimate) => with_interval(&estimate),
        None => NONE.to_owned(),
    };
    let rows = html! {
        @for (load, described) in summary.loads() {
            @let rival = summary.best_rival(load);
            @let factor = zero_copy.iter().find(|(at, _)| *at == load).map(|(_, factor)| *factor);
            tr {
                th scope="row" { (described.title) }
                td { (estimate(summary.of_raw(ours, load))) }
                td { (estimate(rival.and_then(|rival| summary.ratio(ours, rival, load)))) }
                td class="text" { (rival.map_or(NONE, |rival| subjects[rival].title.as_str())) }
                td { (estimate(factor)) }
            }
        }
        @if let Some(against) = summary.against_rivals() {
            tr class="sum" {
                th scope="row" { "geometric mean over " (against.loads) " loads" }
                td {}
                td { (with_interval(&against.mean)) }
                td class="text" { "the best of each" }
                td {}
            }
        }
    };
    let caption = format!("Requests a second of ublk-target ({}), as ratios", subjects[ours].title);
    let head = ["load", "/ raw backing", "/ best rival", "best rival", "zero copy / copy"];
    Some(html! {
        (wide(&caption, &head, rows))
        p class="soft" {
            "Medians of ratios formed within rounds, with their intervals. The best rival of a load is "
            "the one with the most requests in it by the medians; the geometric mean is formed within "
            "rounds too."
        }
    })
}

/// The devices, the commands that made them, and why some were not measured.
#[must_use]
pub fn subjects(summary: &Summary) -> Markup {
    let rows = html! {
        @for subject in &summary.results().subjects {
            tr class=(Look::of(subject).class()) {
                th scope="row" { (subject.title) }
                td class="text" {
                    @if subject.command.is_empty() { "as it is" } @else { code { (subject.command) } }
                    @if let Some(version) = &subject.version { " (" (version) ")" }
                    @if let Some(why) = &subject.skipped { br; strong { "not measured: " } (why) }
                }
            }
        }
    };
    wide("Devices", &["device", "made by"], rows)
}
