//! Ratios to the raw backing with their spread: a row for each device, a plot for each load.

use maud::{Markup, html};

use super::look::Look;
use super::plot::{LEFT, RIGHT, ROW, axis, figure, marks, n, name, svg};
use super::scale::Linear;
use crate::summary::Summary;
use crate::summary::estimate::{Estimate, number};
use crate::summary::figure::{ratio, with_interval};

struct Row {
    title: String,
    look: Look,
    estimate: Estimate,
    rounds: Vec<f64>,
}

/// The plot of a load; `None` if there is nothing to compare.
#[must_use]
pub fn plot(summary: &Summary, load: usize) -> Option<Markup> {
    let rows = rows(summary, load)?;
    if rows.is_empty() {
        return None;
    }
    let greatest = rows.iter().flat_map(|row| row.rounds.iter().copied()).fold(1.0, f64::max);
    let scale = Linear::new(greatest, LEFT, RIGHT);
    let top = 6.0;
    let bottom = top + ROW * number(rows.len());
    let title =
        format!("Ratio to the raw backing's throughput, {}", summary.results().loads[load].title);
    let content = html! {
        (marks(&scale, top, bottom, |mark| format!("{mark:.1}")))
        line class="limit" x1=(n(scale.at(1.0))) x2=(n(scale.at(1.0))) y1=(n(top)) y2=(n(bottom)) {}
        @for (index, row) in rows.iter().enumerate() {
            (row_of(row, &scale, top + ROW * (number(index) + 0.5)))
        }
        (axis("throughput / raw backing's", bottom + 30.0))
    };
    Some(svg(&format!("ratio-{load}"), bottom + 36.0, &title, &description(&rows), content))
}

fn rows(summary: &Summary, load: usize) -> Option<Vec<Row>> {
    let raw = summary.raw()?;
    let rows = summary.measured().filter(|(subject, _)| *subject != raw);
    let rows = rows.filter_map(|(subject, described)| {
        let rounds = summary.ratios(subject, raw, load)?;
        let rounds: Vec<f64> = rounds.into_iter().map(|(_, ratio)| ratio).collect();
        let (title, look) = (described.title.clone(), Look::of(described));
        Some(Row { title, look, estimate: Estimate::of(&rounds)?, rounds })
    });
    Some(rows.collect())
}

fn row_of(row: &Row, scale: &Linear, y: f64) -> Markup {
    let Estimate { median, low, high, .. } = row.estimate;
    html! {
        g class=(row.look.class()) {
            (name(&row.title, y))
            @for round in &row.rounds {
                circle class="round" cx=(n(scale.at(*round))) cy=(n(y)) r="2.2" {}
            }
            line class="interval" x1=(n(scale.at(low))) x2=(n(scale.at(high))) y1=(n(y)) y2=(n(y)) {}
            (row.look.mark("median", scale.at(median), y, 4.5))
            (figure(&ratio(median), y))
        }
    }
}

fn description(rows: &[Row]) -> String {
    let rows = rows.iter().map(|row| format!("{} {}", row.title, with_interval(&row.estimate)));
    format!("Median with interval: {}.", rows.collect::<Vec<_>>().join("; "))
}
