//! Untrusted results lead to an error or a page, and never to a panic.

use std::path::Path;

use proptest::prelude::*;

use crate::compare::{self, Options, compare};
use crate::results::Results;
use crate::summary::check::parse;
use crate::{report, sample, table};

/// Replacements for numbers and texts.
const PIECES: [&str; 16] = [
    "0",
    "-1",
    "1",
    "0.5",
    "1e15",
    "1e-300",
    "1e308",
    "1e999",
    "4294967295",
    "18446744073709551615",
    "null",
    "\"\"",
    "\"raw\"",
    "\"<script>\\u0000\\u001b[31m\\n&'\\\"\"",
    "[]",
    "{}",
];

/// A small run as JSON.
fn small() -> String {
    let mut results = sample::results(1, 2);
    results.loads.truncate(2);
    let names: Vec<String> = results.loads.iter().map(|load| load.name.clone()).collect();
    results.samples.retain(|sample| names.contains(&sample.load));
    serde_json::to_string(&results).unwrap()
}

/// The ranges of the numbers and texts in a JSON text.
fn values(text: &str) -> Vec<(usize, usize)> {
    let ends = |from: usize| text[from..].find([',', '}', ']']).map(|length| from + length);
    let after_colon = text.match_indices(':').map(|(at, _)| at + 1);
    let plain = after_colon.filter(|from| !text[*from..].starts_with(['{', '[']));
    plain.filter_map(|from| Some((from, ends(from)?))).collect()
}

fn show(results: &Results) {
    let page = report::html(results).unwrap();
    assert!(!page.contains("<script") && !page.contains("NaN"), "{page}");
    let text = table::text(results, 80).unwrap();
    assert!(!text.contains("NaN") && !text.contains('\u{1b}'), "{text}");
    let options = Options { absolute: false, threshold: 0.01 };
    let whole = sample::results(2, 2);
    for (before, after) in [(results, &whole), (&whole, results)] {
        let compared = compare(before, after, options).unwrap();
        let text = compare::show::text(&compared, before, 80);
        assert!(!text.contains("NaN") && !text.contains('\u{1b}'), "{text}");
    }
}

#[test]
fn a_run_that_is_not_changed_is_shown() {
    let text = small();
    assert!(values(&text).len() > 300, "{}", values(&text).len());
    show(&parse(Path::new("x"), text.as_bytes()).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn changed_values_make_a_line_or_a_page(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0..PIECES.len()), 1..4),
    ) {
        let mut text = small();
        for (place, piece) in changes {
            let places = values(&text);
            let (from, to) = places[place.index(places.len())];
            text.replace_range(from..to, PIECES[piece]);
        }
        match parse(Path::new("x"), text.as_bytes()) {
            Ok(results) => show(&results),
            Err(error) => {
                let said = error.to_string();
                prop_assert!(!said.contains(char::is_control) && said.len() < 2000, "{said:?}");
            }
        }
    }
}
