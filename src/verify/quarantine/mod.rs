//! Whether a quarantine holds what the rules reject: by count, all of it, and
//! by bytes, a sample.
//!
//! While a follower is alive the quarantine is a little behind, as the target is:
//! what is on its way is left out of the counts, and what differs in a sample is
//! read again until it agrees or the time for that is over.

mod counts;
mod sample;

use bson::Document;

use super::check::Check;
use super::sample::DEFAULT_SAMPLE;
use super::sides::Sides;
use super::wanted::Wanted;
use crate::Context;
use crate::cli::verify::VerifyArgs;
use crate::config::values::Namespace;
use crate::error::Result;

/// The three collections, the rules between them, and the job that has parted them.
#[derive(Debug)]
pub struct Quarantined<'a> {
    /// The collection that was cleansed, and what was kept of it.
    pub sides: &'a Sides,
    /// What was rejected.
    pub quarantine: &'a Namespace,
    /// The job, as it is stored.
    pub copy: &'a Document,
}

impl Quarantined<'_> {
    /// The checks that the options ask for, or all of them.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn checks(
        &self,
        context: &Context,
        args: &VerifyArgs,
        wanted: Wanted,
        seed: u64,
    ) -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        if wanted.counts || wanted.full {
            checks.push(self.counts(&context.mongo, args.settle.0).await?);
        }
        if let Some(size) = wanted.sample.or(wanted.full.then_some(DEFAULT_SAMPLE)) {
            checks.push(self.sample(context, args, u64::from(size), seed).await?);
        }
        Ok(checks)
    }
}
