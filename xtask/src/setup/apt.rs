//! Debian packages: the machine's own, by apt-get; and archives that are only unpacked, from
//! a second package source with lists of its own, so that the machine's apt never sees it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::find_program;
use crate::ui;

/// A program and the Debian package that has it.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    pub name: &'static str,
    pub package: &'static str,
}

impl Program {
    pub const fn new(name: &'static str, package: &'static str) -> Self {
        Program { name, package }
    }
}

/// Packages whose installation would start a daemon.
const SERVICES: &[(&str, &str)] = &[("nginx-light", "nginx"), ("redis-server", "redis-server")];

/// Installs the packages of the programs that are not there.
pub fn ensure_programs(programs: &[Program]) -> Result<()> {
    let mut missing: Vec<&str> = programs
        .iter()
        .filter(|p| find_program(p.name).is_none())
        .map(|p| p.package)
        .collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)?;
    for program in programs {
        ensure!(
            find_program(program.name).is_some(),
            "the package {} was installed and brought no `{}`: install that program by hand",
            program.package,
            program.name
        );
    }
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if find_program("apt-get").is_none() {
        bail!("missing programs, and no apt-get to install them: install what Debian calls {list}");
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("missing programs; as root, run: apt-get install {list}");
    }
    let services: Vec<&str> = SERVICES
        .iter()
        .filter(|(package, _)| packages.contains(package))
        .map(|(_, service)| *service)
        .collect();
    ui::line(format!("installing Debian packages: {list}"));
    ui::run("apt-get update", apt_get().arg("update"))?;
    let quiet = ServicesKeptDown::new(&services);
    ui::run(
        "apt-get install",
        apt_get()
            .args(["install", "--no-install-recommends"])
            .args(packages),
    )?;
    drop(quiet);
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .args(["-y", "-q"])
        .env("DEBIAN_FRONTEND", "noninteractive")
        // invoke-rc.d starts nothing in run level 1.
        .env("RUNLEVEL", "1");
    command
}

/// Keeps a package's daemon from starting while it is installed: the lab starts its own,
/// in its own namespaces. With systemd the unit is masked for the time; without, run
/// level 1 does it, and a daemon that started all the same is stopped.
struct ServicesKeptDown<'a>(&'a [&'a str]);

impl<'a> ServicesKeptDown<'a> {
    fn new(services: &'a [&'a str]) -> Self {
        if systemd_runs() {
            for service in services {
                best_effort("systemctl", &["mask", "--runtime", service]);
            }
        }
        ServicesKeptDown(services)
    }
}

impl Drop for ServicesKeptDown<'_> {
    fn drop(&mut self) {
        for service in self.0 {
            if systemd_runs() {
                best_effort("systemctl", &["unmask", "--runtime", service]);
                best_effort("systemctl", &["disable", service]);
            } else if Path::new("/etc/init.d").join(service).exists() {
                best_effort("invoke-rc.d", &["--force", service, "stop"]);
            }
        }
    }
}

fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").exists()
}

fn best_effort(program: &str, args: &[&str]) {
    let _ = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// A suite of the second source, and which of the machine's mirrors has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    Main(&'static str),
    Security(&'static str),
}

/// A package source beside the machine's own: own list of suites, own index files, used
/// only to download archives. Neither root nor a change to `/etc/apt` is needed.
#[derive(Debug)]
pub struct SideSource {
    dir: PathBuf,
}

impl SideSource {
    /// Writes the source list for `suites` into `dir` and fetches the package indices.
    pub fn open(dir: &Path, suites: &[Suite]) -> Result<Self> {
        ensure!(
            find_program("apt-get").is_some(),
            "no apt-get on this machine: guest kernels can only be fetched on Debian"
        );
        for part in ["lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(dir.join(part))
                .with_context(|| format!("creating {}", dir.display()))?;
        }
        let mirrors = Mirrors::of_this_machine()?;
        let text: String = suites
            .iter()
            .map(|suite| {
                let (mirror, name) = match suite {
                    Suite::Main(name) => (&mirrors.main, name),
                    Suite::Security(name) => (&mirrors.security, name),
                };
                format!("deb [signed-by={KEYRING}] {mirror} {name} main\n")
            })
            .collect();
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing: install the package debian-archive-keyring"
        );
        std::fs::write(dir.join("sources.list"), text)?;
        let source = SideSource {
            dir: dir.to_owned(),
        };
        ui::run(
            "reading Debian's package lists",
            source.apt("apt-get").arg("update"),
        )?;
        Ok(source)
    }

    /// Names of all packages of the source.
    pub fn package_names(&self) -> Result<Vec<String>> {
        let output = self
            .apt("apt-cache")
            .arg("pkgnames")
            .stderr(Stdio::null())
            .output()?;
        ensure!(
            output.status.success(),
            "apt-cache pkgnames ended with {}",
            output.status
        );
        Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(str::to_owned)
            .collect())
    }

    /// Downloads `package` and unpacks it below `into`.
    pub fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let archives = self.dir.join("downloads").join(package);
        let _ = std::fs::remove_dir_all(&archives);
        std::fs::create_dir_all(&archives)?;
        ui::run(
            &format!("downloading {package}"),
            self.apt("apt-get")
                .args(["download", package])
                .current_dir(&archives),
        )?;
        let archive = std::fs::read_dir(&archives)?
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .find(|path| path.extension().is_some_and(|e| e == "deb"))
            .with_context(|| format!("apt-get downloaded no archive for {package}"))?;
        std::fs::create_dir_all(into)?;
        ui::run(
            &format!("unpacking {package}"),
            Command::new("dpkg").arg("-x").arg(&archive).arg(into),
        )?;
        std::fs::remove_dir_all(&archives)?;
        Ok(())
    }

    fn apt(&self, program: &str) -> Command {
        let option = |name: &str, value: &Path| format!("{name}={}", value.display());
        let mut command = Command::new(program);
        command
            .args(["-q", "-o", "Dir::Etc::sourceparts=/dev/null"])
            .args([
                "-o",
                &option("Dir::Etc::sourcelist", &self.dir.join("sources.list")),
            ])
            .args(["-o", &option("Dir::State::lists", &self.dir.join("lists"))])
            .args(["-o", &option("Dir::Cache", &self.dir.join("cache"))])
            .args([
                "-o",
                "Acquire::Languages=none",
                "-o",
                "APT::Sandbox::User=root",
            ])
            .args([
                "-o",
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            ])
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where this machine takes Debian from.
#[derive(Debug, PartialEq, Eq)]
struct Mirrors {
    main: String,
    security: String,
}

impl Mirrors {
    fn of_this_machine() -> Result<Self> {
        let output = Command::new("apt-get")
            .args([
                "indextargets",
                "--format",
                "$(REPO_URI)|$(RELEASE)",
                "Created-By: Packages",
            ])
            .output()
            .context("starting apt-get")?;
        Self::parse(&String::from_utf8_lossy(&output.stdout)).context(
            "the machine's apt configuration names no Debian mirror: add a Debian source, or put \
             a guest kernel into the cache by hand (`kernels/<version>/vmlinuz` and `modules/`)",
        )
    }

    /// Parses `URI|release` lines. A mirror without a security entry of its own is taken to
    /// hold the security archive beside the main one, as Debian's mirrors do.
    fn parse(targets: &str) -> Option<Self> {
        let entries: Vec<(&str, &str)> = targets
            .lines()
            .filter_map(|line| line.split_once('|'))
            .collect();
        let debian = |uri: &str| uri.contains("debian");
        let main = entries
            .iter()
            .find(|(uri, release)| debian(uri) && !release.contains("security"))
            .map(|(uri, _)| (*uri).to_owned())?;
        let security = entries
            .iter()
            .find(|(uri, release)| debian(uri) && release.ends_with("-security"))
            .map(|(uri, _)| (*uri).to_owned())
            .unwrap_or_else(|| format!("{}-security", main.trim_end_matches('/')));
        Some(Mirrors { main, security })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::Mirrors;

    #[test]
    fn mirrors_come_from_the_machines_own_targets() {
        let mirrors = Mirrors::parse(
            "http://mirror.test/debian-security/|bookworm-security\nhttp://mirror.test/debian/|bookworm\n",
        )
        .unwrap();
        assert_eq!(mirrors.main, "http://mirror.test/debian/");
        assert_eq!(mirrors.security, "http://mirror.test/debian-security/");
    }

    #[test]
    fn a_missing_security_entry_is_derived_from_the_main_mirror() {
        let mirrors = Mirrors::parse("http://mirror.test/debian/|trixie\n").unwrap();
        assert_eq!(mirrors.security, "http://mirror.test/debian-security");
    }

    #[test]
    fn a_machine_without_debian_sources_has_no_mirror() {
        assert_eq!(Mirrors::parse("http://mirror.test/ubuntu/|noble\n"), None);
    }
}
