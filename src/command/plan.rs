//! `plan`: how much there is to do and how long it takes. Reads only.

mod count;
mod estimate;

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use self::count::{Calls, Need, count_target};
use self::estimate::{Impossible, Limits};
use crate::Context;
use crate::cli::PlanArgs;
use crate::config::Target;
use crate::config::values::Tps;
use crate::error::{Error, Result};
use crate::report::outcome::Outcome;
use crate::report::progress::duration;
use crate::throttle::window::{Schedule, TimeZoneName};

/// Runs the command.
///
/// # Errors
/// A usage error for a deadline in the past, a refusal where a collection is
/// missing.
pub async fn run(context: &Context, args: &PlanArgs) -> Result<Outcome> {
    let settings = &context.settings;
    let targets = settings.targets(args.targets.target.as_deref())?;
    let tps = args.tps.unwrap_or(settings.backfill.tps);
    let windows =
        if args.windows.is_empty() { settings.backfill.windows.clone() } else { args.windows.clone() };
    let zone = args.time_zone.clone().unwrap_or_else(|| settings.backfill.time_zone.clone());
    let deadline = read_deadline(args, &zone)?;
    let mut calls = Calls::new(context);
    let mut needs = Vec::new();
    for target in &targets {
        needs.push(count_target(context, target, &mut calls).await?);
    }
    calls.look_up_rest().await?;
    let limits = Limits {
        per_day: settings.backfill.max_calls_per_day,
        zone: zone.zone().clone(),
        windows: Schedule::new(windows, zone.clone()),
    };
    let batch = settings.key_api.as_ref().and_then(|api| api.batch.as_ref()).map(|batch| batch.size as u64);
    let counted = calls.needed.div_ceil(batch.unwrap_or(1));
    let estimate = Estimate::new(counted, tps, &limits, deadline, Timestamp::now());
    let (keys, known) = (calls.needed, calls.known);
    let summary = Summary {
        targets: &targets,
        needs: &needs,
        calls: counted,
        keys,
        known,
        batch,
        tps,
        estimate,
        limits,
        zone,
    };
    Ok(Outcome::reached(summary.json(), summary.text()))
}

/// Before anything is counted, which may take minutes.
fn read_deadline(args: &PlanArgs, zone: &TimeZoneName) -> Result<Option<Timestamp>> {
    let Some(deadline) = args.deadline else { return Ok(None) };
    deadline.after(Timestamp::now(), zone.zone()).map(Some).map_err(|message| {
        Error::usage(format!("--deadline: {message}"))
            .hint("a date means its beginning; name a later one, or add a time as in 2026-12-24T18:00")
    })
}

/// The time that a number of calls takes, and the rate that a deadline asks for.
#[derive(Debug)]
struct Estimate {
    /// Until the last call, and when that is; `None` where it never is.
    nonstop: Option<(Duration, Timestamp)>,
    /// The same within the windows; `None` without windows, too.
    in_windows: Option<(Duration, Timestamp)>,
    deadline: Option<Needed>,
}

/// The calls per second that a deadline asks for.
#[derive(Debug)]
struct Needed {
    at: Timestamp,
    nonstop: Result<f64, Impossible>,
    /// `None` without windows.
    in_windows: Option<Result<f64, Impossible>>,
}

impl Estimate {
    fn new(calls: u64, tps: Tps, limits: &Limits, deadline: Option<Timestamp>, now: Timestamp) -> Self {
        let until_end = |limits: &Limits| {
            let end = limits.finish(now, calls, tps.per_second())?;
            Some((Duration::try_from(end.duration_since(now)).ok()?, end))
        };
        let nonstop = limits.nonstop();
        let has_windows = limits.windows.is_some();
        Self {
            nonstop: until_end(&nonstop),
            in_windows: if has_windows { until_end(limits) } else { None },
            deadline: deadline.map(|at| Needed {
                at,
                nonstop: nonstop.needed_tps(now, at, calls),
                in_windows: has_windows.then(|| limits.needed_tps(now, at, calls)),
            }),
        }
    }
}

impl Needed {
    /// What makes the deadline impossible to keep.
    fn impossible(&self) -> Option<Impossible> {
        self.in_windows.and_then(Result::err).or(self.nonstop.err())
    }

    fn json(&self) -> Value {
        json!({
            "at": self.at.to_string(),
            "tps_nonstop": self.nonstop.ok(),
            "tps_in_windows": self.in_windows.and_then(Result::ok),
            "impossible_because_of": self.impossible().map(Impossible::key),
        })
    }

    /// What follows "to be finished by then".
    fn text(&self) -> String {
        let nonstop = self.nonstop.map(|tps| format!("{} TPS non-stop", rounded_up(tps)));
        let in_windows =
            self.in_windows.map(|tps| tps.map(|tps| format!("{} TPS within the windows", rounded_up(tps))));
        let rates: Vec<String> = std::iter::once(nonstop).chain(in_windows).filter_map(Result::ok).collect();
        let obstacle = self.impossible().map(|reason| match reason {
            Impossible::Windows => "impossible within the windows: none opens before".to_owned(),
            Impossible::PerDay(calls) => {
                format!("impossible with max_calls_per_day, which allows {calls} calls until then")
            }
        });
        rates.into_iter().chain(obstacle).collect::<Vec<_>>().join(", ")
    }
}

/// A rate with two decimals that is not too low.
fn rounded_up(tps: f64) -> f64 {
    (tps * 100.0 - 1e-9).max(0.0).ceil() / 100.0
}

/// Everything that the result tells.
struct Summary<'a> {
    targets: &'a [Target],
    needs: &'a [Need],
    calls: u64,
    keys: u64,
    known: u64,
    /// Keys per call, where they are asked for in batches.
    batch: Option<u64>,
    tps: Tps,
    estimate: Estimate,
    limits: Limits,
    zone: TimeZoneName,
}

impl Summary<'_> {
    fn json(&self) -> Value {
        let targets = self.targets.iter().zip(self.needs).map(|(target, need)| {
            json!({
                "collection": target.namespace.to_string(),
                "candidates": need.candidates,
                "distinct_keys": need.distinct_keys,
                "unusable": need.unusable,
                "unsendable": need.unsendable,
            })
        });
        let estimate = &self.estimate;
        let overall = if self.limits.windows.is_some() { estimate.in_windows } else { estimate.nonstop };
        json!({
            "schema": 1,
            "command": "plan",
            "targets": targets.collect::<Vec<_>>(),
            "calls": self.calls,
            "keys_to_ask": self.keys,
            "known_keys": self.known,
            "tps": self.tps.per_second(),
            "max_calls_per_day": self.limits.per_day,
            "seconds_nonstop": estimate.nonstop.map(|(needed, _)| needed.as_secs_f64()),
            "seconds_in_windows": estimate.in_windows.map(|(needed, _)| needed.as_secs_f64()),
            "finished_at": overall.map(|(_, end)| end.to_string()),
            "deadline": estimate.deadline.as_ref().map(Needed::json),
        })
    }

    fn text(&self) -> String {
        let mut lines = Vec::new();
        for (target, need) in self.targets.iter().zip(self.needs) {
            lines.push(format!(
                "{}: {} candidates, {} distinct legacy keys",
                target.namespace, need.candidates, need.distinct_keys
            ));
            for (kind, count) in &need.unusable {
                lines.push(format!("  {count} will be flagged no_legacy_key: {kind}"));
            }
            if need.unsendable > 0 {
                lines.push(format!("  {} will fail: `.` and `..` can't be sent in a path", need.unsendable));
            }
        }
        let batch = self.batch.map_or(String::new(), |size| format!(" of up to {size} keys"));
        lines.push(format!(
            "{} calls{batch} needed, {} keys are in the key map already",
            self.calls, self.known
        ));
        lines.extend(self.times());
        if let Some(deadline) = &self.estimate.deadline {
            lines.push(format!("to be finished by {}: {}", self.date(deadline.at), deadline.text()));
        }
        lines.join("\n")
    }

    fn times(&self) -> Vec<String> {
        let time = |estimate: Option<(Duration, Timestamp)>| match estimate {
            Some((needed, end)) => format!("{}, until {}", duration(needed), self.date(end)),
            None => "not within a hundred years".into(),
        };
        let per_day = match self.limits.per_day {
            0 => String::new(),
            limit => format!(" and at most {limit} calls a day"),
        };
        let mut lines = vec![format!(
            "at {} TPS{per_day} non-stop: {}",
            self.tps.per_second(),
            time(self.estimate.nonstop)
        )];
        if self.limits.windows.is_some() {
            lines.push(format!("within the windows: {}", time(self.estimate.in_windows)));
        }
        lines
    }

    fn date(&self, at: Timestamp) -> String {
        at.to_zoned(self.zone.zone().clone()).strftime("%A %-d %B %Y, %H:%M %Z").to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn estimate(calls: u64, windows: &[&str], per_day: u64, deadline: Option<&str>) -> Estimate {
        let windows = windows.iter().map(|window| window.parse().expect("a window")).collect();
        let zone: TimeZoneName = "Asia/Seoul".parse().expect("a zone");
        let limits = Limits { per_day, zone: zone.zone().clone(), windows: Schedule::new(windows, zone) };
        let tps = Tps::new(10.0).expect("a valid rate");
        Estimate::new(calls, tps, &limits, deadline.map(time), time("2026-11-22T12:00:00+09:00"))
    }

    #[test]
    fn no_windows_mean_no_second_figure() {
        let found = estimate(10_000_000, &[], 0, None);
        assert_eq!(found.nonstop.map(|(needed, _)| duration(needed)).as_deref(), Some("11 d 13 h 46 m"));
        assert_eq!(found.in_windows, None);
    }

    #[test]
    fn the_deadline_tells_both_rates_and_what_makes_it_impossible() {
        let needed = |windows: &[&str], per_day| {
            estimate(604_800, windows, per_day, Some("2026-11-29T12:00:00+09:00")).deadline.expect("given")
        };
        let both = needed(&["22:00-06:00"], 0);
        assert_eq!(both.text(), "1 TPS non-stop, 3 TPS within the windows");
        assert_eq!(both.json()["impossible_because_of"], Value::Null);
        assert_eq!(needed(&[], 0).text(), "1 TPS non-stop");
        assert_eq!(needed(&[], 0).json()["tps_in_windows"], Value::Null);
        // Eight days, of which the windows open on eight.
        let limited = needed(&["22:00-06:00"], 75_000);
        assert!(limited.text().contains("allows 600000 calls"), "{}", limited.text());
        assert_eq!(limited.json()["tps_nonstop"], Value::Null);
        assert_eq!(limited.json()["impossible_because_of"], "max_calls_per_day");
    }

    #[test]
    fn rates_are_never_rounded_to_what_is_too_low() {
        for (tps, shown) in [(0.0, 0.0), (0.1, 0.1), (3.0, 3.0), (3.0001, 3.01), (0.000_01, 0.01)] {
            assert!((rounded_up(tps) - shown).abs() < 1e-12, "{tps}");
        }
    }
}
