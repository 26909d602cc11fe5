//! Real files of the system, as much as is copied in moments.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Where they are taken from: many small ones, some large ones.
pub const ROOTS: [&str; 2] = ["usr/share", "usr/bin"];
/// How much is taken from each.
const BYTES: u64 = 16 << 20;
/// How many are taken from each.
const FILES: u64 = 1000;

/// What was chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Number of files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Writes the paths of the chosen files, relative to `root`, into `list`, each with a zero byte.
pub fn choose(root: &Path, list: &Path) -> Result<Chosen> {
    let mut out = std::io::BufWriter::new(fs::File::create(list)?);
    let mut all = Chosen::default();
    for start in ROOTS {
        let mut chosen = Chosen::default();
        let mut directories = vec![PathBuf::from(start)];
        while let Some(directory) = directories.pop() {
            let entries = fs::read_dir(root.join(&directory)).into_iter().flatten().flatten();
            let mut entries: Vec<_> = entries.collect();
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let path = directory.join(entry.file_name());
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() {
                    directories.push(path);
                } else if meta.is_file()
                    && chosen.files < FILES
                    && chosen.bytes + meta.len() <= BYTES
                {
                    out.write_all(path.as_os_str().as_bytes())?;
                    out.write_all(b"\0")?;
                    chosen.files += 1;
                    chosen.bytes += meta.len();
                }
            }
        }
        all.files += chosen.files;
        all.bytes += chosen.bytes;
    }
    out.flush().context("list of files")?;
    ensure!(all.files > 0, "no file below /{} to copy", ROOTS.join(" and /"));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_chosen_up_to_a_limit() {
        let root = tempfile::tempdir().unwrap();
        let share = root.path().join("usr/share/a");
        fs::create_dir_all(&share).unwrap();
        fs::write(share.join("small"), "12345").unwrap();
        fs::File::create(share.join("large")).unwrap().set_len(BYTES).unwrap();
        fs::File::create(share.join("too large")).unwrap().set_len(BYTES + 1).unwrap();
        std::os::unix::fs::symlink("small", share.join("link")).unwrap();
        let list = root.path().join("list");
        let chosen = choose(root.path(), &list).unwrap();
        assert_eq!(chosen, Chosen { files: 1, bytes: BYTES });
        assert_eq!(fs::read(&list).unwrap(), b"usr/share/a/large\0");
        fs::remove_file(share.join("large")).unwrap();
        assert_eq!(choose(root.path(), &list).unwrap(), Chosen { files: 1, bytes: 5 });
        fs::remove_file(share.join("small")).unwrap();
        assert!(choose(root.path(), &list).is_err());
    }
}
