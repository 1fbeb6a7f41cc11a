//! The only words between jobs and reporters.
//!
//! Jobs say what is; how it looks is the reporter's business. Events flow one
//! way: a reporter that lags loses pictures of progress, never anything else.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc};

/// Pictures of progress wait here for the reporter; more than a few are stale.
const QUEUE: usize = 256;

/// Something an operator may want to see.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// How far the current phase is.
    Progress(Progress),
    /// A fact worth a line.
    Note(String),
    /// Something to look at.
    Warning(String),
    /// Something that is shown however quiet the operator wants it.
    Announcement(String),
    /// Everything before this has been shown once the sender is answered.
    Settled(Answer),
    /// Nothing more will come.
    End,
}

/// Told when a reporter has shown everything so far.
#[derive(Debug, Clone)]
pub struct Answer(Arc<Notify>);

impl Answer {
    /// Everything so far has been shown.
    pub fn give(&self) {
        self.0.notify_one();
    }
}

impl PartialEq for Answer {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A picture of a phase.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Name of the phase, such as `backfill` or `copy`.
    pub phase: String,
    /// What is counted: `documents`, `keys`, `ranges`.
    pub unit: &'static str,
    /// Done so far.
    pub done: u64,
    /// In all, where that is known.
    pub total: Option<u64>,
    /// What limits the speed now.
    pub limited_by: Option<String>,
    /// Further figures, such as `calls 120, retries 3`.
    pub detail: String,
}

/// The sending side, cheap to clone.
#[derive(Debug, Clone)]
pub struct Events(mpsc::Sender<Event>);

impl Events {
    /// A channel of events.
    pub fn channel() -> (Self, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), receiver)
    }

    /// Shows how far a phase is.
    pub fn progress(&self, progress: Progress) {
        // A full queue means that newer pictures are on their way.
        let _full = self.0.try_send(Event::Progress(progress));
    }

    /// Tells a fact.
    pub fn note(&self, text: impl Into<String>) {
        self.tell(Event::Note(text.into()));
    }

    /// Points at something to look at.
    pub fn warn(&self, text: impl Into<String>) {
        self.tell(Event::Warning(text.into()));
    }

    /// Tells what must be known to go on, such as a port that was chosen.
    pub fn announce(&self, text: impl Into<String>) {
        self.tell(Event::Announcement(text.into()));
    }

    /// Waits until everything told so far has been shown.
    pub async fn settled(&self) {
        let answer = Arc::new(Notify::new());
        if self.0.send(Event::Settled(Answer(answer.clone()))).await.is_ok() {
            answer.notified().await;
        }
    }

    /// Ends the reporter once it has shown everything told so far.
    pub async fn end(&self) {
        // A closed channel means that it has ended already.
        let _closed = self.0.send(Event::End).await;
    }

    fn tell(&self, event: Event) {
        if let Err(mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) =
            self.0.try_send(event)
        {
            tracing::warn!(?event, "not shown");
        }
    }
}
