//! Draws progress on stderr: a bar on a terminal, a plain line every few
//! seconds elsewhere, JSON lines where logs are JSON.

use std::collections::VecDeque;
use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::event::{Event, Progress};

/// Between two plain lines of one phase.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// A phase is shown once it has lasted this long.
const SHORTEST_PHASE: Duration = Duration::from_secs(1);
/// The rate is that of the last so many seconds.
const RATE_WINDOW: Duration = Duration::from_secs(30);
/// No rate is told before it was watched for this long.
const SHORTEST_WATCH: Duration = Duration::from_millis(900);

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Not at all; warnings still are.
    Quiet,
    /// A bar on a terminal, lines elsewhere.
    Text,
    /// JSON lines.
    Json,
}

/// Starts the reporter; it ends when it is told to, or every sender is gone.
pub fn spawn(mut events: mpsc::Receiver<Event>, style: Style) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut reporter = Reporter::new(style);
        while let Some(event) = events.recv().await {
            if event == Event::End {
                break;
            }
            reporter.show(event);
        }
        reporter.clear();
    })
}

struct Reporter {
    style: Style,
    bar: Option<ProgressBar>,
    phase: String,
    rate: Rate,
    last_line: Option<Instant>,
}

impl Reporter {
    fn new(style: Style) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = (style == Style::Text && is_terminal).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(bar_style());
            bar
        });
        Self { style, bar, phase: String::new(), rate: Rate::default(), last_line: None }
    }

    fn show(&mut self, event: Event) {
        match event {
            Event::Progress(progress) => self.progress(&progress),
            Event::Note(text) if self.style != Style::Quiet => self.line("note", &text),
            Event::Note(_) | Event::End => {}
            Event::Settled(answer) => {
                self.clear();
                answer.give();
            }
            Event::Announcement(text) => self.line("note", &text),
            Event::Warning(text) => self.line("warning", &text),
        }
    }

    fn progress(&mut self, progress: &Progress) {
        if self.phase != progress.phase {
            self.phase.clone_from(&progress.phase);
            self.rate = Rate::default();
            // A phase that is over within a moment needs no line.
            self.last_line = Instant::now().checked_sub(LINE_INTERVAL - SHORTEST_PHASE);
        }
        let rate = self.rate.record(Instant::now(), progress.done);
        match (&self.bar, self.style) {
            (_, Style::Quiet) => {}
            (Some(bar), _) => draw(bar, progress, rate),
            (None, _) => self.progress_line(progress, rate),
        }
    }

    fn progress_line(&mut self, progress: &Progress, rate: Option<f64>) {
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
        if !due {
            return;
        }
        self.last_line = Some(Instant::now());
        let text = if self.style == Style::Json {
            json!({
                "level": "progress",
                "at": jiff::Timestamp::now().to_string(),
                "phase": progress.phase,
                "unit": progress.unit,
                "done": progress.done,
                "total": progress.total,
                "per_second": rate,
                "eta_seconds": eta(progress, rate).map(|eta| eta.as_secs()),
                "limited_by": progress.limited_by,
                "detail": progress.detail,
            })
            .to_string()
        } else {
            format!("{}: {}", progress.phase, describe(progress, rate))
        };
        print_line(&text);
    }

    fn line(&self, level: &str, text: &str) {
        let line = match self.style {
            Style::Json => {
                json!({"level": level, "at": jiff::Timestamp::now().to_string(), "message": text}).to_string()
            }
            _ if level == "warning" => format!("warning: {text}"),
            _ => text.to_owned(),
        };
        match &self.bar {
            Some(bar) => bar.suspend(|| print_line(&line)),
            None => print_line(&line),
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn print_line(line: &str) {
    let _closed = writeln!(std::io::stderr(), "{line}");
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} %  {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

fn draw(bar: &ProgressBar, progress: &Progress, rate: Option<f64>) {
    if let Some(total) = progress.total {
        bar.set_length(total);
    }
    bar.set_prefix(progress.phase.clone());
    bar.set_position(progress.done);
    bar.set_message(describe(progress, rate));
}

/// `12,000 of 100,000 documents, 512/s, 2m 51s left, limited by tps; …`
fn describe(progress: &Progress, rate: Option<f64>) -> String {
    let mut text = match progress.total {
        Some(total) => format!("{} of {total} {}", progress.done, progress.unit),
        None => format!("{} {}", progress.done, progress.unit),
    };
    if let Some(rate) = rate {
        text.push_str(&format!(", {rate:.1}/s"));
    }
    if let Some(eta) = eta(progress, rate) {
        text.push_str(&format!(", {} left", duration(eta)));
    }
    if let Some(limit) = &progress.limited_by {
        text.push_str(&format!(", limited by {limit}"));
    }
    if !progress.detail.is_empty() {
        text.push_str("; ");
        text.push_str(&progress.detail);
    }
    text
}

fn eta(progress: &Progress, rate: Option<f64>) -> Option<Duration> {
    let left = progress.total?.checked_sub(progress.done)?;
    let rate = rate.filter(|rate| *rate > 0.0)?;
    let seconds = left as f64 / rate;
    Duration::try_from_secs_f64(seconds).ok()
}

/// A duration as people say it: `11 d 13 h 46 m`, `2 m 5 s`, `7 s`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    if days > 0 {
        format!("{days} d {hours} h {minutes} m")
    } else if hours > 0 {
        format!("{hours} h {minutes} m")
    } else if minutes > 0 {
        format!("{minutes} m {} s", seconds % 60)
    } else {
        format!("{seconds} s")
    }
}

/// The speed over the last seconds.
#[derive(Debug, Default)]
struct Rate(VecDeque<(Instant, u64)>);

impl Rate {
    fn record(&mut self, now: Instant, done: u64) -> Option<f64> {
        self.0.push_back((now, done));
        while self.0.len() > 2 && self.0.front().is_some_and(|(at, _)| now.duration_since(*at) > RATE_WINDOW)
        {
            self.0.pop_front();
        }
        let (first, before) = *self.0.front()?;
        let watched = now.duration_since(first);
        if watched < SHORTEST_WATCH {
            return None;
        }
        let rate = done.saturating_sub(before) as f64 / watched.as_secs_f64();
        Some(rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_like_speech() {
        assert_eq!(duration(Duration::from_secs(1_000_000)), "11 d 13 h 46 m");
        assert_eq!(duration(Duration::from_secs(3_660)), "1 h 1 m");
        assert_eq!(duration(Duration::from_secs(125)), "2 m 5 s");
        assert_eq!(duration(Duration::ZERO), "0 s");
    }

    #[test]
    fn the_rate_is_that_of_the_window() {
        let mut rate = Rate::default();
        let start = Instant::now();
        assert_eq!(rate.record(start, 0), None);
        assert_eq!(rate.record(start + Duration::from_secs(10), 100), Some(10.0));
        // A standstill shows within the window.
        assert_eq!(rate.record(start + Duration::from_secs(50), 100), Some(0.0));
    }

    #[test]
    fn there_is_no_estimate_without_a_rate() {
        let progress = Progress {
            phase: "copy".into(),
            unit: "documents",
            done: 50,
            total: Some(100),
            limited_by: Some("tps".into()),
            detail: String::new(),
        };
        assert_eq!(eta(&progress, None), None);
        assert_eq!(eta(&progress, Some(0.0)), None);
        assert_eq!(describe(&progress, Some(10.0)), "50 of 100 documents, 10.0/s, 5 s left, limited by tps");
    }
}
