//! Tables of text.

use ublk_target::os::text::printable;

/// Alignment of the cells of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// All left-aligned.
    Left,
    /// This number of columns left-aligned, the others (numbers) right-aligned.
    RightAfter(usize),
}

/// Rows as aligned columns, without control characters of names from others.
pub fn table<const N: usize>(rows: &[[String; N]], align: Align) -> String {
    let rows = rows.iter().map(|row| row.each_ref().map(|cell| printable(cell)));
    let rows: &[[String; N]] = &rows.collect::<Vec<_>>();
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let left = match align {
        Align::Left => N,
        Align::RightAfter(columns) => columns,
    };
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
            if column < left { format!("{cell:width$}") } else { format!("{cell:>width$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["ID", "NAME"].map(str::to_owned), ["10", "x"].map(str::to_owned)];
        assert_eq!(table(&rows, Align::Left), "ID  NAME\n10  x\n");
        assert_eq!(table(&rows, Align::RightAfter(1)), "ID  NAME\n10     x\n");
    }
}
