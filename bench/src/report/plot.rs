//! Common parts of plots: SVG with the page's colours, for light and dark mode.

use maud::{Markup, html};

use super::scale::Linear;
use crate::summary::check::clean;
use crate::table::columns::cut;

/// The width of all plots, in SVG units. The page scales them.
pub const WIDTH: f64 = 464.0;
/// The x coordinate where the names of rows end.
pub const LEFT: f64 = 182.0;
/// The x coordinate where the plot ends and the figures beside it begin.
pub const RIGHT: f64 = 400.0;
/// The height of a row.
pub const ROW: f64 = 21.0;
/// The maximum length of a row's name, in characters.
const NAME: usize = 27;

/// A coordinate or length as text.
#[must_use]
pub fn n(figure: f64) -> String {
    format!("{figure:.1}")
}

/// A plot with a text description, for screen readers.
#[must_use]
pub fn svg(id: &str, height: f64, title: &str, description: &str, content: Markup) -> Markup {
    html! {
        svg viewBox={ "0 0 " (n(WIDTH)) " " (n(height)) } role="img"
            aria-labelledby={ (id) "-title " (id) "-text" }
        {
            title id={ (id) "-title" } { (title) }
            desc id={ (id) "-text" } { (description) }
            (content)
        }
    }
}

/// The name of a row, at its left.
#[must_use]
pub fn name(text: &str, y: f64) -> Markup {
    html! {
        text class="name" x=(n(LEFT - 8.0)) y=(n(y + 4.0)) text-anchor="end" {
            title { (clean(text)) }
            (cut(&clean(text), NAME))
        }
    }
}

/// A figure at the right of a row.
#[must_use]
pub fn figure(text: &str, y: f64) -> Markup {
    html! { text class="figure" x=(n(RIGHT + 6.0)) y=(n(y + 4.0)) { (text) } }
}

/// The marks of a horizontal scale: vertical lines with labels below.
#[must_use]
pub fn marks(scale: &Linear, top: f64, bottom: f64, show: impl Fn(f64) -> String) -> Markup {
    html! {
        @for mark in &scale.marks {
            line class="grid" x1=(n(scale.at(*mark))) x2=(n(scale.at(*mark)))
                y1=(n(top)) y2=(n(bottom)) {}
            text class="mark" x=(n(scale.at(*mark))) y=(n(bottom + 14.0)) text-anchor="middle" {
                (show(*mark))
            }
        }
    }
}

/// The label of the horizontal axis.
#[must_use]
pub fn axis(text: &str, y: f64) -> Markup {
    html! {
        text class="mark" x=(n(f64::midpoint(LEFT, RIGHT))) y=(n(y)) text-anchor="middle" { (text) }
    }
}
