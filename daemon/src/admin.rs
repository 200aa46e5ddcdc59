//! The admin socket: `GET /status` (JSON) and `GET /metrics` (OpenMetrics text) over
//! HTTP/1.1 on a Unix socket that only its owner can open.

use std::convert::Infallible;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};

use crate::agent::Agent;
use crate::status::Status;

/// Binds the socket; a leftover of an agent that is gone is replaced, one that answers
/// is an error.
pub async fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        let named = |what: &str| {
            io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{}: {what}", path.display()),
            )
        };
        if !metadata.file_type().is_socket() {
            return Err(named("exists and is not a socket"));
        }
        if UnixStream::connect(path).await.is_ok() {
            return Err(named("another agent answers there"));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, agent: Arc<Agent>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "admin socket: accept failed");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let agent = agent.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, &agent));
            let served = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "admin connection ended");
            }
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    agent: &Agent,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/status") => match serde_json::to_vec(&agent.status()) {
            Ok(json) => (StatusCode::OK, "application/json", json),
            Err(e) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "text/plain",
                e.to_string().into(),
            ),
        },
        (&Method::GET, "/metrics") => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, kind, agent.metrics_text().into())
        }
        _ => (
            StatusCode::NOT_FOUND,
            "text/plain",
            b"try /status or /metrics\n".to_vec(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static(kind),
    );
    Ok(response)
}

/// Asks an agent for its status.
pub async fn fetch_status(path: &Path) -> anyhow::Result<Status> {
    Ok(serde_json::from_slice(&get(path, "/status").await?)?)
}

/// Fetches one page of the admin socket.
pub async fn get(path: &Path, page: &'static str) -> anyhow::Result<Bytes> {
    use anyhow::Context;
    let stream = UnixStream::connect(path).await.with_context(|| {
        format!(
            "no agent answers on {} (is it running? `--socket` names another)",
            path.display()
        )
    })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .uri(page)
        .header("host", "ringfence")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    anyhow::ensure!(
        response.status().is_success(),
        "the agent answered {}",
        response.status()
    );
    let body = response.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok(body)
}
