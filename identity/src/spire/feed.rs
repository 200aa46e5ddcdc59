//! A stream that is kept open: the newest value, or why there is none.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::source::FetchProblem;

/// The reading end. Dropping it ends the stream.
pub(super) struct Feed<T> {
    state: watch::Receiver<State<T>>,
    retry: Arc<Notify>,
    task: JoinHandle<()>,
}

impl<T: Send + Sync + 'static> Feed<T> {
    /// Runs `once` on the current tokio runtime, again and again. It publishes
    /// what comes over one stream and answers why the stream ended.
    pub(super) fn start<F>(once: impl Fn(Publisher<T>) -> F + Send + 'static) -> Self
    where
        F: Future<Output = FetchProblem> + Send,
    {
        let (sender, state) = watch::channel(State {
            latest: None,
            problem: None,
            down: false,
            values: 0,
        });
        let publisher = Publisher(Arc::new(sender));
        let retry = Arc::new(Notify::new());
        let kicked = Arc::clone(&retry);
        let task = tokio::spawn(async move {
            let mut failures = 0u32;
            loop {
                let before = publisher.0.borrow().values;
                let problem = once(publisher.clone()).await;
                // A stream that worked for a while is not a row of failures.
                let worked = publisher.0.borrow().values != before;
                failures = if worked {
                    0
                } else {
                    failures.saturating_add(1)
                };
                publisher.ended(problem);
                tokio::select! {
                    () = tokio::time::sleep(backoff(failures)) => {}
                    () = kicked.notified() => {}
                }
            }
        });
        Self { state, retry, task }
    }

    /// The newest value. While the stream is down, one more try is made at once
    /// and its outcome awaited, at most for `timeout`.
    pub(super) async fn value(&self, timeout: Duration) -> Result<Arc<T>, FetchProblem> {
        let mut state = self.state.clone();
        let before = current(&mut state);
        match &before {
            Current::Value(value) => return Ok(Arc::clone(value)),
            Current::Unusable(problem) => return Err(problem.clone()),
            Current::Down(_) => self.retry.notify_one(),
            Current::Nothing => {}
        }
        let answer = async {
            loop {
                if state.changed().await.is_err() {
                    return Err(FetchProblem::Internal("the stream's task ended".to_owned()));
                }
                match current(&mut state) {
                    Current::Value(value) => return Ok(value),
                    Current::Unusable(problem) | Current::Down(problem) => return Err(problem),
                    Current::Nothing => {}
                }
            }
        };
        match (tokio::time::timeout(timeout, answer).await, before) {
            (Ok(outcome), _) => outcome,
            (Err(_), Current::Down(problem)) => Err(problem),
            (Err(_), _) => Err(FetchProblem::TimedOut(timeout)),
        }
    }
}

impl<T> Drop for Feed<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The writing end.
pub(super) struct Publisher<T>(Arc<watch::Sender<State<T>>>);

impl<T> Clone for Publisher<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Publisher<T> {
    /// A value came.
    pub(super) fn publish(&self, value: T) {
        self.0.send_modify(|state| {
            state.latest = Some(Arc::new(value));
            state.problem = None;
            state.down = false;
            state.values = state.values.wrapping_add(1);
        });
    }

    /// Something came that cannot be used; the stream goes on.
    pub(super) fn failed(&self, problem: FetchProblem) {
        self.0.send_modify(|state| {
            state.problem = Some(problem);
            state.down = false;
        });
    }

    fn ended(&self, problem: FetchProblem) {
        self.0.send_modify(|state| {
            state.problem = Some(problem);
            state.down = true;
        });
    }
}

struct State<T> {
    latest: Option<Arc<T>>,
    /// Newer than `latest`.
    problem: Option<FetchProblem>,
    down: bool,
    values: u64,
}

enum Current<T> {
    Nothing,
    Value(Arc<T>),
    /// Asking again will not help: the other side knows better.
    Unusable(FetchProblem),
    Down(FetchProblem),
}

fn current<T>(state: &mut watch::Receiver<State<T>>) -> Current<T> {
    let state = state.borrow_and_update();
    match (&state.problem, &state.latest) {
        (Some(problem), _) if state.down => Current::Down(problem.clone()),
        (Some(problem), _) => Current::Unusable(problem.clone()),
        (None, Some(value)) => Current::Value(Arc::clone(value)),
        (None, None) => Current::Nothing,
    }
}

/// 500 ms, doubling to 32 s, cut by up to a quarter.
fn backoff(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(6);
    let wait = Duration::from_millis(500).saturating_mul(1u32.wrapping_shl(doublings));
    wait.mul_f64(rand::rng().random_range(0.75..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_start_after_half_a_second_and_stop_doubling_at_32_s() {
        for (failures, longest) in [
            (0, 500),
            (1, 500),
            (2, 1000),
            (7, 32_000),
            (u32::MAX, 32_000),
        ] {
            let wait = backoff(failures).as_millis();
            assert!(wait <= longest && wait >= longest * 3 / 4, "{wait}");
        }
    }
}
