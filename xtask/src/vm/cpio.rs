//! Writes the `newc` archives that the kernel unpacks as its first file system
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// An archive being written. Folders above an entry are made as needed.
pub struct Archive<W: Write> {
    out: W,
    folders: BTreeSet<String>,
    files: BTreeSet<String>,
    inode: u32,
}

const FOLDER: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;

impl Archive<BufWriter<File>> {
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self::new(BufWriter::with_capacity(1 << 20, file)))
    }
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Archive {
            out,
            folders: BTreeSet::new(),
            files: BTreeSet::new(),
            inode: 1,
        }
    }

    /// Whether an entry with this path was added.
    pub fn has(&self, path: &str) -> bool {
        self.files.contains(path.trim_start_matches('/'))
    }

    pub fn folder(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/').to_owned();
        if path.is_empty() || self.folders.contains(&path) {
            return Ok(());
        }
        self.folders_above(&path)?;
        self.header(&path, FOLDER, 0)?;
        self.folders.insert(path);
        Ok(())
    }

    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let path = path.trim_start_matches('/').to_owned();
        self.folders_above(&path)?;
        self.header(&path, LINK, target.len())?;
        self.out.write_all(target.as_bytes())?;
        self.pad(target.len())?;
        self.files.insert(path);
        Ok(())
    }

    pub fn bytes(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let path = path.trim_start_matches('/').to_owned();
        self.folders_above(&path)?;
        self.header(&path, FILE | mode, content.len())?;
        self.out.write_all(content)?;
        self.pad(content.len())?;
        self.files.insert(path);
        Ok(())
    }

    /// Adds a file of the host, following links.
    pub fn file(&mut self, path: &str, source: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let mut content = Vec::new();
        let mut file =
            File::open(source).with_context(|| format!("opening {}", source.display()))?;
        let mode = file.metadata()?.permissions().mode() & 0o777;
        file.read_to_end(&mut content)?;
        self.bytes(path, mode, &content)
    }

    /// Writes the trailer. The kernel takes another archive after it.
    pub fn finish(mut self) -> Result<W> {
        self.header("TRAILER!!!", 0, 0)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn folders_above(&mut self, path: &str) -> Result<()> {
        path.rsplit_once('/')
            .map_or(Ok(()), |(above, _)| self.folder(above))
    }

    fn header(&mut self, name: &str, mode: u32, size: usize) -> Result<()> {
        ensure!(
            u32::try_from(size).is_ok(),
            "{name} is too large for a cpio archive: {size} bytes"
        );
        self.inode += 1;
        let links = if mode == FOLDER { 2 } else { 1 };
        let fields = [
            self.inode as usize,
            mode as usize,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(header.len() + name.len() + 1)
    }

    /// Headers and contents begin at multiples of four bytes.
    fn pad(&mut self, length: usize) -> Result<()> {
        let zeros = [0u8; 3];
        let missing = length.wrapping_neg() % 4;
        self.out
            .write_all(zeros.get(..missing).unwrap_or_default())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::Archive;

    #[test]
    fn entries_are_aligned_and_folders_come_first() {
        let mut archive = Archive::new(Vec::new());
        archive.bytes("/etc/x", 0o644, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let (folder, file) = (text.find("etc\0").unwrap(), text.find("etc/x\0").unwrap());
        assert!(folder < file);
        assert!(text.contains("000081a4"), "mode of a regular file");
        assert!(text.contains("TRAILER!!!"));
    }

    #[test]
    fn a_folder_is_written_once() {
        let mut archive = Archive::new(Vec::new());
        archive.folder("a/b").unwrap();
        archive.folder("/a/b/").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes).matches("a/b\0").count(), 1);
    }
}
