//! How a job went over time, for its report: a bounded series of samples in the
//! job document, taken with the checkpoint.
//!
//! A sample tells what was done since the one before it. Where there is no more
//! room two neighbours become one and samples are taken half as often, so that a
//! run of a minute and one of twelve days need the same room. What an earlier
//! version has left without a series begins with an empty one.

use std::time::Duration;

use bson::{Bson, DateTime, Document, doc};
use tokio::time::Instant;

use crate::mongo::index::{stored_count, whole_number};

/// The field of the job document.
pub const FIELD: &str = "series";
/// Samples at most; even, so that neighbours can be put together.
pub const MOST: usize = 240;
/// Between two samples at first: no more often than a job stores its checkpoint.
const INTERVAL: Duration = Duration::from_secs(2);
/// Percentiles of a sample's latency.
pub const PERCENTILES: [u8; 3] = [50, 95, 99];

/// What was done between two moments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// The later moment.
    pub at: DateTime,
    /// Seconds between them.
    pub seconds: f64,
    /// Documents that were settled or copied.
    pub documents: u64,
    /// Calls to the key API, or changes that were applied.
    pub operations: u64,
    /// Milliseconds of a call, by [`PERCENTILES`]; `None` where none was made.
    pub latency: Option<[f64; 3]>,
}

/// The samples of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    interval: Duration,
    samples: Vec<Sample>,
}

/// Takes samples of counters that only rise.
#[derive(Debug)]
pub struct Sampler {
    series: Series,
    last: Instant,
    documents: u64,
    operations: u64,
}

impl Sample {
    /// Both as one. The median is weighted by operations; of the higher percentiles
    /// the larger stands for both, so that they are never understated.
    fn merge(&self, later: &Self) -> Self {
        let latency = match (self.latency, later.latency) {
            (Some(one), Some(other)) => {
                let (weight, all) = (self.operations as f64, (self.operations + later.operations) as f64);
                let share = if all > 0.0 { weight / all } else { 0.5 };
                Some([one[0] * share + other[0] * (1.0 - share), one[1].max(other[1]), one[2].max(other[2])])
            }
            (one, other) => one.or(other),
        };
        Self {
            at: later.at,
            seconds: self.seconds + later.seconds,
            documents: self.documents + later.documents,
            operations: self.operations + later.operations,
            latency,
        }
    }
}

impl Default for Series {
    fn default() -> Self {
        Self { interval: INTERVAL, samples: Vec::new() }
    }
}

impl Series {
    /// As it was stored with a job; empty where nothing was, or nothing readable.
    pub fn stored(job: &Document) -> Self {
        let Ok(stored) = job.get_document(FIELD) else { return Self::default() };
        let column = |name: &str| stored.get_array(name).map(Vec::as_slice).unwrap_or_default();
        let number = |name: &str, row: usize| column(name).get(row).and_then(Bson::as_f64);
        let count = |name: &str, row: usize| column(name).get(row).and_then(whole_number).unwrap_or(0);
        let rows = column("at").iter().take(MOST).enumerate();
        let samples = rows.filter_map(|(row, at)| {
            let latency = |name: &str| number(name, row);
            Some(Sample {
                at: at.as_datetime().copied()?,
                seconds: number("seconds", row)?,
                documents: count("documents", row),
                operations: count("operations", row),
                latency: latency("p50").zip(latency("p95")).zip(latency("p99")).map(|((a, b), c)| [a, b, c]),
            })
        });
        let interval = stored.get_f64("interval").ok().and_then(|all| Duration::try_from_secs_f64(all).ok());
        Self { samples: samples.collect(), interval: interval.unwrap_or(INTERVAL).max(INTERVAL) }
    }

    /// As it is stored: by columns, which take less room than rows.
    pub fn to_document(&self) -> Document {
        let column =
            |value: &dyn Fn(&Sample) -> Bson| -> Vec<Bson> { self.samples.iter().map(value).collect() };
        let latency = |which: usize| {
            column(&|sample| sample.latency.map_or(Bson::Null, |latency| Bson::Double(latency[which])))
        };
        doc! {
            "v": 1,
            "interval": self.interval.as_secs_f64(),
            "at": column(&|sample| sample.at.into()),
            "seconds": column(&|sample| sample.seconds.into()),
            "documents": column(&|sample| stored_count(sample.documents).into()),
            "operations": column(&|sample| stored_count(sample.operations).into()),
            "p50": latency(0),
            "p95": latency(1),
            "p99": latency(2),
        }
    }

    /// The samples in their order.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// About how much time a sample stands for.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    fn add(&mut self, sample: Sample) {
        if self.samples.len() >= MOST {
            self.samples = self
                .samples
                .chunks(2)
                .filter_map(|pair| match pair {
                    [one, other] => Some(one.merge(other)),
                    other => other.first().copied(),
                })
                .collect();
            self.interval *= 2;
        }
        self.samples.push(sample);
    }
}

impl Sampler {
    /// Goes on with a series from counters that stand at so much.
    pub fn new(series: Series, documents: u64) -> Self {
        Self { series, last: Instant::now(), documents, operations: 0 }
    }

    /// Whether the next sample is due.
    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= self.series.interval
    }

    /// Takes a sample. Counters that went back count as unchanged.
    pub fn take(&mut self, documents: u64, operations: u64, latency: Option<[f64; 3]>) {
        let seconds = self.last.elapsed().as_secs_f64();
        self.series.add(Sample {
            at: DateTime::now(),
            seconds,
            documents: documents.saturating_sub(self.documents),
            operations: operations.saturating_sub(self.operations),
            latency,
        });
        self.last = Instant::now();
        (self.documents, self.operations) = (documents, operations);
    }

    /// As it is stored.
    pub fn to_document(&self) -> Document {
        self.series.to_document()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(second: i64, documents: u64, latency: Option<[f64; 3]>) -> Sample {
        let at = DateTime::from_millis(second * 1000);
        Sample { at, seconds: 2.0, documents, operations: documents, latency }
    }

    #[test]
    fn what_is_stored_comes_back() {
        let mut series = Series::default();
        series.add(sample(2, 10, Some([1.0, 2.5, 9.0])));
        series.add(sample(4, 0, None));
        assert_eq!(Series::stored(&doc! {FIELD: series.to_document()}), series);
        assert_eq!(Series::stored(&doc! {}), Series::default());
        assert_eq!(Series::stored(&doc! {FIELD: {"at": ["x"], "seconds": 5}}).samples, []);
    }

    #[test]
    fn however_long_it_takes_the_series_is_bounded_and_nothing_is_lost() {
        let mut series = Series::default();
        for second in 1..=5_000 {
            series.add(sample(2 * second, 3, Some([10.0, 20.0, 30.0])));
            assert!(series.samples.len() <= MOST);
        }
        let sum: u64 = series.samples.iter().map(|sample| sample.documents).sum();
        let seconds: f64 = series.samples.iter().map(|sample| sample.seconds).sum();
        assert_eq!((sum, seconds), (15_000, 10_000.0));
        assert!(series.interval > INTERVAL && series.samples.len() > MOST / 2);
        assert!(series.samples.iter().all(|sample| sample.latency == Some([10.0, 20.0, 30.0])));
        assert!(series.samples.is_sorted_by_key(|sample| sample.at));
    }

    #[test]
    fn high_percentiles_are_never_understated() {
        let slow = sample(2, 30, Some([10.0, 100.0, 500.0]));
        let both = slow.merge(&sample(4, 10, Some([50.0, 80.0, 900.0])));
        assert_eq!(both.latency, Some([20.0, 100.0, 900.0]));
        assert_eq!(slow.merge(&sample(4, 0, None)).latency, slow.latency);
    }

    #[tokio::test(start_paused = true)]
    async fn samples_are_differences_of_counters() {
        let mut sampler = Sampler::new(Series::default(), 100);
        assert!(!sampler.is_due());
        tokio::time::advance(INTERVAL).await;
        assert!(sampler.is_due());
        sampler.take(150, 7, None);
        sampler.take(120, 9, None);
        let taken: Vec<_> =
            sampler.series.samples().iter().map(|sample| (sample.documents, sample.operations)).collect();
        assert_eq!(taken, [(50, 7), (0, 2)]);
        assert_eq!(sampler.series.samples()[0].seconds, 2.0);
    }
}
