//! What the demonstration showed and what it does not prove, in plain words.

use super::environment::Environment;
use super::figures::{DIFFERENT, DISTURBED, Finding, Spread, Verdict, range};
use crate::numbers::count;

/// What the closing words are about.
#[derive(Debug, Default)]
pub struct Shown {
    /// Files that were copied and compared.
    pub files: u64,
    /// Blocks that were written and verified.
    pub verified: u64,
    /// The kernel's functions were counted.
    pub witnessed: bool,
    /// What was measured.
    pub speed: Vec<Finding>,
}

/// Longest line of the closing words.
const COLUMNS: usize = 90;

/// The closing words.
pub fn closing(environment: Environment, shown: &Shown) -> Vec<String> {
    let mut showed = vec![
        "A program in user space served a whole block device to the kernel.".to_owned(),
        format!(
            "The data were right: {} files equal, {} blocks verified, the file system clean.",
            count(shown.files),
            count(shown.verified)
        ),
    ];
    if shown.witnessed {
        showed.push(
            "Fused mode copied nothing: the driver lent the requests' own pages, and its copy \
             function was not called once."
                .into(),
        );
    }
    showed.extend(concluded(&shown.speed));
    let mut open = vec![caveat(environment).to_owned()];
    if !shown.witnessed {
        open.push("That nothing was copied: the kernel's functions could not be counted.".into());
    }
    open.extend(left_open(&shown.speed));
    open.push(
        "That data outlive a power cut or the death of the server: nothing was cut or killed."
            .into(),
    );
    open.push("That it holds for long: `cargo vmtest` tests far more than this.".into());
    let mut lines = vec!["What this showed".to_owned()];
    lines.extend(showed.iter().flat_map(|text| item(text)));
    lines.push("What it does not prove".to_owned());
    lines.extend(open.iter().flat_map(|text| item(text)));
    lines
}

/// The share of a mode in the raw drive's rate.
type Share = fn(&Finding) -> Spread;

/// The modes.
const MODES: [(&str, Share); 2] =
    [("fused mode", |finding| finding.fused), ("copy mode", |finding| finding.copy)];

/// What follows from the figures.
fn concluded(speed: &[Finding]) -> Vec<String> {
    let mut said = Vec::new();
    for (mode, share) in MODES {
        let firm: Vec<f64> =
            speed.iter().map(share).filter(|share| share.is_firm()).map(|it| it.median).collect();
        if let Some(medians) = Spread::of(&firm) {
            let range = range(medians.low, medians.high);
            let of = match firm.len() == speed.len() {
                true => String::new(),
                false => format!(", in {} of {} loads", firm.len(), speed.len()),
            };
            said.push(format!("Of the raw drive's rate, {mode} reached {range}{of} (medians)."));
        }
    }
    for (verdict, words) in [
        (Verdict::Faster, "Fused mode was faster than copy mode in every round of"),
        (Verdict::Slower, "Copy mode was faster than fused mode in every round of"),
        (Verdict::Alike, "Both modes were equally fast, within 5 %, in every round of"),
    ] {
        let names = named(speed, |finding| finding.verdict == verdict);
        said.extend(names.map(|names| format!("{words} {names}.")));
    }
    said
}

/// What does not follow from them, and why.
fn left_open(speed: &[Finding]) -> Vec<String> {
    let mut said = Vec::new();
    let why = |is_meant: &dyn Fn(&Finding) -> bool| {
        let disturbed = speed.iter().any(|one| is_meant(one) && one.was_disturbed());
        if disturbed { DISTURBED } else { DIFFERENT }
    };
    let is_unclear = |finding: &Finding| finding.verdict == Verdict::Unclear;
    if let Some(names) = named(speed, is_unclear) {
        let why = why(&is_unclear);
        said.push(format!("Which of fused and copy mode is faster in {names}: {why}."));
    }
    for (mode, share) in MODES {
        let is_loose = |finding: &Finding| !share(finding).is_firm();
        if let Some(names) = named(speed, is_loose) {
            let why = why(&is_loose);
            said.push(format!("What {mode} reaches of the raw drive's rate in {names}: {why}."));
        }
    }
    said
}

/// The names of the workloads that are meant; `None` if there is none.
fn named(speed: &[Finding], is_meant: impl Fn(&Finding) -> bool) -> Option<String> {
    let names: Vec<_> = speed.iter().filter(|one| is_meant(one)).map(|one| one.workload).collect();
    (!names.is_empty()).then(|| names.join("; "))
}

fn caveat(environment: Environment) -> &'static str {
    match environment {
        Environment::EmulatedGuest => {
            "How fast a real machine is: processor and drive were emulated, so only the ratios \
             mean something, and those roughly. An emulated processor is slow at copying, \
             which makes copy mode look worse than it is."
        }
        Environment::VirtualizedGuest => {
            "How fast a real drive is: it was emulated, so only the ratios mean something, \
             and those roughly."
        }
        Environment::Host => {
            "How fast other drives, loads or queues are: these were short runs on one backing, \
             with one queue."
        }
    }
}

/// An item of a list, of as many lines as it needs.
fn item(text: &str) -> Vec<String> {
    let mut lines = vec![String::from("  -")];
    for word in text.split_whitespace() {
        let last = lines.last().map_or(0, |line| line.len());
        if last + 1 + word.len() > COLUMNS {
            lines.push("   ".to_owned());
        }
        if let Some(line) = lines.last_mut() {
            line.push(' ');
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::figures::Rates;
    use super::*;

    fn finding(workload: &'static str, raw: &[f64], fused: &[f64], copy: &[f64]) -> Finding {
        let rates = Rates { raw: raw.to_vec(), fused: fused.to_vec(), copy: copy.to_vec() };
        Finding::of(workload, 4096.0, &rates).unwrap()
    }

    /// One line of what was said, without breaks.
    fn text(shown: &Shown) -> String {
        let lines = closing(Environment::Host, shown);
        lines.iter().flat_map(|line| line.split_whitespace()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn only_what_was_witnessed_is_claimed() {
        let mut shown = Shown { files: 1075, ..Shown::default() };
        for witnessed in [false, true] {
            shown.witnessed = witnessed;
            let text = text(&shown);
            assert_eq!(text.contains("Fused mode copied nothing"), witnessed);
            assert_eq!(text.contains("could not be counted"), !witnessed);
            assert!(text.contains("1,075 files") && !text.contains("rate"), "{text}");
        }
    }

    #[test]
    fn clear_figures_are_concluded_from() {
        let speed = vec![
            finding("random", &[100.0, 50.0], &[60.0, 31.0], &[50.0, 25.0]),
            finding("sequential", &[100.0, 90.0], &[90.0, 81.0], &[10.0, 9.0]),
            finding("mixed", &[100.0, 90.0], &[70.0, 63.0], &[70.0, 64.0]),
        ];
        let text = text(&Shown { speed, ..Shown::default() });
        for said in [
            "Of the raw drive's rate, fused mode reached 61 to 90% (medians).",
            "Of the raw drive's rate, copy mode reached 10 to 71% (medians).",
            "Fused mode was faster than copy mode in every round of random; sequential.",
            "Both modes were equally fast, within 5 %, in every round of mixed.",
        ] {
            assert!(text.contains(said), "{text}");
        }
        assert!(!text.contains("Which of") && !text.contains("What fused mode"), "{text}");
    }

    #[test]
    fn nothing_is_concluded_from_rounds_that_differ() {
        let speed = vec![
            finding("random", &[100.0, 40.0], &[40.0, 35.0], &[70.0, 28.0]),
            finding("sequential", &[100.0, 90.0], &[50.0, 45.0], &[55.0, 50.0]),
        ];
        let text = text(&Shown { speed, ..Shown::default() });
        for said in [
            "fused mode reached 50%, in 1 of 2 loads (medians).",
            "copy mode reached 55 to 70% (medians).",
            "Copy mode was faster than fused mode in every round of sequential.",
            "Which of fused and copy mode is faster in random: another load is on this machine.",
            "What fused mode reaches of the raw drive's rate in random: another load is on this",
        ] {
            assert!(text.contains(said), "{text}");
        }
        assert!(!text.contains("Fused mode was faster") && !text.contains("What copy mode"));
    }

    #[test]
    fn emulation_is_told_and_lines_are_short() {
        let long = "128 KiB sequential read, QD8";
        let speed = vec![finding(long, &[1.0, 9.0], &[1.0, 1.0], &[1.0, 2.0]); 3];
        for (environment, word) in [
            (Environment::EmulatedGuest, "processor and drive were emulated"),
            (Environment::VirtualizedGuest, "only the ratios"),
            (Environment::Host, "one backing"),
        ] {
            let shown = Shown { witnessed: true, speed: speed.clone(), ..Shown::default() };
            let lines = closing(environment, &shown);
            assert!(lines.iter().any(|line| line.contains(word)), "{environment:?}");
            assert!(lines.iter().all(|line| line.len() <= COLUMNS), "{lines:#?}");
            assert!(lines.iter().all(|l| !l.starts_with(' ') || l.starts_with("  ")));
        }
    }
}
