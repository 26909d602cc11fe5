//! Results as a page: one file without scripts that needs no network and no other file. The same
//! results always make the same page.

pub mod cli;
mod cpu;
mod facts;
mod latency;
mod look;
mod plot;
mod ratios;
mod scale;
mod tables;
#[cfg(test)]
mod tests;

use look::Look;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::results::Results;
use crate::summary::Summary;
use crate::summary::caveats::caveats;
use crate::summary::check::Invalid;
use crate::summary::words::{STATISTICS, headline};

const STYLE: &str = include_str!("style.css");
/// The page loads nothing, whatever the results contain.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// The sections after the first: id and title.
const SECTIONS: [(&str, &str); 7] = [
    ("setting", "What was measured, on what"),
    ("ratios", "Ratios with their spread"),
    ("latency", "Latency"),
    ("cpu", "Processor time for each request"),
    ("figures", "All figures"),
    ("limits", "What it does not prove"),
    ("repeat", "How to repeat it"),
];

/// The page of a run.
///
/// # Errors
/// The first invalid value in the results.
pub fn html(results: &Results) -> Result<String, Invalid> {
    let summary = Summary::of(results)?;
    let title = format!("ublk-target on {}", facts::drive(results));
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="generator" content={ "ublk-bench " (results.version) };
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body { (body(&summary, &title)) }
        }
    };
    Ok(page.into_string())
}

fn body(summary: &Summary, title: &str) -> Markup {
    let results = summary.results();
    html! {
        header {
            h1 { (title) }
            p class="soft" { (facts::when(results)) }
            nav aria-label="Sections" {
                ul { @for (id, title) in SECTIONS { li { a href={ "#" (id) } { (title) } } } }
            }
        }
        main {
            @if let Some(why) = &results.incomplete {
                p class="warn" role="note" { strong { "This run is incomplete: " } (why) }
            }
            section aria-label="What this says" {
                ul class="says" { @for said in headline(summary) { li { (said) } } }
                @if let Some(gravest) = caveats(summary).first() {
                    p { (gravest) " " a href="#limits" { "More of what it does not prove" } "." }
                }
                @if let Some(table) = tables::ours(summary) { (table) }
            }
            (section(0, html! { (facts::words()) (facts::setting(summary)) }))
            (section(1, ratios_section(summary)))
            (section(2, latency_section(summary)))
            (section(3, cpu_section(summary)))
            (section(4, figures_section(summary)))
            (section(5, html! { ul { @for caveat in caveats(summary) { li { (caveat) } } } }))
            (section(6, facts::repeat(results)))
        }
    }
}

fn section(index: usize, content: Markup) -> Markup {
    let (id, title) = SECTIONS[index];
    html! {
        section aria-labelledby={ (id) "-head" } id=(id) {
            h2 id={ (id) "-head" } { (title) }
            (content)
        }
    }
}

fn ratios_section(summary: &Summary) -> Markup {
    html! {
        p {
            "How much of the raw backing's throughput is left through each device; the dashed line "
            "is all of it. Large marks are medians, bars their intervals, small dots the rounds. "
            (STATISTICS)
        }
        ul class="key" {
            @for (look, what) in Look::KEY {
                li class=(look.class()) { span class="sign" { (look.sign()) } (what) }
            }
        }
        (plots(summary, ratios::plot))
    }
}

fn latency_section(summary: &Summary) -> Markup {
    html! {
        p {
            "From the median to the slowest request of ten thousand, medians over the rounds; both "
            "axes are logarithmic. Each plot has the raw backing, the kernel's mapping, the rival "
            "with the most requests in this load, and ublk-target with and without a copy."
        }
        (plots(summary, latency::plot))
    }
}

fn cpu_section(summary: &Summary) -> Markup {
    html! {
        p {
            "The time that all processors together were busy, divided by the number of requests. "
            "The figure beside each bar is the whole."
        }
        ul class="key" {
            @for (class, what) in cpu::PARTS { li { span class=(class) {} (what) } }
        }
        (plots(summary, cpu::plot))
    }
}

fn figures_section(summary: &Summary) -> Markup {
    html! {
        p {
            "Medians over the rounds. Percentages head the columns of what that part of the "
            "requests does not exceed; CPU is processor time for each request, of the whole "
            "machine, the load generator and the server."
        }
        @for (load, _) in summary.loads() {
            div id={ "load-" (load) } { (tables::load(summary, load)) }
        }
    }
}

/// A plot for each load with figures.
fn plots(summary: &Summary, plot: fn(&Summary, usize) -> Option<Markup>) -> Markup {
    html! {
        div class="plots" {
            @for (load, described) in summary.loads() {
                @if let Some(plot) = plot(summary, load) {
                    figure {
                        figcaption {
                            (described.title)
                            a href={ "#load-" (load) } aria-label={ "Table of " (described.title) } {
                                "table"
                            }
                        }
                        (plot)
                    }
                }
            }
        }
    }
}
