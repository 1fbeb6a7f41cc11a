//! Sparing the database for the sake of which a job pauses: its signals are read
//! again and again beside the work.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::joined;
use crate::event::Events;
use crate::mongo::Mongo;
use crate::mongo::health::HealthProbe;
use crate::throttle::health::HealthJudge;
use crate::throttle::waiting::Waiting;

/// Between two looks at the database's health.
const INTERVAL: Duration = Duration::from_secs(2);

/// Calls `pause` when a reason to pause begins or ends: while the database says
/// that it can't keep up, or no longer says how it is. Goes on until dropped.
pub async fn watch(mongo: Mongo, max_lag: Duration, events: Events, pause: impl Fn(Waiting, bool)) {
    let mut judge = HealthJudge::new(max_lag, Instant::now());
    let mut probe = HealthProbe::new(mongo);
    let mut holding: Vec<Waiting> = Vec::new();
    loop {
        // A task of its own: a reading that hangs must not keep the judge from
        // noticing it, and must be heard out all the same.
        let mut reading = tokio::spawn(async move {
            let reading = probe.read().await;
            (probe, reading)
        });
        let result = loop {
            tokio::select! {
                done = &mut reading => break joined(done),
                () = tokio::time::sleep(INTERVAL) => {
                    tell(&judge.judge(Instant::now(), None), &mut holding, &events, &pause);
                }
            }
        };
        let Ok((same, reading)) = result else { return };
        probe = same;
        if let Err(error) = &reading {
            tracing::info!(%error, "the health of the database can't be read");
        }
        tell(&judge.judge(Instant::now(), reading.ok()), &mut holding, &events, &pause);
        tokio::time::sleep(INTERVAL).await;
    }
}

fn tell(
    reasons: &[(Waiting, bool)],
    holding: &mut Vec<Waiting>,
    events: &Events,
    pause: &impl Fn(Waiting, bool),
) {
    for (reason, holds) in reasons {
        if holding.contains(reason) == *holds {
            continue;
        }
        pause(*reason, *holds);
        if *holds {
            holding.push(*reason);
            events.warn(format!("paused for the sake of the database: {reason}"));
        } else {
            holding.retain(|other| other != reason);
            events.note(format!("{reason} is over"));
        }
    }
}
