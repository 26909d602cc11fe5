//! The appearance of devices in plots. The shapes of marks and the dashes of lines distinguish
//! devices; colours are redundant.

use maud::{Markup, html};

use super::plot::n;
use crate::results::{Family, Subject};
use crate::summary::roles::Role;

/// The appearance of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Look {
    /// The backing itself.
    Raw,
    /// A mapping within the kernel.
    Floor,
    /// The kernel's loop driver.
    KernelLoop,
    /// rublk.
    Rublk,
    /// ublk-target without a copy.
    Ours,
    /// ublk-target in a mode that copies.
    OursCopying,
}

impl Look {
    /// All except the backing's, with descriptions.
    pub const KEY: [(Self, &'static str); 5] = [
        (Self::Floor, "mapping in the kernel (device mapper): no server can reach it"),
        (Self::KernelLoop, "the kernel's loop driver"),
        (Self::Rublk, "rublk"),
        (Self::Ours, "ublk-target, zero copy"),
        (Self::OursCopying, "ublk-target, copying"),
    ];

    /// The appearance of a device.
    #[must_use]
    pub fn of(subject: &Subject) -> Self {
        match (Role::of(subject), subject.family) {
            (Role::Raw, _) => Self::Raw,
            (Role::Floor, _) => Self::Floor,
            (Role::Rival, Family::Rublk) => Self::Rublk,
            (Role::Rival, Family::Raw | Family::Kernel | Family::Ours) => Self::KernelLoop,
            (Role::Ours, _) => Self::Ours,
            (Role::OursCopying, _) => Self::OursCopying,
        }
    }

    /// Its class in the style sheet.
    #[must_use]
    pub const fn class(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Floor => "floor",
            Self::KernelLoop => "loop",
            Self::Rublk => "rublk",
            Self::Ours => "ours",
            Self::OursCopying => "copying",
        }
    }

    /// The shape of its marks, as a character.
    #[must_use]
    pub const fn sign(self) -> &'static str {
        match self {
            Self::Raw => "✕",
            Self::Floor => "▲",
            Self::KernelLoop => "■",
            Self::Rublk => "◆",
            Self::Ours => "●",
            Self::OursCopying => "○",
        }
    }

    /// A mark centred at (`x`, `y`), as wide as a circle of radius `r`.
    #[must_use]
    pub fn mark(self, class: &str, x: f64, y: f64, r: f64) -> Markup {
        // The corners, in units of the radius.
        let shape = |corners: &[(f64, f64)]| {
            let corners = corners.iter();
            let corners = corners.map(|(dx, dy)| format!("{},{}", n(x + dx * r), n(y + dy * r)));
            let points = corners.collect::<Vec<_>>().join(" ");
            html! { polygon class=(class) points=(points) {} }
        };
        let circle = |class: &str| {
            html! { circle class=(class) cx=(n(x)) cy=(n(y)) r=(n(r)) {} }
        };
        match self {
            Self::Raw => shape(&[
                (-1.0, -0.6),
                (-0.6, -1.0),
                (0.0, -0.4),
                (0.6, -1.0),
                (1.0, -0.6),
                (0.4, 0.0),
                (1.0, 0.6),
                (0.6, 1.0),
                (0.0, 0.4),
                (-0.6, 1.0),
                (-1.0, 0.6),
                (-0.4, 0.0),
            ]),
            Self::Floor => shape(&[(0.0, -1.1), (1.1, 0.9), (-1.1, 0.9)]),
            Self::KernelLoop => shape(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
            Self::Rublk => shape(&[(0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)]),
            Self::Ours => circle(class),
            Self::OursCopying => circle(&format!("{class} hollow")),
        }
    }
}
