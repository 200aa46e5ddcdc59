//! Asks the kernel what it would decide: the very function that judges connections, over
//! the very maps, run on questions of ours (`BPF_PROG_RUN`).

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aya::{
    Ebpf,
    programs::{Program, SchedClassifier, TestRun, TestRunOptions},
};
use ringfence_bpf_common::{JUDGE_BATCH, JUDGE_HEADER, Query, Question, Verdict};

use crate::{Datapath, DatapathError, attach::program_error};

impl Datapath {
    /// What the kernel decides about each query now. Nothing is counted or recorded.
    pub fn judge(&self, queries: &[Query]) -> Result<Vec<Verdict>, DatapathError> {
        let mut object = self.judge.lock();
        let program = loaded(&mut object)?;
        let mut verdicts = Vec::with_capacity(queries.len());
        for batch in queries.chunks(JUDGE_BATCH) {
            let (answers, _) = run(program, batch, 1)?;
            verdicts.extend(answers);
        }
        Ok(verdicts)
    }

    /// How long the kernel takes to decide, in nanoseconds: the mean over `rounds` runs of
    /// a batch that has the query 64 times, so that what surrounds a run hardly counts.
    pub fn time_verdict(&self, query: &Query, rounds: u32) -> Result<f64, DatapathError> {
        let mut object = self.judge.lock();
        let (_, time) = run(loaded(&mut object)?, &[*query; JUDGE_BATCH], rounds)?;
        Ok(time.as_secs_f64() * 1e9 / JUDGE_BATCH as f64)
    }
}

const JUDGE: &str = "ringfence_judge";

/// The node's object, for its program that is never attached.
#[derive(Default)]
pub(crate) struct Judge(Mutex<Option<Ebpf>>);

impl Judge {
    pub(crate) fn keep(&self, node: Ebpf) {
        *self.lock() = Some(node);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Ebpf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Judge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Judge").finish_non_exhaustive()
    }
}

/// The program, given to the kernel when it is first asked: an agent does without.
fn loaded(object: &mut Option<Ebpf>) -> Result<&SchedClassifier, DatapathError> {
    let program = object.as_mut().and_then(|node| node.program_mut(JUDGE));
    let Some(Program::SchedClassifier(program)) = program else {
        return Err(DatapathError::Missing { name: JUDGE });
    };
    if program.fd().is_err() {
        program
            .load()
            .map_err(|source| program_error(JUDGE, source))?;
    }
    Ok(program)
}

/// Runs one batch, of at most [`JUDGE_BATCH`].
fn run(
    program: &SchedClassifier,
    queries: &[Query],
    rounds: u32,
) -> Result<(Vec<Verdict>, Duration), DatapathError> {
    let mut packet = vec![0; JUDGE_HEADER];
    for query in queries {
        packet.extend_from_slice(&Question::new(query).to_bytes());
    }
    let mut answered = vec![0; packet.len()];
    let options = TestRunOptions {
        data_in: Some(&packet),
        data_out: Some(&mut answered),
        repeat: rounds.max(1),
        ..TestRunOptions::default()
    };
    let result = program
        .test_run(options)
        .map_err(|source| program_error(JUDGE, source))?;
    let (questions, _) = answered
        .get(JUDGE_HEADER..)
        .unwrap_or_default()
        .as_chunks::<{ size_of::<Question>() }>();
    let verdicts: Vec<Verdict> = questions
        .iter()
        .filter_map(|bytes| Question::from_bytes(*bytes).verdict())
        .collect();
    // Anything else would be answers that belong to other questions.
    if verdicts.len() != queries.len() || result.return_value as usize != queries.len() {
        return Err(DatapathError::Unanswered {
            asked: queries.len(),
            answered: verdicts.len(),
        });
    }
    Ok((verdicts, result.duration))
}
