//! A target and its backings.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ublk_engine::units::Bytes;

/// A target and its backings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum TargetConfig {
    /// Forgets writes, reads as zeros.
    Null {
        /// Size of the device.
        size: Bytes,
    },
    /// A file or block device, block for block.
    Loop {
        /// The backing.
        file: PathBuf,
    },
    /// Extents of files or block devices, one after the other.
    Linear {
        /// In the order of the device.
        extents: Vec<ExtentConfig>,
    },
    /// Chunks that go to files or block devices in turn.
    Stripe {
        /// Bytes of a chunk.
        chunk: Bytes,
        /// The backings.
        files: Vec<PathBuf>,
    },
}

impl TargetConfig {
    /// The word for it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Null { .. } => "null",
            Self::Loop { .. } => "loop",
            Self::Linear { .. } => "linear",
            Self::Stripe { .. } => "stripe",
        }
    }

    /// The size of a null target, to be changed.
    pub(crate) const fn null_size(&mut self) -> Option<&mut Bytes> {
        match self {
            Self::Null { size } => Some(size),
            Self::Loop { .. } | Self::Linear { .. } | Self::Stripe { .. } => None,
        }
    }

    /// With absolute paths, for a server that starts elsewhere. What cannot be looked up stays as it
    /// is, for the error that opening it gives.
    pub(crate) fn absolute(&mut self) {
        for file in self.files_mut() {
            if let Ok(path) = file.canonicalize() {
                *file = path;
            }
        }
    }

    /// With paths that begin at the root directory in place of the working directory, which the server
    /// leaves. Links in them are looked at when they are opened.
    pub(crate) fn begin_at_root(&mut self) {
        for file in self.files_mut() {
            if let Ok(path) = std::path::absolute(&*file) {
                *file = path;
            }
        }
    }

    /// The paths of the backings, as often as they are given.
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

    /// The same, to be changed.
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
    /// Where it begins.
    pub offset: Bytes,
    /// How long it is; to the end of the backing without one.
    pub len: Option<Bytes>,
}
