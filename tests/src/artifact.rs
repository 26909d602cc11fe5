//! Reads what cargo says it has built (`--message-format=json`).

use std::io::{BufRead, Result};
use std::path::PathBuf;

use serde::Deserialize;

/// An executable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// The directory of its package, where cargo runs its tests.
    pub package: PathBuf,
    /// Name of the library, program, test or example.
    pub name: String,
    /// What it is, in cargo's words: `lib`, `bin`, `test`, `example`.
    pub kind: String,
    /// It is made of tests, rather than a program itself.
    pub is_test: bool,
    /// Where it is.
    pub executable: PathBuf,
}

#[derive(Deserialize)]
struct Message {
    manifest_path: PathBuf,
    target: Target,
    profile: Profile,
    executable: PathBuf,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// The executables in cargo's output, a JSON object a line; what else is in it is passed over.
///
/// # Errors
/// When the output cannot be read.
pub fn read(output: impl BufRead) -> Result<Vec<Artifact>> {
    let mut found = Vec::new();
    for line in output.lines() {
        let Ok(message) = serde_json::from_str::<Message>(&line?) else { continue };
        let Target { name, kind } = message.target;
        found.push(Artifact {
            package: message.manifest_path.parent().map(PathBuf::from).unwrap_or_default(),
            name,
            kind: kind.into_iter().next().unwrap_or_default(),
            is_test: message.profile.test,
            executable: message.executable,
        });
    }
    Ok(found)
}

/// The files of libraries in cargo's output.
///
/// # Errors
/// When the output cannot be read.
pub fn libraries(output: impl BufRead) -> Result<Vec<PathBuf>> {
    #[derive(Deserialize)]
    struct Built {
        filenames: Vec<PathBuf>,
    }
    let mut found = Vec::new();
    for line in output.lines() {
        if let Ok(built) = serde_json::from_str::<Built>(&line?) {
            found.extend(built.filenames);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found() {
        assert_eq!(libraries(MESSAGES.as_bytes()).unwrap()[0], PathBuf::from("/t/libbufreg.rlib"));
    }

    /// Messages of cargo 1.95, with fewer fields.
    const MESSAGES: &str = r#"   Compiling bufreg v0.1.0
{"reason":"compiler-artifact","manifest_path":"/w/bufreg/Cargo.toml","target":{"kind":["lib"],"name":"bufreg","test":true},"profile":{"test":false},"filenames":["/t/libbufreg.rlib"],"executable":null,"fresh":true}
{"reason":"build-script-executed","package_id":"libc","out_dir":"/t/build/libc/out"}
{"reason":"compiler-artifact","manifest_path":"/w/bufreg/Cargo.toml","target":{"kind":["lib"],"name":"bufreg"},"profile":{"test":true},"executable":"/t/deps/bufreg-00ff","fresh":true}
{"reason":"compiler-artifact","manifest_path":"/w/bufreg/Cargo.toml","target":{"kind":["test"],"name":"model"},"profile":{"test":true},"executable":"/t/deps/model-00ff"}
{"reason":"compiler-artifact","manifest_path":"/w/uring/Cargo.toml","target":{"kind":["example"],"name":"fault"},"profile":{"test":false},"executable":"/t/examples/fault"}
{"reason":"compiler-message","message":{"rendered":"warning: unused"}}
{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["bin"],"name":"vm"},"profile":{"test":false},"executable":"/t/vm"}
{"reason":"build-finished","success":true}
"#;

    #[test]
    fn executables_are_read_from_cargos_messages() {
        let found = read(MESSAGES.as_bytes()).unwrap();
        let rows: Vec<_> = found
            .iter()
            .map(|one| {
                let path = |path: &PathBuf| path.to_str().unwrap().to_owned();
                let texts = (one.name.as_str(), one.kind.as_str());
                (path(&one.package), texts, one.is_test, path(&one.executable))
            })
            .collect();
        let row = |package: &str, texts, is_test, executable: &str| {
            (package.to_owned(), texts, is_test, executable.to_owned())
        };
        assert_eq!(
            rows,
            [
                row("/w/bufreg", ("bufreg", "lib"), true, "/t/deps/bufreg-00ff"),
                row("/w/bufreg", ("model", "test"), true, "/t/deps/model-00ff"),
                row("/w/uring", ("fault", "example"), false, "/t/examples/fault"),
                row("/w/tests", ("vm", "bin"), false, "/t/vm"),
            ]
        );
    }
}
