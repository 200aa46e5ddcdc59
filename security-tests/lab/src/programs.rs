//! The unmodified programs of the lab: nginx, redis and iperf3.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::{spawn_daemon, tail, wait_until};
use crate::topology::{Pod, Role};

/// Starts what the pod serves and waits until it listens. `dir` takes configurations, logs
/// and the files that nginx serves.
pub fn start(pod: &Pod, dir: &Path, blob_bytes: u64) -> Result<Vec<Child>> {
    if !pod.spec.serves {
        return Ok(Vec::new());
    }
    std::fs::create_dir_all(dir.join("www"))?;
    let mut started = vec![start_nginx(pod, dir, blob_bytes)?, start_iperf3(pod, dir)?];
    if pod.spec.role == Role::Mesh {
        started.push(start_redis(pod, dir)?);
    }
    Ok(started)
}

/// nginx's log: one line per request, `client-address client-port status uri`.
pub fn nginx_log(dir: &Path) -> PathBuf {
    dir.join("access.log")
}

/// redis's log, with a line `Accepted address:port` per connection.
pub fn redis_log(dir: &Path) -> PathBuf {
    dir.join("redis.log")
}

/// iperf3's log, with a line `Accepted connection from …` per test.
pub fn iperf3_log(dir: &Path) -> PathBuf {
    dir.join("iperf3.log")
}

fn start_nginx(pod: &Pod, dir: &Path, blob_bytes: u64) -> Result<Child> {
    let www = dir.join("www");
    std::fs::write(
        www.join("index.html"),
        format!("This is {} of the Ringfence lab.\n", pod.name()),
    )?;
    random_file(&www.join("blob"), blob_bytes)?;
    let config = dir.join("nginx.conf");
    std::fs::write(&config, nginx_config(dir))?;
    let mut command = pod.netns().command("nginx")?;
    command
        .arg("-e")
        .arg(dir.join("nginx-error.log"))
        .arg("-p")
        .arg(dir)
        .arg("-c")
        .arg(&config);
    let log = dir.join("nginx.log");
    let child = spawn_daemon(command, &log)?;
    listening(pod, 8080, &log)?;
    Ok(child)
}

fn nginx_config(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "daemon off; user root; worker_processes 2; pid {dir}/nginx.pid; error_log {dir}/nginx-error.log;
events {{ worker_connections 8192; }}
http {{
  log_format lab '$remote_addr $remote_port $status $request_uri';
  access_log {dir}/access.log lab;
  sendfile on; tcp_nopush on; keepalive_requests 100000000; client_max_body_size 0;
  client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
  server {{
    listen 0.0.0.0:8080 backlog=4096; listen [::]:8080 ipv6only=on backlog=4096;
    root {dir}/www; default_type text/plain;
    location = /address {{ return 200 '$remote_addr\\n'; }}
    location = /bench {{ access_log off; return 200 'ringfence\\n'; }}
    location /echo/ {{ return 200 '$request_uri\\n'; }}
  }}
}}
"
    )
}

fn start_redis(pod: &Pod, dir: &Path) -> Result<Child> {
    let mut command = pod.netns().command("redis-server")?;
    command.args([
        "--bind",
        "0.0.0.0",
        "::",
        "--port",
        "6379",
        "--protected-mode",
        "no",
    ]);
    command
        .args(["--save", "", "--loglevel", "verbose", "--dir"])
        .arg(dir);
    let child = spawn_daemon(command, &redis_log(dir))?;
    listening(pod, 6379, &redis_log(dir))?;
    Ok(child)
}

fn start_iperf3(pod: &Pod, dir: &Path) -> Result<Child> {
    let mut command = pod.netns().command("iperf3")?;
    command.args(["--server", "--forceflush"]);
    let child = spawn_daemon(command, &iperf3_log(dir))?;
    listening(pod, 5201, &iperf3_log(dir))?;
    Ok(child)
}

/// Waits until something listens on the port. Looking at the kernel's table instead of
/// connecting keeps the programs' logs free of connections that nobody made.
fn listening(pod: &Pod, port: u16, log: &Path) -> Result<()> {
    let wanted = format!(":{port:04X} ");
    wait_until(
        &format!("port {port} of {}", pod.name()),
        Duration::from_secs(30),
        || {
            for table in ["tcp", "tcp6"] {
                let text = pod.netns().proc_net(table)?;
                // State 0A is LISTEN.
                if text
                    .lines()
                    .any(|line| line.contains(&wanted) && line.contains(" 0A "))
                {
                    return Ok(());
                }
            }
            anyhow::bail!(
                "nothing listens; the end of {}:\n{}",
                log.display(),
                tail(log, 10)
            )
        },
    )
}

fn random_file(path: &Path, bytes: u64) -> Result<()> {
    let mut random = File::open("/dev/urandom")?.take(bytes);
    let mut file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    std::io::copy(&mut random, &mut file)?;
    file.flush()?;
    Ok(())
}

/// One request and the whole answer's body, by plain HTTP/1.0; for tests that must not
/// depend on a client program.
pub fn http_get(address: SocketAddr, path: &str, patience: Duration) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: lab\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer
        .split_once("\r\n\r\n")
        .context("an answer without a body")?;
    Ok(body.to_owned())
}
