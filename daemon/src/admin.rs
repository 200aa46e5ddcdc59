//! The admin socket: HTTP/1.1 on a Unix socket that only its owner can open.
//!
//! `GET /status` and `GET /policies` (JSON), `GET /metrics` (OpenMetrics text), `POST
//! /authz/explain`, `/authz/dry-run` and `/authz/log` (JSON both ways). A question that is
//! wrong is answered by 400 and what is wrong with it.

use std::convert::Infallible;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream};

use crate::agent::{Agent, Unanswered};
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

/// Bytes of a question: manifests of some thousand policies.
const MOST_BYTES: usize = 16 << 20;

/// Status, content type and content.
type Page = (StatusCode, &'static str, Vec<u8>);

const JSON: &str = "application/json";
const TEXT: &str = "text/plain";

async fn answer(
    request: Request<Incoming>,
    agent: &Arc<Agent>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (parts, body) = request.into_parts();
    let (status, kind, body) = match (&parts.method, parts.uri.path()) {
        (&Method::GET, "/status") => json(&agent.status()),
        (&Method::GET, "/policies") => json(&agent.applied()),
        (&Method::GET, "/metrics") => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, kind, agent.metrics_text().into())
        }
        (&Method::POST, "/authz/explain") => {
            ask(body, agent, |agent, request| agent.explain(request)).await
        }
        (&Method::POST, "/authz/dry-run") => {
            ask(body, agent, |agent, request| agent.dry_run(request)).await
        }
        (&Method::POST, "/authz/log") => match read(body).await {
            Ok(request) => json(&agent.verdicts(&request).await),
            Err(page) => page,
        },
        _ => (
            StatusCode::NOT_FOUND,
            TEXT,
            b"try GET /status, /policies or /metrics\n".to_vec(),
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

/// Answers a question that may take a while, on a thread where it may.
async fn ask<Q, A>(
    body: Incoming,
    agent: &Arc<Agent>,
    answer: impl FnOnce(&Agent, &Q) -> Result<A, Unanswered> + Send + 'static,
) -> Page
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
{
    let request: Q = match read(body).await {
        Ok(request) => request,
        Err(page) => return page,
    };
    let agent = agent.clone();
    match tokio::task::spawn_blocking(move || answer(&agent, &request)).await {
        Ok(Ok(answer)) => json(&answer),
        Ok(Err(error @ Unanswered::Question(_))) => refusal(&error),
        Ok(Err(error @ Unanswered::Kernel(_))) => failure(&error),
        Err(error) => failure(&error),
    }
}

async fn read<Q: DeserializeOwned>(body: Incoming) -> Result<Q, Page> {
    let body = match Limited::new(body, MOST_BYTES).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Err(refusal(&error)),
    };
    serde_json::from_slice(&body).map_err(|error| refusal(&error))
}

fn json(answer: &impl Serialize) -> Page {
    match serde_json::to_vec(answer) {
        Ok(json) => (StatusCode::OK, JSON, json),
        Err(error) => failure(&error),
    }
}

fn refusal(error: &dyn std::fmt::Display) -> Page {
    (StatusCode::BAD_REQUEST, TEXT, error.to_string().into())
}

fn failure(error: &dyn std::fmt::Display) -> Page {
    (
        StatusCode::INTERNAL_SERVER_ERROR,
        TEXT,
        error.to_string().into(),
    )
}

/// Asks an agent for its status.
pub async fn fetch_status(path: &Path) -> anyhow::Result<Status> {
    Ok(serde_json::from_slice(&get(path, "/status").await?)?)
}

/// Fetches one page of the admin socket.
pub async fn get(path: &Path, page: &'static str) -> anyhow::Result<Bytes> {
    send(path, Method::GET, page, Vec::new()).await
}

/// Asks the admin socket a question, in JSON.
pub async fn post(path: &Path, page: &'static str, question: Vec<u8>) -> anyhow::Result<Bytes> {
    send(path, Method::POST, page, question).await
}

async fn send(
    path: &Path,
    method: Method,
    page: &'static str,
    body: Vec<u8>,
) -> anyhow::Result<Bytes> {
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
        .method(method)
        .uri(page)
        .header("host", "ringfence")
        .body(Full::<Bytes>::from(body))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    driver.abort();
    match status {
        StatusCode::OK => Ok(body),
        StatusCode::BAD_REQUEST => anyhow::bail!("{}", String::from_utf8_lossy(&body)),
        StatusCode::NOT_FOUND => anyhow::bail!("the agent has no {page}: is it an older version?"),
        _ => anyhow::bail!(
            "the agent answered {status}: {}",
            String::from_utf8_lossy(&body)
        ),
    }
}
