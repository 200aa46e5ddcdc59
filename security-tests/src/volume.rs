//! A folder as the kubelet makes it of a ConfigMap, a Secret or a CSI volume.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Result;

/// Its files are links through `..data`, a link itself, which is replaced by one rename: a
/// reader sees all of a version or all of another.
#[derive(Debug)]
pub struct Volume {
    folder: PathBuf,
    versions: u32,
}

impl Volume {
    /// Without a first version the links lead nowhere.
    pub fn new(folder: &Path, files: &[&str]) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        for file in files {
            symlink(Path::new("..data").join(file), folder.join(file))?;
        }
        Ok(Volume {
            folder: folder.to_owned(),
            versions: 0,
        })
    }

    /// The next version.
    pub fn publish(&mut self, files: &[(&str, &str)]) -> Result<()> {
        self.versions += 1;
        let version = format!("..{}", self.versions);
        std::fs::create_dir(self.folder.join(&version))?;
        for (file, content) in files {
            std::fs::write(self.folder.join(&version).join(file), content)?;
        }
        let link = self.folder.join("..data_tmp");
        symlink(&version, &link)?;
        std::fs::rename(&link, self.folder.join("..data"))?;
        Ok(())
    }
}
