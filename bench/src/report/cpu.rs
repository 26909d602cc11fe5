//! CPU time for each request: a bar with the parts of client, server and the rest.

use maud::{Markup, html};

use super::plot::{LEFT, RIGHT, ROW, axis, figure, marks, n, name, svg};
use super::scale::Linear;
use crate::summary::estimate::number;
use crate::summary::figure::time;
use crate::summary::{CpuSplit, Summary};

/// The parts of a bar: class and description.
pub const PARTS: [(&str, &str); 3] = [
    ("client", "load generator"),
    ("server", "server"),
    ("rest", "rest of the machine: interrupts, kernel threads"),
];

/// The plot of a load; `None` if nothing was measured.
#[must_use]
pub fn plot(summary: &Summary, load: usize) -> Option<Markup> {
    let rows: Vec<(String, CpuSplit)> = summary
        .measured()
        .filter_map(|(subject, described)| {
            Some((described.title.clone(), summary.cell(subject, load)?.cpu))
        })
        .collect();
    let greatest = rows.iter().map(|(_, split)| end(split)).reduce(f64::max)?;
    let scale = Linear::new(greatest, LEFT, RIGHT);
    let top = 6.0;
    let bottom = top + ROW * number(rows.len());
    let title = format!("Processor time for each request, {}", summary.results().loads[load].title);
    let content = html! {
        (marks(&scale, top, bottom, mark_text))
        @for (index, (title, split)) in rows.iter().enumerate() {
            (bar(title, split, &scale, top + ROW * (number(index) + 0.5)))
        }
        (axis("µs of processor time for each request", bottom + 30.0))
    };
    Some(svg(&format!("cpu-{load}"), bottom + 36.0, &title, &description(&rows), content))
}

/// The end of a bar. The sum of its parts may exceed the machine's time, since they are measured in
/// different ways.
fn end(split: &CpuSplit) -> f64 {
    split.machine_us.max(split.client_us + split.server_us.unwrap_or(0.0))
}

fn parts(split: &CpuSplit) -> [f64; 3] {
    [split.client_us, split.server_us.unwrap_or(0.0), split.rest_us()]
}

fn bar(title: &str, split: &CpuSplit, scale: &Linear, y: f64) -> Markup {
    let mut from = 0.0;
    html! {
        (name(title, y))
        @for ((class, _), part) in PARTS.into_iter().zip(parts(split)) {
            @let (x, to) = (scale.at(from), scale.at(from + part));
            rect class=(class) x=(n(x)) y=(n(y - 6.5)) width=(n(to - x)) height="13" {}
            ({ from += part; "" })
        }
        (figure(&time(split.machine_us * 1000.0), y))
    }
}

fn mark_text(us: f64) -> String {
    if us.fract() == 0.0 || us >= 10.0 { format!("{us:.0}") } else { format!("{us:.1}") }
}

fn description(rows: &[(String, CpuSplit)]) -> String {
    let rows = rows.iter().map(|(title, split)| {
        let [client, server, rest] = parts(split).map(|us| time(us * 1000.0));
        format!("{title}: client {client}, server {server}, rest {rest}")
    });
    rows.collect::<Vec<_>>().join(". ")
}
