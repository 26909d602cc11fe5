//! The file of `serve`: TOML. Its devices are parsed as arguments of `add`, so that both have the
//! same names and rules.

mod layers;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::Parser;
use clap::error::{ContextKind, ContextValue};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};
use ublk_target::config::DeviceConfig;
use ublk_target::control::fleet::FleetConfig;
use ublk_target::os::own_files;

use crate::cli::{Cli, Command, add, one_line};

use self::layers::SHORT_FORM;

/// The longest file, in bytes.
const MAX_BYTES: u64 = 1 << 20;
const TARGETS: [&str; 4] = ["null", "loop", "linear", "stripe"];
/// Options of `add` that concern its process, with the reason why a file cannot have them.
const NOT_HERE: [(&str, &str); 5] = [
    ("supervise", "the service manager starts `serve` again, which takes devices over"),
    ("or-recover", "`serve` always takes over what waits for a server"),
    ("foreground", "`serve` is always in the foreground"),
    ("json", "nothing is printed for a single device"),
    ("role", "it is not for users"),
];
/// Options of all commands, and hidden ones.
const NOT_OPTIONS: [&str; 7] =
    ["help", "version", "verbose", "supervisor", "next", "nonce", "program"];

/// Reads the file: the devices, or a line for each error.
pub fn read(path: &Path) -> Result<FleetConfig, Vec<String>> {
    let text = own_files::regular(path, 0).and_then(|file| own_files::read_whole(&file, MAX_BYTES));
    match text {
        Ok(text) => parse(&text, path),
        Err(error) => Err(vec![format!("{}: {error}", path.display())]),
    }
}

/// Parses the text. Relative paths begin at the directory of the file.
fn parse(text: &str, path: &Path) -> Result<FleetConfig, Vec<String>> {
    let (document, errors) = DeTable::parse_recoverable(text);
    let mut file = Reading { text, path, faults: Vec::new() };
    for error in errors {
        file.fault(error.span().unwrap_or_default(), error.message());
    }
    if !file.faults.is_empty() {
        return Err(file.told());
    }
    let config = file.fleet(document.get_ref());
    if file.faults.is_empty() { Ok(config) } else { Err(file.told()) }
}

/// A file that is being read.
struct Reading<'a> {
    text: &'a str,
    path: &'a Path,
    /// The errors with their line numbers.
    faults: Vec<(usize, String)>,
}

/// An option of a device.
struct Setting {
    key: String,
    span: Range<usize>,
    arguments: Vec<String>,
}

impl Reading<'_> {
    fn line(&self, at: usize) -> usize {
        let before = self.text.as_bytes().iter().take(at);
        1 + before.filter(|byte| **byte == b'\n').count()
    }

    fn fault(&mut self, span: Range<usize>, what: impl std::fmt::Display) {
        self.faults.push((self.line(span.start), what.to_string()));
    }

    /// The errors in the order of their lines.
    fn told(mut self) -> Vec<String> {
        self.faults.sort();
        let path = self.path.display();
        self.faults.iter().map(|(line, what)| format!("{path}:{line}: {what}")).collect()
    }

    fn fleet(&mut self, document: &DeTable<'_>) -> FleetConfig {
        let mut config = FleetConfig::default();
        let mut devices = Vec::new();
        for (key, value) in document {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("lanes", DeValue::Integer(number)) => match number.to_string().parse() {
                    Ok(lanes @ 1..=1024) => config.lanes = Some(lanes),
                    Ok(_) | Err(_) => {
                        self.fault(value.span(), "`lanes` is not a number from 1 to 1024");
                    }
                },
                ("lanes", _) => self.fault(value.span(), "`lanes` is not a number from 1 to 1024"),
                ("device", DeValue::Array(tables)) => {
                    devices.extend(tables.iter().filter_map(|table| self.device(table)));
                }
                ("device", _) => self.fault(value.span(), "a device begins with `[[device]]`"),
                (other, _) => self.fault(
                    key.span(),
                    format!("unknown key `{other}`; the keys are `lanes` and `[[device]]`"),
                ),
            }
        }
        if !document.contains_key("device") && self.faults.is_empty() {
            // As one is that is being written.
            let what = "there is no `[[device]]`; for a file without devices, write `device = []`";
            self.fault(0..0, what);
        }
        self.check_together(&devices);
        config.devices = devices.into_iter().map(|(_, device)| device).collect();
        config
    }

    /// Checks that no two devices share an id or a backing.
    fn check_together(&mut self, devices: &[(Range<usize>, DeviceConfig)]) {
        let mut ids = BTreeMap::new();
        let mut files: BTreeMap<PathBuf, u32> = BTreeMap::new();
        for (span, device) in devices {
            let id = device.id.unwrap_or_default();
            if let Some(line) = ids.insert(id, self.line(span.start)) {
                self.fault(span.clone(), format!("device {id} is already defined in line {line}"));
                continue;
            }
            let own = device.target.files().into_iter();
            let own: Vec<_> =
                own.map(|file| file.canonicalize().unwrap_or_else(|_| file.to_owned())).collect();
            for file in own {
                match files.insert(file.clone(), id) {
                    Some(other) if other != id => self.fault(
                        span.clone(),
                        format!("{} is already a backing of device {other}", file.display()),
                    ),
                    Some(_) | None => {}
                }
            }
        }
    }

    fn device(&mut self, table: &Spanned<DeValue<'_>>) -> Option<(Range<usize>, DeviceConfig)> {
        let before = self.faults.len();
        let DeValue::Table(keys) = table.get_ref() else {
            self.fault(table.span(), "a device begins with `[[device]]`");
            return None;
        };
        let (mut target, mut layers) = (None, None);
        let mut settings = Vec::new();
        let has_layers = keys.keys().any(|key| key.get_ref() == "layer");
        for (key, value) in keys {
            let name = key.get_ref().as_ref();
            if let Some((_, why)) = NOT_HERE.iter().find(|(it, _)| *it == name) {
                self.fault(key.span(), format!("`{name}` is not for devices of `serve`: {why}"));
                continue;
            }
            if has_layers && SHORT_FORM.contains(&name) {
                let what = "belongs to a `[[device.layer]]` of the kind fault if there are layers";
                self.fault(key.span(), format!("`{name}` {what}"));
                continue;
            }
            match name {
                "target" => target = self.one_of("target", &TARGETS, value),
                "layer" => layers = self.layers(value),
                _ => settings.extend(self.setting(key, value, "target")),
            }
        }
        if !keys.keys().any(|key| key.get_ref() == "target") {
            self.fault(table.span(), "the device has no `target`");
        }
        if !keys.keys().any(|key| key.get_ref() == "id") {
            self.fault(table.span(), "the device has no `id`");
        }
        // Without a target the options are unknown.
        let target = target?;
        let line = |settings: &[Setting]| command_line(target, settings);
        let made = self.parsed(&format!("target {target}"), table.span(), settings, &line)?;
        let Command::Add(made) = made else { return None };
        let made = add::config(&made).map(|(config, _)| config);
        let mut config = made.map_err(|error| self.fault(table.span(), error)).ok()?;
        if self.faults.len() > before {
            return None;
        }
        self.place(&mut config);
        if let Some(layers) = layers {
            config.layers = layers;
        }
        Some((table.span(), config))
    }

    /// The one of these words that a value is.
    fn one_of(
        &mut self,
        key: &str,
        words: &'static [&'static str],
        value: &Spanned<DeValue<'_>>,
    ) -> Option<&'static str> {
        let word = if let DeValue::String(word) = value.get_ref() { word.as_ref() } else { "" };
        let found = words.iter().copied().find(|it| *it == word);
        if found.is_none() {
            self.fault(value.span(), format!("`{key}` is not one of {}", words.join(", ")));
        }
        found
    }

    /// A key and its value as an option of a target or a layer.
    fn setting(
        &mut self,
        key: &Spanned<DeString<'_>>,
        value: &Spanned<DeValue<'_>>,
        of: &str,
    ) -> Option<Setting> {
        let name = key.get_ref().as_ref();
        if NOT_OPTIONS.contains(&name) {
            self.fault(key.span(), format!("a {of} has no option `{name}`"));
            return None;
        }
        let arguments = arguments(name, value.get_ref());
        if arguments.is_none() {
            let what = "is not a text, a number, true, false or a list of these";
            self.fault(value.span(), format!("`{name}` {what}"));
        }
        Some(Setting { key: name.to_owned(), span: key.span(), arguments: arguments? })
    }

    /// Parses the command line of a target or a layer. Reports and removes each wrong option, until the
    /// rest is right or the error concerns no single option.
    fn parsed(
        &mut self,
        what: &str,
        span: Range<usize>,
        mut settings: Vec<Setting>,
        line: &dyn Fn(&[Setting]) -> Vec<String>,
    ) -> Option<Command> {
        let mut removed = Vec::new();
        loop {
            let error = match Cli::try_parse_from(line(&settings)) {
                Ok(Cli { command, .. }) => return Some(command),
                Err(error) => error,
            };
            let message = one_line(&error.render().to_string());
            let wrong = culprit(&error);
            let at = settings.iter().position(|it| wrong.as_ref() == Some(&it.key));
            match at {
                Some(at) => {
                    let setting = settings.remove(at);
                    let known = error.kind() != clap::error::ErrorKind::UnknownArgument;
                    let told = if known {
                        message
                    } else {
                        format!("the {what} has no option `{}`", setting.key)
                    };
                    self.fault(setting.span, told);
                    removed.push(setting.key);
                }
                None => {
                    // It is missing since it was wrong, which has been told.
                    if !wrong.is_some_and(|key| removed.contains(&key)) {
                        self.fault(span, message);
                    }
                    return None;
                }
            }
        }
    }

    /// Makes paths absolute.
    fn place(&self, config: &mut DeviceConfig) {
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        for file in config.target.files_mut() {
            *file = directory.join(&*file);
        }
    }
}

/// `ublk-target add TARGET` with its options; rules are those of a layer.
fn command_line(target: &str, settings: &[Setting]) -> Vec<String> {
    let is_outer = |setting: &&Setting| SHORT_FORM.contains(&setting.key.as_str());
    let arguments = |setting: &Setting| setting.arguments.clone();
    let mut line = vec!["ublk-target".to_owned(), "add".to_owned()];
    let outer: Vec<_> = settings.iter().filter(is_outer).flat_map(arguments).collect();
    if !outer.is_empty() {
        line.push("fault".to_owned());
        line.extend(outer);
    }
    line.push(target.to_owned());
    line.extend(settings.iter().filter(|it| !is_outer(it)).flat_map(arguments));
    line
}

/// A key and its value as arguments.
fn arguments(key: &str, value: &DeValue<'_>) -> Option<Vec<String>> {
    let one = |value: &str| format!("--{key}={value}");
    Some(match value {
        DeValue::String(text) => vec![one(text)],
        DeValue::Integer(number) => vec![one(&number.to_string())],
        DeValue::Float(number) => vec![one(&number.to_string())],
        DeValue::Boolean(true) => vec![format!("--{key}")],
        DeValue::Boolean(false) => Vec::new(),
        DeValue::Array(values) => {
            let each = values.iter().map(|value| arguments(key, value.get_ref()));
            each.collect::<Option<Vec<_>>>()?.concat()
        }
        DeValue::Datetime(_) | DeValue::Table(_) => return None,
    })
}

/// The key that an error of the parser concerns.
fn culprit(error: &clap::Error) -> Option<String> {
    let value = error.get(ContextKind::InvalidArg)?;
    let name = if let ContextValue::String(name) = value {
        name
    } else if let ContextValue::Strings(names) = value {
        names.first()?
    } else {
        return None;
    };
    let long = name.split_whitespace().find_map(|word| word.split("--").nth(1))?;
    let end = long.find(['=', '<', '[', '>']).unwrap_or(long.len());
    Some(long[..end].to_owned())
}

#[cfg(test)]
mod tests;
