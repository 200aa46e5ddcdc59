//! Guest kernels: Debian's own cloud images, unpacked into the cache, never installed.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::{SideSource, Suite};
use super::cache_dir;
use crate::ui;

/// A kernel as the cache holds it.
#[derive(Clone, Debug)]
pub struct GuestKernel {
    /// The series asked for, such as `6.12`.
    pub series: String,
    /// `uname -r` of the guest.
    pub release: String,
    pub image: PathBuf,
    /// The folder below which `lib/modules/<release>` is.
    pub modules_root: PathBuf,
}

/// The series that are tested: the oldest that is supported, the long-term one that most
/// clusters run, and the newest.
pub const KERNELS: &[&str] = &["6.1", "6.12", "7.2"];

const SUITES: &[Suite] = &[
    Suite::Main("bookworm"),
    Suite::Security("bookworm-security"),
    Suite::Main("trixie-backports"),
];

/// Modules that the guest may load, as folders or files below `kernel/`.
const MODULES: &[&str] = &[
    "net/tls",
    "net/netfilter",
    "net/ipv4",
    "net/ipv6",
    "net/core",
    "net/packet",
    "net/unix",
    "net/sched",
    "net/mptcp",
    "crypto",
    "arch/x86/crypto",
    "drivers/net/veth.ko",
    "drivers/net/dummy.ko",
    "lib",
];

/// The kernel of that series, fetched when the cache lacks it.
pub fn ensure_kernel(series: &str) -> Result<GuestKernel> {
    let dir = cache_dir()?.join("kernels").join(series);
    if let Some(kernel) = cached(series, &dir) {
        return Ok(kernel);
    }
    let wanted = packages_of(series)?;
    let source = SideSource::open(&cache_dir()?.join("apt"), SUITES)?;
    let names = source.package_names()?;
    let mut candidates = wanted.candidates(&names);
    if candidates.is_empty() {
        bail!(
            "Debian offers no kernel {series} any more: put `vmlinuz` and `modules/lib/modules/<release>` \
             into {} by hand",
            dir.display()
        );
    }
    candidates.sort_by(|a, b| natural_order(b, a));
    let mut failure = None;
    // An archive can be listed and already be gone from the mirror: take the next older.
    for release in candidates.iter().take(3) {
        match fetch(&source, &wanted, release, &dir) {
            Ok(()) => {
                return cached(series, &dir)
                    .with_context(|| format!("{} is incomplete after unpacking", dir.display()));
            }
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.unwrap_or_else(|| anyhow::anyhow!("no candidate for kernel {series}")))
}

fn cached(series: &str, dir: &Path) -> Option<GuestKernel> {
    let image = dir.join("vmlinuz");
    let modules_root = dir.join("modules");
    let release = std::fs::read_dir(modules_root.join("lib/modules"))
        .ok()?
        .next()?
        .ok()?;
    let release = release.file_name().into_string().ok()?;
    image.is_file().then_some(GuestKernel {
        series: series.to_owned(),
        release,
        image,
        modules_root,
    })
}

/// The naming scheme of a series' packages.
struct Packages {
    /// Package names before the release, all of which are needed.
    prefixes: &'static [&'static str],
    /// How the release begins.
    release: &'static str,
}

impl Packages {
    /// Releases for which every package is listed.
    fn candidates(&self, names: &[String]) -> Vec<String> {
        let releases = |prefix: &str| -> Vec<&str> {
            names
                .iter()
                .filter_map(|name| name.strip_prefix(prefix))
                .filter(|rest| rest.starts_with(self.release) && rest.ends_with("-cloud-amd64"))
                .collect()
        };
        let Some((first, others)) = self.prefixes.split_first() else {
            return Vec::new();
        };
        let others: Vec<_> = others.iter().map(|prefix| releases(prefix)).collect();
        releases(first)
            .into_iter()
            .filter(|release| others.iter().all(|list| list.contains(release)))
            .map(str::to_owned)
            .collect()
    }
}

fn packages_of(series: &str) -> Result<Packages> {
    Ok(match series {
        "6.1" => Packages {
            prefixes: &["linux-image-"],
            release: "6.1.",
        },
        "6.12" => Packages {
            prefixes: &["linux-image-"],
            release: "6.12.",
        },
        // From 7.2 on Debian ships image and modules as two packages.
        "7.2" => Packages {
            prefixes: &["linux-binary-", "linux-modules-"],
            release: "7.2.",
        },
        other => bail!(
            "unknown guest kernel {other}: one of {}",
            KERNELS.join(", ")
        ),
    })
}

fn fetch(source: &SideSource, wanted: &Packages, release: &str, dir: &Path) -> Result<()> {
    ui::line(format!(
        "fetching guest kernel {release} into {}",
        dir.display()
    ));
    let beside = |suffix: &str| PathBuf::from(format!("{}.{suffix}", dir.display()));
    let (raw, staged) = (beside("unpacked"), beside("staged"));
    for old in [&raw, &staged] {
        let _ = std::fs::remove_dir_all(old);
    }
    for prefix in wanted.prefixes {
        source.unpack(&format!("{prefix}{release}"), &raw)?;
    }
    let uname = only_entry(&["lib/modules", "usr/lib/modules"].map(|p| raw.join(p)))?;
    let name = uname
        .file_name()
        .context("modules folder without a name")?
        .to_owned();
    let target = staged.join("modules/lib/modules").join(&name);
    stage_modules(&uname, &target)?;
    // Up to 7.1 the image is in boot/, from then on beside the modules.
    let image = [raw.join("boot"), uname.clone()]
        .iter()
        .filter_map(|place| std::fs::read_dir(place).ok())
        .flatten()
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .find(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz"))
        })
        .with_context(|| format!("no vmlinuz* in the packages of {release}"))?;
    std::fs::copy(&image, staged.join("vmlinuz"))?;
    ui::run(
        &format!("depmod {release}"),
        Command::new(super::find_program("depmod").context("depmod is missing: install kmod")?)
            .arg("-b")
            .arg(staged.join("modules"))
            .arg(&name),
    )?;
    let _ = std::fs::remove_dir_all(dir);
    // Last, so that an interrupted run leaves no half a kernel under the final name.
    std::fs::rename(&staged, dir).with_context(|| format!("creating {}", dir.display()))?;
    std::fs::remove_dir_all(&raw)?;
    Ok(())
}

fn only_entry(places: &[PathBuf]) -> Result<PathBuf> {
    places
        .iter()
        .filter_map(|place| std::fs::read_dir(place).ok())
        .flatten()
        .find_map(|entry| entry.ok().map(|e| e.path()))
        .context("the packages hold no modules folder")
}

fn stage_modules(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        if path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("modules."))
        {
            std::fs::copy(&path, to.join(path.file_name().unwrap_or_default()))?;
        }
    }
    for module in MODULES {
        let (source, target) = (
            from.join("kernel").join(module),
            to.join("kernel").join(module),
        );
        if source.is_dir() {
            copy_tree(&source, &target)?;
            continue;
        }
        for suffix in ["", ".xz"] {
            let source = PathBuf::from(format!("{}{suffix}", source.display()));
            if source.is_file() {
                std::fs::create_dir_all(target.parent().unwrap_or(to))?;
                std::fs::copy(&source, format!("{}{suffix}", target.display()))?;
            }
        }
    }
    decompress(to)
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            std::fs::copy(&path, &target)?;
        }
    }
    Ok(())
}

/// The guest's kmod need not know xz, and loading is faster without.
fn decompress(dir: &Path) -> Result<()> {
    let mut compressed = Vec::new();
    collect(dir, &mut compressed)?;
    for chunk in compressed.chunks(200) {
        ui::run(
            "decompressing modules",
            Command::new("xz").args(["-d", "-f"]).args(chunk),
        )?;
    }
    Ok(())
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, found)?;
        } else if path.extension().is_some_and(|e| e == "xz") {
            found.push(path);
        }
    }
    Ok(())
}

/// Compares with runs of digits taken as numbers: 6.12.9 before 6.12.100.
fn natural_order(a: &str, b: &str) -> Ordering {
    let key = |text: &str| -> Vec<u64> {
        text.split(|c: char| !c.is_ascii_digit())
            .filter(|part| !part.is_empty())
            .map(|part| part.parse().unwrap_or(u64::MAX))
            .collect()
    };
    key(a).cmp(&key(b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn releases_are_ordered_by_number() {
        assert_eq!(
            natural_order("6.12.100+deb12", "6.12.9+deb12"),
            Ordering::Greater
        );
    }

    #[test]
    fn only_cloud_images_of_the_series_are_candidates() {
        let all = names(&[
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64-dbg",
            "linux-image-6.12.1-cloud-amd64",
            "linux-image-6.1.0-56-amd64",
        ]);
        assert_eq!(
            packages_of("6.1").unwrap().candidates(&all),
            ["6.1.0-56-cloud-amd64"]
        );
    }

    #[test]
    fn an_image_without_its_modules_is_no_candidate() {
        let all = names(&[
            "linux-binary-7.2.6+deb13-cloud-amd64",
            "linux-binary-7.2.9+deb13-cloud-amd64",
            "linux-modules-7.2.6+deb13-cloud-amd64",
        ]);
        assert_eq!(
            packages_of("7.2").unwrap().candidates(&all),
            ["7.2.6+deb13-cloud-amd64"]
        );
    }

    #[test]
    fn an_unknown_series_is_refused_by_name() {
        let error = packages_of("5.4").err().unwrap().to_string();
        assert!(error.contains("6.1, 6.12, 7.2"), "{error}");
    }
}
