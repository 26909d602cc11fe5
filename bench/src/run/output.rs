//! The files with the results.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use jiff::Timestamp;

use crate::report;
use crate::results::Results;

/// Where to write the results.
#[derive(Debug)]
pub struct Output {
    /// The prefix of all names.
    prefix: PathBuf,
}

impl Output {
    /// In this directory, or with this prefix. Fails at once if the files cannot be written, not
    /// only after hours.
    pub fn new(path: &Path, now: Timestamp) -> Result<Self> {
        let prefix = match path.is_dir() {
            true => path.join(format!("ublk-bench-{}", now.strftime("%Y%m%d-%H%M%S"))),
            false => path.to_owned(),
        };
        let output = Self { prefix };
        output.temporary().with_context(|| {
            format!("results cannot be written to {}; choose another --output", path.display())
        })?;
        Ok(output)
    }

    /// The file of the results.
    pub fn json(&self) -> PathBuf {
        self.named("json")
    }

    /// The page.
    pub fn html(&self) -> PathBuf {
        self.named("html")
    }

    fn named(&self, extension: &str) -> PathBuf {
        let mut name = self.prefix.clone().into_os_string();
        name.push(format!(".{extension}"));
        PathBuf::from(name)
    }

    /// Writes the results.
    pub fn write(&self, results: &Results) -> Result<()> {
        self.write_file(&self.json(), &(serde_json::to_string(results)? + "\n"))
    }

    /// Writes the page that shows them.
    pub fn write_page(&self, results: &Results) -> Result<()> {
        self.write_file(&self.html(), &report::html(results)?)
    }

    /// Writes atomically: there is always a complete file, or none.
    fn write_file(&self, path: &Path, text: &str) -> Result<()> {
        let doing = || format!("write {}", path.display());
        let mut file = self.temporary().with_context(doing)?;
        file.write_all(text.as_bytes()).with_context(doing)?;
        file.as_file().sync_all().with_context(doing)?;
        file.persist(path).map_err(|error| error.error).with_context(doing)?;
        Ok(())
    }

    /// A temporary file in the same directory, to be renamed.
    fn temporary(&self) -> std::io::Result<tempfile::NamedTempFile> {
        let parent = self.prefix.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = parent.unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(".ublk-bench-").permissions(Permissions::from_mode(0o644));
        builder.tempfile_in(directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_directory_or_begin_as_it_is_wanted() {
        let directory = tempfile::tempdir().unwrap();
        let now = Timestamp::from_second(1_795_286_752).unwrap();
        let name = |path: &Path| Output::new(path, now).unwrap().json();
        assert_eq!(
            name(directory.path()),
            directory.path().join("ublk-bench-20261121-184552.json")
        );
        let prefix = directory.path().join("drive.v2");
        assert_eq!(name(&prefix), directory.path().join("drive.v2.json"));
        assert_eq!(name(Path::new("here")), Path::new("here.json"));
        let missing = Output::new(&directory.path().join("none/x"), now).unwrap_err().to_string();
        assert!(missing.contains("choose another --output"), "{missing}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn results_are_read_back_as_they_were() {
        let directory = tempfile::tempdir().unwrap();
        let results = crate::run::rounds::tests::some_results();
        let output = Output::new(&directory.path().join("r"), Timestamp::UNIX_EPOCH).unwrap();
        output.write(&results).unwrap();
        output.write(&results).unwrap();
        let text = std::fs::read_to_string(output.json()).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&text).unwrap(), results);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        output.write_page(&results).unwrap();
        let page = std::fs::read_to_string(directory.path().join("r.html")).unwrap();
        assert!(page.contains(&results.subjects[0].title), "{page}");
    }
}
