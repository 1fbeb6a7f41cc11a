//! Reads chunks ahead, so that the next one is there when the last is used up.

use std::sync::Arc;

use bson::RawBson;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::steer::LiveSettings;
use crate::error::Result;
use crate::mongo::source::{Candidate, TargetCollection};

/// One chunk waits while another is worked on; a third would only grow stale.
const CHUNKS_AHEAD: usize = 1;

/// A run of candidates.
#[derive(Debug)]
pub struct Chunk {
    /// The documents, confirmed as candidates when they were read.
    pub candidates: Vec<Candidate>,
    /// When they were confirmed.
    pub read_at: Instant,
    /// The `_id` at which the chunk ends.
    pub end: RawBson,
}

/// What a pass may read at most.
#[derive(Debug)]
pub struct Pass {
    /// Where the pass before stopped, if it did so before its end.
    pub after: Option<RawBson>,
    /// The highest `_id` that belongs to the pass. What is inserted above it
    /// while the pass runs waits for a later one.
    pub bound: RawBson,
    /// Documents to read at most: what is inserted below the bound can't extend
    /// the pass without end either.
    pub most: u64,
    /// Whether to read where nothing is missing, however far members lag.
    pub on_primary: bool,
    /// Tells how many documents a chunk has; looked up for each.
    pub live: Arc<LiveSettings>,
}

/// How far reading came.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// To the end of the pass.
    Whole,
    /// Only to this `_id`, because the pass may read no more.
    Cut(RawBson),
}

/// Starts reading a pass; the channel ends with the pass.
pub fn read_ahead(
    collection: Arc<TargetCollection>,
    pass: Pass,
    stop: CancellationToken,
) -> (mpsc::Receiver<Result<Chunk>>, JoinHandle<Ending>) {
    let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
    let reading = tokio::spawn(async move {
        let mut last = pass.after;
        let mut left = pass.most;
        while !stop.is_cancelled() {
            if left == 0 {
                return last.map_or(Ending::Whole, Ending::Cut);
            }
            let limit = usize::try_from(left).unwrap_or(usize::MAX).min(pass.live.chunk());
            let read = collection.chunk(last.as_ref(), &pass.bound, limit, pass.on_primary).await;
            let chunk = match read {
                Ok((_, None)) => return Ending::Whole,
                Ok((candidates, Some(end))) => {
                    left = left.saturating_sub(u64::try_from(candidates.len()).unwrap_or(u64::MAX));
                    last = Some(end.clone());
                    Ok(Chunk { candidates, read_at: Instant::now(), end })
                }
                Err(error) => Err(error),
            };
            let failed = chunk.is_err();
            if sender.send(chunk).await.is_err() || failed {
                break;
            }
        }
        Ending::Whole
    });
    (receiver, reading)
}
