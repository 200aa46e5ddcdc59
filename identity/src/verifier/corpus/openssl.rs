//! What rcgen cannot make: weak algorithms, odd serial numbers and string types.

use std::path::PathBuf;
use std::process::Command;

use rustls_pki_types::pem::PemObject as _;
use tempfile::TempDir;

use super::*;

/// `None` where there is no openssl.
pub(super) fn cases() -> Option<Vec<Case>> {
    Command::new("openssl").arg("version").output().ok()?;
    let shop = Workshop {
        dir: tempfile::tempdir().unwrap(),
    };
    let p256 = shop.ca("p256", &["EC", "ec_paramgen_curve:P-256"], &["-sha256"]);
    let rsa = shop.ca("rsa", &["RSA", "rsa_keygen_bits:2048"], &["-sha256"]);
    let small = shop.ca("small", &["RSA", "rsa_keygen_bits:1024"], &["-sha256"]);
    let p521 = shop.ca("p521", &["EC", "ec_paramgen_curve:P-521"], &["-sha512"]);
    let ed448 = shop.ca("ed448", &["ED448"], &[]);

    let ec = ["EC", "ec_paramgen_curve:P-256"];
    let none: &[&str] = &[];
    let pss = ["-sha256", "-sigopt", "rsa_padding_mode:pss"];
    let salted = |length| [&pss[..], &["-sigopt", length]].concat();
    // TLS 1.3's is the length of the digest.
    let (pss, pss_32, pss_20) = (
        salted("rsa_pss_saltlen:digest"),
        salted("rsa_pss_saltlen:32"),
        salted("rsa_pss_saltlen:20"),
    );
    let mut cases = Vec::new();
    let mut case = |verdict: &'static str, name: &str, ca: &Ca, chain: CertificateDer<'static>| {
        let bundles = TrustBundles::new();
        let trusted = bundles.replace(
            "openssl",
            id().trust_domain(),
            std::slice::from_ref(&ca.root),
        );
        trusted.unwrap();
        cases.push(Case {
            name: format!("openssl: {name}"),
            verdict: Verdict {
                of_a_client: verdict,
                of_a_server: verdict,
            },
            trusted: Arc::new(bundles),
            chain: vec![chain],
        });
    };
    for (verdict, name, ca, key, options) in [
        (ACCEPTED, "P-256", &p256, &ec[..], none),
        (
            ACCEPTED,
            "RSA",
            &rsa,
            &["RSA", "rsa_keygen_bits:2048"],
            none,
        ),
        (ACCEPTED, "RSA root", &rsa, &ec, none),
        (ACCEPTED, "RSA-PSS signature", &rsa, &ec, &pss),
        (ACCEPTED, "RSA-PSS signature, salt 32", &rsa, &ec, &pss_32),
        (
            "weak-signature",
            "RSA-PSS signature, salt 20",
            &rsa,
            &ec,
            &pss_20,
        ),
        (ACCEPTED, "serial 0", &p256, &ec, &["-set_serial", "0"]),
        ("weak-signature", "SHA-1 signature", &rsa, &ec, &["-sha1"]),
        ("weak-signature", "MD5 signature", &rsa, &ec, &["-md5"]),
        ("weak-signature", "ECDSA with SHA-1", &p256, &ec, &["-sha1"]),
        ("weak-signature", "P-521 root", &p521, &ec, &["-sha512"]),
        ("weak-signature", "Ed448 root", &ed448, &ec, none),
        ("untrusted", "RSA-1024 root", &small, &ec, none),
        (
            "weak-key",
            "RSA-1024 key",
            &rsa,
            &["RSA", "rsa_keygen_bits:1024"],
            none,
        ),
        (
            "weak-key",
            "secp256k1 key",
            &p256,
            &["EC", "ec_paramgen_curve:secp256k1"],
            none,
        ),
        ("weak-key", "Ed448 key", &p256, &["ED448"], none),
        (
            ACCEPTED,
            "negative serial",
            &p256,
            &ec,
            &["-set_serial", "-5"],
        ),
    ] {
        let leaf = shop.leaf(ca, key, GOOD, UTF8_NAME, options);
        case(verdict, name, ca, leaf);
    }
    for (verdict, name, extensions) in [
        (
            ACCEPTED,
            "every kind of SAN",
            "subjectAltName=URI:spiffe://td/ns/shop/sa/cart,DNS:a.example,IP:::1,email:a@example.org,RID:1.2.3\nkeyUsage=digitalSignature\n",
        ),
        (
            ACCEPTED,
            "non-critical usage",
            "subjectAltName=URI:spiffe://td/ns/shop/sa/cart\nkeyUsage=digitalSignature\n",
        ),
        (
            "several-uri-sans",
            "two URIs",
            "subjectAltName=URI:spiffe://td/ns/shop/sa/cart,URI:spiffe://td/b\nkeyUsage=digitalSignature\n",
        ),
        ("no-uri-san", "no SAN", "keyUsage=digitalSignature\n"),
        (
            "key-usage",
            "no key usage",
            "subjectAltName=URI:spiffe://td/ns/shop/sa/cart\n",
        ),
        (
            "leaf-is-ca",
            "a CA",
            "subjectAltName=URI:spiffe://td/ns/shop/sa/cart\nbasicConstraints=CA:TRUE\nkeyUsage=digitalSignature\n",
        ),
        (
            "untrusted",
            "a critical extension nobody knows",
            "subjectAltName=URI:spiffe://td/ns/shop/sa/cart\nkeyUsage=digitalSignature\n1.2.3.4=critical,ASN1:NULL\n",
        ),
    ] {
        let leaf = shop.leaf(&p256, &ec, extensions, UTF8_NAME, none);
        case(verdict, name, &p256, leaf);
    }
    for (name, mask) in [
        ("BMPString subject", "MASK:0x800"),
        ("T61String subject", "MASK:0x4"),
    ] {
        let leaf = shop.leaf(&p256, &ec, GOOD, mask, none);
        case(ACCEPTED, name, &p256, leaf);
    }
    Some(cases)
}

const GOOD: &str = "subjectAltName=URI:spiffe://td/ns/shop/sa/cart\n\
    basicConstraints=critical,CA:FALSE\n\
    keyUsage=critical,digitalSignature\n\
    extendedKeyUsage=serverAuth,clientAuth\n";
const UTF8_NAME: &str = "utf8only";

struct Ca {
    root: CertificateDer<'static>,
    certificate: PathBuf,
    key: PathBuf,
    /// Options for the digest.
    digest: Vec<String>,
}

struct Workshop {
    dir: TempDir,
}

impl Workshop {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn key(&self, name: &str, algorithm: &[&str]) -> PathBuf {
        let path = self.path(name);
        let (kind, options) = algorithm.split_first().unwrap();
        let mut command = Command::new("openssl");
        command.args(["genpkey", "-quiet", "-algorithm", kind]);
        for option in options {
            command.args(["-pkeyopt", option]);
        }
        run(command.arg("-out").arg(&path));
        path
    }

    fn ca(&self, name: &str, algorithm: &[&str], digest: &[&str]) -> Ca {
        let key = self.key(&format!("{name}.key"), algorithm);
        let certificate = self.path(&format!("{name}.pem"));
        let config = self.config("root", UTF8_NAME);
        let usage = "keyUsage=critical,keyCertSign,cRLSign";
        run(Command::new("openssl")
            .args(["req", "-x509", "-days", "30", "-batch", "-config"])
            .arg(config)
            .args([
                "-addext",
                "basicConstraints=critical,CA:TRUE",
                "-addext",
                usage,
            ])
            .args(digest)
            .arg("-key")
            .arg(&key)
            .arg("-out")
            .arg(&certificate));
        Ca {
            root: CertificateDer::from_pem_file(&certificate).unwrap(),
            certificate,
            key,
            digest: digest.iter().map(|&option| option.to_owned()).collect(),
        }
    }

    fn leaf(
        &self,
        ca: &Ca,
        algorithm: &[&str],
        extensions: &str,
        string_mask: &str,
        options: &[&str],
    ) -> CertificateDer<'static> {
        let key = self.key("leaf.key", algorithm);
        let (request, file) = (self.path("leaf.csr"), self.path("leaf.ext"));
        std::fs::write(&file, extensions).unwrap();
        run(Command::new("openssl")
            .args(["req", "-new", "-batch", "-config"])
            .arg(self.config("leaf", string_mask))
            .arg("-key")
            .arg(&key)
            .arg("-out")
            .arg(&request));
        let leaf = self.path("leaf.pem");
        let mut command = Command::new("openssl");
        command
            .args(["x509", "-req", "-days", "1", "-in"])
            .arg(&request)
            .arg("-CA")
            .arg(&ca.certificate)
            .arg("-CAkey")
            .arg(&ca.key)
            .arg("-extfile")
            .arg(&file)
            .arg("-out")
            .arg(&leaf);
        if !options
            .iter()
            .any(|option| option.starts_with("-sha") || *option == "-md5")
        {
            command.args(&ca.digest);
        }
        run(command.args(options));
        CertificateDer::from_pem_file(&leaf).unwrap()
    }

    fn config(&self, common_name: &str, string_mask: &str) -> PathBuf {
        let path = self.path("req.conf");
        let text = format!(
            "[req]\nprompt=no\nutf8=yes\nstring_mask={string_mask}\n\
             distinguished_name=dn\n[dn]\nCN={common_name} \u{e9}\n"
        );
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
