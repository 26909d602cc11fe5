//! A target and its backings.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ublk_engine::units::Bytes;

/// A target and its backings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum TargetConfig {
    /// Discards writes, reads as zeros.
    Null {
        /// Size of the device.
        size: Bytes,
    },
    /// Maps one file or block device, block for block.
    Loop {
        /// The backing.
        file: PathBuf,
    },
    /// Concatenates extents of files or block devices.
    Linear {
        /// The extents in the order of the device.
        extents: Vec<ExtentConfig>,
    },
    /// Stripes over files or block devices.
    Stripe {
        /// Chunk size in bytes.
        chunk: Bytes,
        /// The backings.
        files: Vec<PathBuf>,
    },
}

impl TargetConfig {
    /// The name of the target.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Null { .. } => "null",
            Self::Loop { .. } => "loop",
            Self::Linear { .. } => "linear",
            Self::Stripe { .. } => "stripe",
        }
    }

    /// The size of a null target, mutable.
    pub(crate) const fn null_size(&mut self) -> Option<&mut Bytes> {
        match self {
            Self::Null { size } => Some(size),
            Self::Loop { .. } | Self::Linear { .. } | Self::Stripe { .. } => None,
        }
    }

    /// Makes paths absolute, for a server that starts elsewhere. A path that cannot be looked up stays
    /// unchanged, so that opening it gives the error.
    pub(crate) fn absolute(&mut self) {
        for file in self.files_mut() {
            if let Ok(path) = file.canonicalize() {
                *file = path;
            }
        }
    }

    /// Makes relative paths absolute, since the server leaves the working directory. Links in them are
    /// resolved when the paths are opened.
    pub(crate) fn begin_at_root(&mut self) {
        for file in self.files_mut() {
            if let Ok(path) = std::path::absolute(&*file) {
                *file = path;
            }
        }
    }

    /// The paths of the backings, with duplicates.
    #[must_use]
    pub fn files(&self) -> Vec<&Path> {
        match self {
            Self::Null { .. } => Vec::new(),
            Self::Loop { file } => vec![file],
            Self::Linear { extents } => extents.iter().map(|it| it.file.as_path()).collect(),
            Self::Stripe { files, .. } => files.iter().map(PathBuf::as_path).collect(),
        }
    }

    /// The first backing that does not exist.
    pub(crate) fn missing_file(&self) -> Option<&Path> {
        let is_missing = |path: &&Path| {
            path.metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        self.files().into_iter().find(is_missing)
    }

    /// The same, mutable.
    pub fn files_mut(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Self::Null { .. } => Vec::new(),
            Self::Loop { file } => vec![file],
            Self::Linear { extents } => extents.iter_mut().map(|it| &mut it.file).collect(),
            Self::Stripe { files, .. } => files.iter_mut().collect(),
        }
    }
}

/// A part of a backing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtentConfig {
    /// The backing.
    pub file: PathBuf,
    /// Its offset on the backing.
    pub offset: Bytes,
    /// Its length; `None` means to the end of the backing.
    pub len: Option<Bytes>,
}
