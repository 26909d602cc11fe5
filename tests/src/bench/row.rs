//! What is measured: the rows of the table.

/// A device that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// What `--only` calls it.
    pub name: &'static str,
    /// What the table calls it.
    pub title: &'static str,
    /// How it is made.
    pub subject: Subject,
}

/// How a device is made, always on `null_blk`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// It is `null_blk`.
    Raw,
    /// The kernel's linear mapping.
    DmLinear,
    /// The kernel's stripes.
    DmStripe(Requests),
    /// The kernel's loop driver.
    KernelLoop,
    /// The loop target of rublk.
    RublkLoop,
    /// ublk-target without a backing.
    Null,
    /// Its loop target, in a lend mode; `None` leaves the choice to it.
    Loop(Option<&'static str>),
    /// Its loop target with layers, none of which changes a request of the loads.
    Layered(&'static [&'static str]),
    /// Its linear target.
    Linear,
    /// Its stripe target.
    Stripe(Requests),
    /// So many `null_blk` devices at once.
    RawMany(u32),
    /// So many of its loop target in one process.
    Fleet(u32),
}

/// How requests lie on the chunks of a stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requests {
    /// Each within a chunk.
    Within,
    /// Each over the border of two.
    Crossing,
}

/// The row that the others are compared with.
pub const RAW: &str = "raw";
/// Ours with one operation for each request, block for block.
pub const LOOP: &str = "loop";
/// The mode that ours has to choose by itself.
pub const DEFAULT_LEND: &str = "fused";

/// No load discards.
const FAULT: &str = "fault --rule op=discard,error=EIO";
const THROTTLE: &str = "throttle --read-iops 100000000 --write-iops 100000000";

const fn row(name: &'static str, title: &'static str, subject: Subject) -> Row {
    Row { name, title, subject }
}

/// All rows, in the order of the table.
pub const ROWS: &[Row] = &[
    row(RAW, "null_blk itself", Subject::Raw),
    row("dm-linear", "dm-linear", Subject::DmLinear),
    row("dm-stripe", "dm-stripe, within a chunk", Subject::DmStripe(Requests::Within)),
    row("dm-stripe-cross", "dm-stripe, crossing chunks", Subject::DmStripe(Requests::Crossing)),
    row("kernel-loop", "kernel loop, direct I/O", Subject::KernelLoop),
    row("rublk-loop", "rublk loop, zero copy", Subject::RublkLoop),
    row("null", "ours: null", Subject::Null),
    row(LOOP, "ours: loop", Subject::Loop(None)),
    row("linear", "ours: linear", Subject::Linear),
    row("stripe", "ours: stripe, within a chunk", Subject::Stripe(Requests::Within)),
    row("stripe-cross", "ours: stripe, crossing chunks", Subject::Stripe(Requests::Crossing)),
    row("loop-slot", "ours: loop, slot mode", Subject::Loop(Some("slot"))),
    row("loop-user-copy", "ours: loop, user-copy mode", Subject::Loop(Some("user-copy"))),
    row("loop-copy", "ours: loop, copy mode", Subject::Loop(Some("copy"))),
    row("loop-fault", "ours: loop, 1 idle fault layer", Subject::Layered(&[FAULT])),
    row("loop-fault-4", "ours: loop, 4 idle fault layers", Subject::Layered(&[FAULT; 4])),
    row("loop-throttle", "ours: loop, 1 idle throttle", Subject::Layered(&[THROTTLE])),
    row("fleet-1", "ours: loop, 1 device of `serve`", Subject::Fleet(1)),
    row("fleet-16", "ours: loop, 16 devices of `serve`", Subject::Fleet(16)),
    row("fleet-64", "ours: loop, 64 devices of `serve`", Subject::Fleet(64)),
    row("raw-16", "null_blk itself, 16 devices", Subject::RawMany(16)),
    row("raw-64", "null_blk itself, 64 devices", Subject::RawMany(64)),
];

/// Finds a row by its name.
pub fn row_named(name: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.name == name)
}

/// The rows that the user wants, all if none is named, in the order of the table.
pub fn chosen(only: &[String]) -> Vec<&'static Row> {
    let is_wanted = |row: &&Row| only.is_empty() || only.iter().any(|name| name == row.name);
    ROWS.iter().filter(is_wanted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for row in ROWS {
            assert_eq!(row_named(row.name), Some(row));
        }
        assert_eq!(row_named("ours"), None);
    }

    #[test]
    fn the_order_is_that_of_the_table() {
        assert_eq!(chosen(&[]).len(), ROWS.len());
        let names = ["loop", "raw", "loop"].map(String::from);
        assert_eq!(chosen(&names).iter().map(|row| row.name).collect::<Vec<_>>(), ["raw", "loop"]);
    }
}
