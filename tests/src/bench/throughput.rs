//! Throughput side by side: `ublk-bench run` on an emulated drive, in the ordinary guest.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::host::{read_file, run, run_and_tell, state_of};
use crate::config::VmConfig;
use crate::image::Image;
use crate::ui;
use crate::vm::Vm;

/// The program, of the package of the same name.
const PROGRAM: &str = "ublk-bench";
/// The drive of the guest.
const BACKING: &str = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_drive0";
/// Where the guest's program puts its results, and under which name.
const RESULTS: &str = "/tmp/throughput";
/// Wall time that the measurement may take.
const TIMEOUT: Duration = Duration::from_secs(90 * 60);
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// What came of it.
pub struct Throughput {
    /// The results.
    pub json: String,
    /// The page that shows them.
    pub html: String,
}

/// Measures, and prints the tables; `rounds` are fewer than usual where they are given.
///
/// # Errors
/// When the guest does not come up, the measurement fails, or something stays behind.
pub fn measure(image: &Image, payload: &Path, rounds: Option<u32>) -> Result<Throughput> {
    ui::step("booting the guest");
    let config = VmConfig { poll_queues: 2, ..VmConfig::default() }.drives(1);
    let mut vm = Vm::boot(&config, image, payload)?;
    run(&mut vm, &["modprobe", "-a", "ublk_drv", "dm_mod", "loop"], READ_TIMEOUT, |_| Ok(()))?;
    vm.take_baseline()?;
    let rounds = rounds.map(|rounds| rounds.to_string());
    let mut argv = vec![PROGRAM, "run", "--backing", BACKING, "--yes", "--profile", "vm"];
    argv.extend(["--output", RESULTS]);
    argv.extend(rounds.as_deref().map(|rounds| ["--rounds", rounds]).into_iter().flatten());
    let mut tables = Vec::new();
    let keep = |line: &str| {
        tables.push(line.to_owned());
        Ok(())
    };
    run_and_tell(&mut vm, &argv, TIMEOUT, keep, ui::step)?;
    tables.iter().for_each(|line| ui::out(line));
    let [json, html] = ["json", "html"].map(|extension| read(&mut vm, extension));
    let (json, html) = (json?, html?);
    let trouble = state_of(&mut vm)?.trouble;
    ensure!(trouble.is_none(), "{}", trouble.unwrap_or_default());
    vm.power_off()?;
    ensure_whole(&json)?;
    ensure!(html.trim_end().ends_with("</html>"), "the page is cut off");
    Ok(Throughput { json, html })
}

fn read(vm: &mut Vm, extension: &str) -> Result<String> {
    let path = format!("{RESULTS}.{extension}");
    read_file(vm, &path, READ_TIMEOUT).context("read the results")
}

/// Fails unless every subject that could be measured was, in every round and with every load.
fn ensure_whole(json: &str) -> Result<()> {
    let results: serde_json::Value = serde_json::from_str(json).context("the results")?;
    let list = |name: &str| results[name].as_array().with_context(|| format!("no {name}"));
    let measured = list("subjects")?.iter().filter(|subject| subject["skipped"].is_null()).count();
    let rounds = usize::try_from(results["method"]["rounds"].as_u64().context("no rounds")?)?;
    let expected = measured * rounds * list("loads")?.len();
    let samples = list("samples")?.len();
    ensure!(measured > 1, "nothing but the drive was measured");
    ensure!(samples == expected, "{samples} samples instead of {expected}");
    ensure!(results["incomplete"].is_null(), "it is incomplete: {}", results["incomplete"]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_that_lack_something_are_refused() {
        let whole = r#"{"subjects": [{"skipped": null}, {"skipped": "no"}, {"skipped": null}],
            "loads": [1], "method": {"rounds": 2}, "samples": [1, 2, 3, 4], "incomplete": null}"#;
        ensure_whole(whole).unwrap();
        for (from, to, why) in [
            ("[1, 2, 3, 4]", "[1, 2, 3]", "3 samples instead of 4"),
            ("\"incomplete\": null", "\"incomplete\": \"interrupted\"", "interrupted"),
            ("\"skipped\": null", "\"skipped\": \"no\"", "nothing but the drive"),
            ("\"loads\"", "\"cargo\"", "no loads"),
        ] {
            let error = ensure_whole(&whole.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
