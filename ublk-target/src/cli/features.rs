//! `features`: shows the features of the driver, including unknown ones.

use std::io::Write;
use std::process::ExitCode;

use serde_json::{Value, json};
use ublk_target::os::kernel;
use uring_ext::control::Control;
use uring_ext::feature::{self, Features};

use super::table::{Align, table};

/// Shows the features of the driver.
pub fn features(args: &super::Features) -> anyhow::Result<ExitCode> {
    let found = kernel::features(&Control::open()?)?;
    let release = kernel::release().unwrap_or_default();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&as_json(&release, found))?)?;
    } else {
        write!(out, "{}", as_text(&release, found))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn as_json(release: &str, found: Features) -> Value {
    let named: serde_json::Map<_, _> = feature::ALL
        .iter()
        .map(|feature| (feature.name.to_owned(), found.has(*feature).into()))
        .collect();
    json!({
        "kernel": release,
        "bits": format!("{:#x}", found.0),
        "features": named,
        "unknown": found.unknown().map(name_unknown).collect::<Vec<_>>(),
        "unknown_bits": format!("{:#x}", found.unknown_bits()),
    })
}

fn as_text(release: &str, found: Features) -> String {
    let mut rows = vec![["FEATURE", "HERE", "SINCE"].map(str::to_owned)];
    for feature in feature::ALL {
        let here = if found.has(*feature) { "yes" } else { "no" };
        rows.push([feature.name, here, feature.since].map(str::to_owned));
    }
    rows.extend(found.unknown().map(|bit| [name_unknown(bit), "yes".into(), "-".into()]));
    let mut text = format!("kernel {release}, ublk features {:#x}\n", found.0);
    text.push_str(&table(&rows, Align::Left));
    if found.unknown().next().is_some() {
        text.push_str(
            "The driver is newer than this program, which does not use what it does not know.\n",
        );
    }
    text
}

/// The name of an unknown feature.
fn name_unknown(bit: u32) -> String {
    format!("unknown (bit {bit})")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEWER: Features = Features(0x1f_ffff | 1 << 21 | 1 << 40);

    #[test]
    fn features_of_a_newer_driver_are_shown() {
        let text = as_text("8.1.0", NEWER);
        let line = |begin: &str| text.lines().find(|line| line.starts_with(begin));
        let cells = |begin| line(begin).map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(cells("IO_DESC_SIZE").unwrap(), ["IO_DESC_SIZE", "yes", "7.3"]);
        assert_eq!(cells("unknown (bit 21)").unwrap()[3..], ["yes", "-"]);
        assert_eq!(cells("unknown (bit 40)").unwrap()[3..], ["yes", "-"]);
        assert!(text.ends_with("does not use what it does not know.\n"), "{text}");
        let json = as_json("8.1.0", NEWER);
        assert_eq!(json["unknown"], json!(["unknown (bit 21)", "unknown (bit 40)"]));
        assert_eq!(json["unknown_bits"], "0x10000200000");
    }

    #[test]
    fn a_known_driver_has_nothing_unknown() {
        let text = as_text("6.12.117", Features(0x1fe));
        assert_eq!(text.lines().count(), 2 + feature::ALL.len());
        assert!(text.lines().any(|line| line.starts_with("AUTO_BUF_REG") && line.contains("no")));
        let json = as_json("6.12.117", Features(0x1fe));
        assert_eq!(json["features"]["USER_COPY"], true);
        assert_eq!(json["unknown"], json!([]));
    }
}
