//! A source, what should have become of it, and the job that has made it.

use crate::Context;
use crate::cleanse::plan::{compile, default_job, rules, target_of};
use crate::cleanse::predicate::Predicate;
use crate::cli::verify::VerifyArgs;
use crate::config::values::Namespace;
use crate::error::{Error, Result};

/// A source and what should have become of it.
#[derive(Debug)]
pub struct Sides {
    /// The collection that is right.
    pub source: Namespace,
    /// The collection that should hold its valid documents.
    pub target: Namespace,
    /// Which documents are valid.
    pub predicate: Predicate,
    /// Name of the job that has made the copy, if any has.
    pub job: String,
}

impl Sides {
    /// The sides of the configured or named copy; `None` where there is none.
    ///
    /// # Errors
    /// A usage error where one side is not named, or both are the same.
    pub fn of(context: &Context, args: &VerifyArgs) -> Result<Option<Self>> {
        let settings = &context.settings;
        if settings.cleanse.is_none() && args.source.is_none() {
            if args.to.is_some() {
                return Err(Error::usage("--to needs --source, or `[cleanse]` in the config"));
            }
            return Ok(None);
        }
        let rules = rules(settings, args.source.as_ref())?;
        let Some(to) = args.to.clone().or_else(|| rules.to.clone()) else {
            return if args.source.is_some() {
                Err(Error::usage("--source needs --to, the collection to compare with"))
            } else {
                Ok(None)
            };
        };
        let source = rules.source.clone();
        let target = target_of(&source, &to)?;
        if target == source {
            return Err(Error::usage(format!(
                "source and target are both {source}: that would prove nothing"
            )));
        }
        let job = args.job.clone().unwrap_or_else(|| default_job(&source, &target));
        Ok(Some(Self { predicate: compile(settings, &rules)?, source, target, job }))
    }
}
