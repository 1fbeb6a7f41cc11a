//! Watches both sides for a while.

use std::time::Duration;

use bson::{Document, RawBson, Timestamp};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::result::{self, DualWrite};
use super::watched::Watched;
use crate::Context;
use crate::config::values::Namespace;
use crate::error::{Class, Error, Result};
use crate::event::Progress;
use crate::mongo::Mongo;
use crate::mongo::feed::{Feed, Position, after, nudge};
use crate::mongo::watched::Watched as Changed;
use crate::verify::full::matching::Id;
use crate::verify::full::matching::Side;
use crate::verify::pairs::Pairs;

/// News that wait to be taken; the streams wait for room.
const QUEUE: usize = 1_000;
/// Documents that are looked at together.
const AT_ONCE: usize = 5_000;
/// How often what is due is looked at, and progress shown.
const TICK: Duration = Duration::from_millis(100);
/// What is open at the end is waited for so long besides twice the grace time.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// What to watch, and for how long.
#[derive(Debug)]
pub struct Order<'a> {
    /// The collection that is right.
    pub source: &'a Namespace,
    /// The collection that should be like it.
    pub target: &'a Namespace,
    /// Which documents of the source should be in the target.
    pub valid: Document,
    /// How long to watch.
    pub time: Duration,
    /// How long the other side may take to follow.
    pub grace: Duration,
    /// Differences to list.
    pub most: usize,
}

/// What a stream said.
struct News {
    side: Side,
    touched: Vec<RawBson>,
    at: Instant,
    reached: Option<Timestamp>,
    ended_by: Option<String>,
}

/// How far the watch is.
enum Stage {
    /// Everything that is touched is watched, until the time is over.
    Watching,
    /// The same, until the streams are known up to the end of that time.
    Ending(Timestamp),
    /// Nothing new is watched; what is open is judged until then.
    Judging(Instant),
}

/// All that goes on while both sides are watched.
struct Watch<'a> {
    context: &'a Context,
    order: &'a Order<'a>,
    pairs: Pairs<'a>,
    watched: Watched,
    reached: [Option<Timestamp>; 2],
    stage: Stage,
    end: Instant,
}

/// Watches both sides and compares what is touched.
///
/// # Errors
/// A refusal where changes can't be followed; what happens later stands in the
/// result.
pub async fn run(context: &Context, order: &Order<'_>) -> Result<DualWrite> {
    let mongo = &context.mongo;
    for namespace in [order.source, order.target] {
        if context.unless_interrupted(mongo.describe(namespace)).await?.is_none() {
            return Ok(DualWrite::nothing(&format!("there is no collection {namespace}")));
        }
    }
    let feeds = context.unless_interrupted(open(mongo, order)).await?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let stop = CancellationToken::new();
    let mut readers = JoinSet::new();
    for (side, feed) in [Side::Source, Side::Target].into_iter().zip(feeds) {
        readers.spawn(read(feed, side, sender.clone(), stop.clone()));
    }
    drop(sender);
    let started = std::time::Instant::now();
    context.events.note(format!(
        "watching the writes to {} and {} for {:.0} s",
        order.source,
        order.target,
        order.time.as_secs_f64()
    ));
    let mut watch = Watch {
        context,
        order,
        pairs: Pairs { mongo, source: order.source, target: order.target, valid: order.valid.clone() },
        watched: Watched::new(order.grace, order.most),
        reached: [None, None],
        stage: Stage::Watching,
        end: Instant::now() + order.time,
    };
    let result = watch.run(receiver).await;
    stop.cancel();
    while readers.join_next().await.is_some() {}
    let (listed, error) = match result {
        Ok(()) => (result::differences(&watch.watched, &watch.pairs, order.most).await, None),
        Err(error) if matches!(error.class(), Class::Interrupted(_)) => {
            (result::differences(&watch.watched, &watch.pairs, order.most).await, Some(error))
        }
        Err(error) => (Ok(Vec::new()), Some(error)),
    };
    let (listed, error) = match listed {
        Ok(listed) => (listed, error),
        Err(unread) => (Vec::new(), error.or(Some(unread))),
    };
    Ok(DualWrite::of(&watch.watched, listed, started, error))
}

async fn open(mongo: &Mongo, order: &Order<'_>) -> Result<[Feed; 2]> {
    let from = Position::Time(mongo.majority_time().await?);
    Ok([
        mongo.feed(&Changed::only(order.source), from.clone()).await?,
        mongo.feed(&Changed::only(order.target), from).await?,
    ])
}

/// Hands over what a stream says, one change at a time: when it came counts.
async fn read(mut feed: Feed, side: Side, sender: mpsc::Sender<Result<News>>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let news = feed.next(1).await.map(|changes| News {
            side,
            touched: changes.touched,
            at: Instant::now(),
            reached: feed.position().time(),
            ended_by: changes.ended_by.map(|ended| ended.event),
        });
        let is_over = news.is_err();
        let sent = tokio::select! {
            sent = sender.send(news) => sent.is_ok(),
            () = stop.cancelled() => false,
        };
        if !sent || is_over {
            return;
        }
    }
}

impl Watch<'_> {
    async fn run(&mut self, mut receiver: mpsc::Receiver<Result<News>>) -> Result<()> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut news = Vec::new();
        loop {
            tokio::select! {
                () = self.context.stop.cancelled() => {
                    return Err(self.context.interrupted("interrupted: the result is of what was seen until then"));
                }
                // All at once: looking is far slower than noting.
                count = receiver.recv_many(&mut news, QUEUE), if self.watched.has_room() => {
                    if count == 0 {
                        return Err(Error::stopped("the change streams ended"));
                    }
                    for news in news.drain(..) {
                        self.take(news.map_err(|error| error.with_class(Class::Stopped))?)?;
                    }
                }
                _ = ticks.tick() => {
                    self.look().await?;
                    self.show();
                    if self.is_over().await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn take(&mut self, news: News) -> Result<()> {
        let (place, namespace) = match news.side {
            Side::Source => (0, self.order.source),
            Side::Target => (1, self.order.target),
        };
        if let Some(event) = news.ended_by {
            return Err(Error::stopped(format!("{namespace} is no longer what it was: {event}"))
                .hint("start the same command again to watch what is there now"));
        }
        let admits = !matches!(self.stage, Stage::Judging(_));
        for id in news.touched.iter().map(Id::from_value) {
            self.watched.note(id, news.side, news.at, admits);
        }
        if let Some(reached) = self.reached.get_mut(place) {
            *reached = news.reached.or(*reached);
        }
        if let Some(reached) = self.reached_on_both() {
            self.watched.reached(reached);
        }
        Ok(())
    }

    /// Up to where both streams are known.
    fn reached_on_both(&self) -> Option<Timestamp> {
        let [Some(source), Some(target)] = self.reached else { return None };
        let key = |time: &Timestamp| (time.time, time.increment);
        Some(if key(&source) < key(&target) { source } else { target })
    }

    async fn look(&mut self) -> Result<()> {
        let now = Instant::now();
        let stuck = self.watched.take_stuck(now, AT_ONCE);
        if !stuck.is_empty() {
            let seen = self.pairs.look_up(&stuck, self.reached_on_both()).await?;
            for id in &stuck {
                self.watched.looked_again(id, seen.get(id).copied().unwrap_or_default(), now);
            }
        }
        let ids = self.watched.take_due(now, AT_ONCE);
        if ids.is_empty() {
            return Ok(());
        }
        let seen = self.pairs.look_up(&ids, self.reached_on_both()).await?;
        // Whatever was written before the sides were read has happened by then.
        let until = after(self.context.mongo.last_write_time().await?);
        if seen.values().any(|seen| seen.kind().is_some()) {
            nudge(&self.context.mongo).await?;
        }
        for id in &ids {
            self.watched.looked(id, seen.get(id).copied().unwrap_or_default(), now, until);
        }
        Ok(())
    }

    async fn is_over(&mut self) -> Result<bool> {
        let now = Instant::now();
        match self.stage {
            Stage::Watching if now >= self.end => {
                let goal = after(self.context.mongo.last_write_time().await?);
                nudge(&self.context.mongo).await?;
                self.stage = Stage::Ending(goal);
            }
            Stage::Ending(goal) => {
                let is_known = self
                    .reached_on_both()
                    .is_some_and(|time| (time.time, time.increment) >= (goal.time, goal.increment));
                if is_known {
                    self.stage = Stage::Judging(now + self.order.grace * 2 + LAST_WAIT);
                }
            }
            Stage::Judging(deadline) => return Ok(self.watched.is_settled() || now >= deadline),
            Stage::Watching => {}
        }
        Ok(false)
    }

    fn show(&self) {
        let left = self.end.saturating_duration_since(Instant::now());
        let elapsed = self.order.time.saturating_sub(left);
        let counts = &self.watched.counts;
        let rate = |writes: u64| writes as f64 / elapsed.as_secs_f64().max(1.0);
        let stage = if left.is_zero() { "judging what is open: " } else { "" };
        self.context.events.progress(Progress {
            phase: "dual write".into(),
            unit: "seconds",
            done: elapsed.as_secs(),
            total: Some(self.order.time.as_secs().max(elapsed.as_secs())),
            limited_by: None,
            detail: format!(
                "{stage}{:.1} writes/s to the source, {:.1} to the target; {} compared, {} differ, {} late",
                rate(counts.source_writes),
                rate(counts.target_writes),
                counts.compared(),
                counts.differing(),
                counts.late
            ),
        });
    }
}
