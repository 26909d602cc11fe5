//! `interpose`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use ublk_engine::target::Rates;
use ublk_target::config::{LayerConfig, LayerEdit, LayerKind};
use ublk_target::device::description::{self, Description};
use ublk_target::device::paths::{RUN_DIR, block_path};
use ublk_target::device::state_file::StateFile;
use ublk_target::socket::client::Client;
use uring_ext::control::Control;

use super::Interpose;
use super::arguments::ToEnd;
use super::table::{Align, table};
use super::terminal::print_line;

/// Attaches or detaches a layer, or shows the layers.
pub fn interpose(command: &Interpose) -> anyhow::Result<ExitCode> {
    match command {
        Interpose::Attach { which, name, inside, wait, layer } => {
            let (name, inside, kind) = (name.clone(), inside.clone(), layer.kind());
            let edit = LayerEdit::Attach { name, kind, inside };
            change(which.id, edit, *wait, "attached")
        }
        Interpose::Detach { which, name, wait } => {
            let edit = LayerEdit::Detach { name: name.clone() };
            change(which.id, edit, *wait, "detached")
        }
        Interpose::List { which, json } => list(which.id(), *json),
    }
}

fn change(id: u32, edit: LayerEdit, how: ToEnd, done: &str) -> anyhow::Result<ExitCode> {
    let changed = Client::connect(id)?.change_layers(edit, how.timeout)?;
    if how.json {
        print_line(serde_json::to_string(&changed)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let name = changed.name.map_or_else(String::new, |name| name.to_string());
    let pause = Duration::from_micros(changed.pause_us);
    let device = block_path(id);
    print_line(format_args!("{}: {name} {done} (pause {pause:.1?})", device.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Shows what the server of a device has recorded.
fn list(id: u32, json: bool) -> anyhow::Result<ExitCode> {
    let described = Description::of(&Control::open()?, id);
    if described.as_ref().is_err_and(description::is_missing) {
        anyhow::bail!("there is no ublk device {id}");
    }
    described?;
    let layers = StateFile::read(Path::new(RUN_DIR), id)?.config.layers;
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&layers)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![["NAME", "KIND", "OPTIONS"].map(str::to_owned)];
    rows.extend(layers.iter().map(row));
    write!(out, "{}", table(&rows, Align::Left))?;
    Ok(ExitCode::SUCCESS)
}

fn row(layer: &LayerConfig) -> [String; 3] {
    [layer.name.to_string(), layer.kind.name().to_owned(), options(&layer.kind)]
}

/// The options of a layer, as `interpose attach` takes them.
pub fn options(kind: &LayerKind) -> String {
    let options: Vec<String> = match kind {
        LayerKind::Fault { rules, seed } => {
            let rules = rules.iter().map(|rule| format!("--rule {rule}"));
            rules.chain([format!("--seed {seed}")]).collect()
        }
        LayerKind::Throttle(Rates { read, write, burst }) => {
            let rates = [
                ("--read-iops", read.iops),
                ("--read-bps", read.bps),
                ("--write-iops", write.iops),
                ("--write-bps", write.bps),
            ];
            let rates =
                rates.into_iter().filter_map(|(name, rate)| Some(format!("{name} {}", rate?)));
            rates.chain([format!("--burst {burst}")]).collect()
        }
    };
    options.join(" ")
}
