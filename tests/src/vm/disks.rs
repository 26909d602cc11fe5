//! The drives of a VM, and the directory of its files.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::cleanup::RunDir;
use crate::config::VmConfig;
use crate::paths;

/// The disks of a VM, which outlive it where a test boots again on them.
#[derive(Debug, Clone)]
pub struct Disks {
    pub(super) directory: Arc<RunDir>,
    pub(super) drives: Vec<Vec<PathBuf>>,
}

impl Disks {
    /// Makes empty (sparse) backing files for the drives of `config`.
    ///
    /// # Errors
    /// When a file cannot be made.
    pub fn create(config: &VmConfig) -> Result<Self> {
        let directory = Arc::new(RunDir::create(&paths::cache()?.join("run"))?);
        let mut drives = Vec::new();
        for (n, nvme) in config.nvme.iter().enumerate() {
            let mut backings = Vec::new();
            for (index, namespace) in nvme.namespaces.iter().enumerate() {
                let path = directory.path().join(format!("drive{n}-{}.img", index + 1));
                File::create(&path)
                    .and_then(|file| file.set_len(namespace.size_bytes))
                    .with_context(|| format!("make {}", path.display()))?;
                backings.push(path);
            }
            drives.push(backings);
        }
        Ok(Self { directory, drives })
    }

    /// The backing file of a namespace (`drive` from 0, `nsid` from 1).
    pub fn backing(&self, drive: usize, nsid: usize) -> Option<&Path> {
        Some(self.drives.get(drive)?.get(nsid.checked_sub(1)?)?.as_path())
    }
}
