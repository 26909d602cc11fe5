//! What the demonstration showed and what it does not prove, in plain words.

use super::figures::range;
use super::measure::Shares;
use super::place::Place;
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
    pub shares: Shares,
}

/// The closing words.
pub fn closing(place: Place, shown: &Shown) -> Vec<String> {
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
            "Fused mode copied nothing: the driver lent the requests' own pages, and its copy\n\
             function was not called once."
                .into(),
        );
    }
    showed.push(format!(
        "Of the raw drive's rate, fused mode reached {}, copy mode {}.",
        range(&shown.shares.fused),
        range(&shown.shares.copy)
    ));
    let mut open = vec![caveat(place).to_owned()];
    if !shown.witnessed {
        open.push("That nothing was copied: the kernel's functions could not be counted.".into());
    }
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

fn caveat(place: Place) -> &'static str {
    match place {
        Place::EmulatedGuest => {
            "How fast a real machine is: processor and drive were emulated, so only the ratios\n\
             mean something, and those roughly. An emulated processor is slow at copying,\n\
             which makes copy mode look worse than it is."
        }
        Place::VirtualizedGuest => {
            "How fast a real drive is: it was emulated, so only the ratios mean something,\n\
             and those roughly."
        }
        Place::Host => {
            "How fast other drives, loads or queues are: these were short runs on one backing,\n\
             with one queue."
        }
    }
}

/// An item of a list, of one line or more.
fn item(text: &str) -> Vec<String> {
    let lines = text.lines().enumerate();
    lines.map(|(n, line)| format!("  {} {line}", if n == 0 { "-" } else { " " })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_witnessed_is_claimed() {
        let mut shown = Shown { files: 1075, ..Shown::default() };
        shown.shares.fused = vec![0.6, 0.9];
        shown.shares.copy = vec![0.5];
        for witnessed in [false, true] {
            shown.witnessed = witnessed;
            let text = closing(Place::Host, &shown).join("\n");
            assert_eq!(text.contains("Fused mode copied nothing"), witnessed);
            assert_eq!(text.contains("could not be counted"), !witnessed);
            assert!(text.contains("1,075 files") && text.contains("60 to 90%, copy mode 50%"));
        }
    }

    #[test]
    fn emulation_is_told_and_lines_are_short() {
        for (place, word) in [
            (Place::EmulatedGuest, "processor and drive were emulated"),
            (Place::VirtualizedGuest, "only the ratios"),
            (Place::Host, "one backing"),
        ] {
            let lines = closing(place, &Shown { witnessed: true, ..Shown::default() });
            assert!(lines.iter().any(|line| line.contains(word)), "{place:?}");
            assert!(lines.iter().all(|line| line.len() <= 90), "{lines:#?}");
            assert!(lines.iter().all(|l| !l.starts_with(' ') || l.starts_with("  ")));
        }
    }
}
