//! Columns and paragraphs within a width.

/// The maximum length of a row's name, in characters.
const MAX_NAME: usize = 32;
/// The space between columns.
const GAP: usize = 2;

/// A table with a name before each row and a head of two lines above each column. If the columns do
/// not fit the width, it is split into several tables.
#[must_use]
pub fn columns(
    names: &[String],
    heads: &[[String; 2]],
    rows: &[Vec<String>],
    width: usize,
) -> String {
    let names: Vec<String> = names.iter().map(|name| cut(name, MAX_NAME)).collect();
    let name_width = names.iter().map(|name| length(name)).max().unwrap_or(0);
    let widths: Vec<usize> = heads
        .iter()
        .enumerate()
        .map(|(column, head)| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            head.iter().chain(cells).map(|text| length(text)).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    let mut from = 0;
    while from < heads.len() {
        let to = from + fitting(&widths[from..], width.saturating_sub(name_width));
        for line in 0..2 {
            let cells = heads[from..to].iter().map(|head| head[line].as_str());
            push(&mut text, "", name_width, cells, &widths[from..to]);
        }
        for (name, row) in names.iter().zip(rows) {
            let cells = row.get(from..to).unwrap_or_default().iter().map(String::as_str);
            push(&mut text, name, name_width, cells, &widths[from..to]);
        }
        from = to;
        if from < heads.len() {
            text.push('\n');
        }
    }
    text
}

/// How many columns fit; at least one.
fn fitting(widths: &[usize], room: usize) -> usize {
    let mut taken = 0;
    let fits = widths.iter().take_while(|width| {
        taken += GAP + **width;
        taken <= room
    });
    fits.count().max(1).min(widths.len())
}

fn push<'a>(
    text: &mut String,
    name: &str,
    name_width: usize,
    cells: impl Iterator<Item = &'a str>,
    widths: &[usize],
) {
    let mut line = format!("{name:name_width$}");
    for (cell, width) in cells.zip(widths) {
        line.push_str(&format!("{:GAP$}{cell:>width$}", ""));
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

/// A text in lines of at most `width`. Lines after the first are indented, and longer words are
/// broken.
#[must_use]
pub fn wrapped(text: &str, width: usize, indent: &str) -> String {
    let width = width.max(length(indent) + 10);
    let (mut lines, mut line, mut begun) = (String::new(), String::new(), false);
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let taken = length(&line) + usize::from(begun);
            if taken + word.len() <= width {
                line.extend(begun.then_some(' '));
                line.extend(&word);
                begun = true;
                break;
            }
            if !begun {
                let rest = word.split_off(width - length(&line));
                line.extend(&word);
                word = rest;
            }
            lines.push_str(&line);
            lines.push('\n');
            (line, begun) = (indent.to_owned(), false);
        }
    }
    lines.push_str(&line);
    lines.push('\n');
    lines
}

fn length(text: &str) -> usize {
    text.chars().count()
}

/// A text cut to this many characters.
#[must_use]
pub fn cut(text: &str, most: usize) -> String {
    if length(text) <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts<const N: usize>(texts: [&str; N]) -> Vec<String> {
        texts.map(str::to_owned).to_vec()
    }

    #[test]
    fn columns_that_do_not_fit_come_below() {
        let names = texts(["raw", "a name"]);
        let heads = [["4K", "QD 1"], ["128K", "QD 32"]].map(|head| head.map(str::to_owned));
        let rows = [texts(["1.5k", "9"]), texts(["2", "-"])];
        let wide = columns(&names, &heads, &rows, 80);
        assert_eq!(
            wide,
            "          4K   128K\n        QD 1  QD 32\nraw     1.5k      9\na name     2      -\n"
        );
        let narrow = columns(&names, &heads, &rows, 15);
        assert_eq!(narrow.lines().count(), 9, "{narrow}");
        assert!(narrow.lines().all(|line| line.len() <= 13), "{narrow}");
        assert_eq!(columns(&names, &heads, &rows, 0).lines().count(), 9);
        assert_eq!(columns(&[], &[], &[], 80), "");
    }

    #[test]
    fn paragraphs_are_wrapped() {
        assert_eq!(wrapped("a bc def", 80, ""), "a bc def\n");
        assert_eq!(wrapped("- aaaa bbbb cccc dddd", 12, "  "), "- aaaa bbbb\n  cccc dddd\n");
        assert_eq!(wrapped("0123456789abcdef", 10, ""), "0123456789\nabcdef\n");
        assert_eq!(wrapped("x 0123456789abcdef", 10, ""), "x\n0123456789\nabcdef\n");
        assert_eq!(wrapped("", 10, ""), "\n");
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("abcd", 4), "abcd");
    }
}
