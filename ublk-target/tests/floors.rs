//! The modules of the library stand on floors, and none imports from a floor above its own.

use std::fs;
use std::path::Path;

/// From the lowest to the highest. The program (`cli`) is another crate, on top.
const FLOORS: [&str; 7] = ["os", "config", "backing", "device", "io_thread", "socket", "control"];

fn rank(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| *floor == module)
}

/// The modules of the top level that a source text names by `crate::`, each with its line. Comments do not
/// count.
fn named(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.split("//").next().unwrap_or_default();
        let mut rest = code;
        while let Some((_, after)) = rest.split_once("crate::") {
            let names = after.strip_prefix('{').and_then(|it| it.split_once('}'));
            let names = names.map_or(after, |(list, _)| list);
            // One of several in braces may go on to a path of its own.
            for name in names.split(", ").take(if after.starts_with('{') { 99 } else { 1 }) {
                let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
                let end = name.find(|c| !is_part(c)).unwrap_or(name.len());
                found.push((number, name[..end].to_owned()));
            }
            rest = after;
        }
    }
    found
}

/// What a file of a floor imports from above.
fn faults(floor: &str, file: &str, text: &str) -> Vec<String> {
    let own = rank(floor).unwrap_or_else(|| panic!("{file} is on no floor"));
    let above = |(number, name): (usize, String)| {
        let of = rank(&name).unwrap_or_else(|| panic!("{file}:{number}: {name} is no floor"));
        (of > own).then(|| format!("{file}:{number}: {floor} imports from {name}, above it"))
    };
    named(text).into_iter().filter_map(above).collect()
}

/// As long as a file may be, in lines.
const LONGEST_FILE: usize = 500;

fn walk(directory: &Path, files: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            walk(&entry, files);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            files.push(entry);
        }
    }
}

#[test]
fn no_module_imports_from_a_floor_above() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    let mut found = Vec::new();
    let mut seen = 0;
    for file in files {
        let path = file.strip_prefix(&root).unwrap();
        let Some(floor) = path.parent().and_then(|it| it.iter().next()) else { continue };
        let floor = floor.to_str().unwrap();
        if floor != "cli" {
            seen += 1;
            found.extend(faults(
                floor,
                path.to_str().unwrap(),
                &fs::read_to_string(&file).unwrap(),
            ));
        }
    }
    assert!(seen > 50, "only {seen} files");
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn no_file_is_too_long_to_be_read_at_once() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = package.parent().unwrap();
    let packages = ["uring-ext", "bufreg", "ublk-engine", "ublk-target", "bench", "sim", "tests"];
    let mut files = Vec::new();
    for package in packages {
        for part in ["src", "tests", "benches", "examples"] {
            let part = workspace.join(package).join(part);
            if part.exists() {
                walk(&part, &mut files);
            }
        }
    }
    assert!(files.len() > 200, "only {} files", files.len());
    let length = |file: &Path| fs::read_to_string(file).unwrap().lines().count();
    let long = files.iter().map(|file| (length(file), file)).filter(|(it, _)| *it > LONGEST_FILE);
    let long: Vec<_> = long.map(|(lines, file)| format!("{}: {lines}", file.display())).collect();
    assert!(long.is_empty(), "more than {LONGEST_FILE} lines: {}", long.join(", "));
}

/// Paths in backticks that begin at the top of the workspace, such as `sim/src/cow.rs`.
fn paths_in(text: &str) -> impl Iterator<Item = &str> {
    let is_path = |it: &&str| {
        let has_end = [".rs", ".md", "/"].iter().any(|end| it.ends_with(end));
        has_end && !it.contains(['{', '*', ' ', '<']) && !it.starts_with(['/', '.', '~'])
    };
    text.split('`').skip(1).step_by(2).filter(is_path)
}

#[test]
fn documents_name_files_that_exist() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let documents = [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "docs/targets.md",
        "docs/kernel-support.md",
    ];
    let (mut seen, mut missing) = (0, Vec::new());
    for document in documents {
        let text = fs::read_to_string(workspace.join(document)).unwrap();
        for path in paths_in(&text) {
            seen += 1;
            if !workspace.join(path).exists() {
                missing.push(format!("{document}: {path}"));
            }
        }
    }
    assert!(seen > 20, "only {seen} paths");
    assert!(missing.is_empty(), "{}", missing.join("\n"));
    let found: Vec<_> = paths_in("`sim/src/cow.rs` and `a b.rs`, `src/x.md`, `x`").collect();
    assert_eq!(found, ["sim/src/cow.rs", "src/x.md"]);
}

#[test]
fn an_import_from_above_is_found() {
    let table = [
        ("os", "use crate::config::DeviceConfig;", 1),
        ("os", "use crate::os::text::printable;\nuse std::io;", 0),
        ("os", "/// See [`crate::control`].\nfn f() {} // crate::control", 0),
        ("device", "    let a = crate::socket::Client::new();", 1),
        ("device", "use crate::{backing, control::server};", 1),
        ("control", "use crate::socket::client::Client;", 0),
        ("config", "pub(crate) use crate::io_thread::lane::{self, Lane};", 1),
    ];
    for (floor, text, count) in table {
        assert_eq!(faults(floor, "it.rs", text).len(), count, "{floor}: {text}");
    }
}
