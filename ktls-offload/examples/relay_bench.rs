//! Two relays and a tunnel between two applications, all in this process, beside the same
//! applications without a mesh: throughput, round trips and CPU time of the data path
//! alone. For whole agents use `cargo xtask bench`.
//!
//! `cargo run --release -p ktls-offload --example relay_bench`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{SOFTWARE, stream, tcp_pair, tunnels};
use ktls_offload::{RecordLayer, probe};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const BULK: usize = 2 << 30;
const PINGS: usize = 20_000;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let mut layers = vec![("software", SOFTWARE)];
    let kernel = probe();
    println!("record layer of this kernel: {kernel}");
    if let RecordLayer::Kernel(_) = kernel {
        layers.push(("kernel", kernel));
    }
    let scale: usize = std::env::args()
        .nth(1)
        .map_or(1, |s| s.parse().expect("a divisor of the amounts"));
    runtime.block_on(async {
        for _ in 0..3 {
            let (a, b) = tcp_pair().await;
            report("no mesh", a, b, scale).await;
            for (name, layer) in &layers {
                let (client, server) = tunnels(*layer).await;
                let s = stream(client, server).await;
                report(name, s.client, s.server, scale).await;
            }
        }
    });
}

async fn report(name: &str, mut a: TcpStream, mut b: TcpStream, scale: usize) {
    a.set_nodelay(true).unwrap();
    b.set_nodelay(true).unwrap();
    let p50 = pings(&mut a, &mut b, PINGS / scale).await;
    let cpu = cpu_time();
    let start = Instant::now();
    let amount = BULK / scale;
    let writer = tokio::spawn(async move {
        let chunk = vec![7u8; 128 * 1024];
        let mut left = amount;
        while left > 0 {
            let n = left.min(chunk.len());
            a.write_all(&chunk[..n]).await.unwrap();
            left -= n;
        }
        a
    });
    let mut sink = vec![0u8; 256 * 1024];
    let mut got = 0;
    while got < amount {
        got += b.read(&mut sink).await.unwrap();
    }
    let took = start.elapsed();
    drop(writer.await.unwrap());
    let gib = amount as f64 / (1u64 << 30) as f64;
    println!(
        "{name:9} {:7.2} GiB/s  {:5.2} CPU s/GiB  1 KiB round trip p50 {:5.1} us",
        gib / took.as_secs_f64(),
        (cpu_time() - cpu).as_secs_f64() / gib,
        p50.as_secs_f64() * 1e6
    );
}

async fn pings(a: &mut TcpStream, b: &mut TcpStream, rounds: usize) -> Duration {
    let mut times = Vec::with_capacity(rounds);
    let echo = async {
        let mut buf = [0; 1024];
        for _ in 0..rounds {
            b.read_exact(&mut buf).await.unwrap();
            b.write_all(&buf).await.unwrap();
        }
    };
    let ask = async {
        let mut buf = [0; 1024];
        for _ in 0..rounds {
            let start = Instant::now();
            a.write_all(&buf).await.unwrap();
            a.read_exact(&mut buf).await.unwrap();
            times.push(start.elapsed());
        }
    };
    tokio::join!(echo, ask);
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// User and system time of this process.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after = stat.rsplit(')').next().unwrap();
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}
