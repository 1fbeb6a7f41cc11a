//! A source, what should have become of it, and the job that has made it.

use bson::Document;

use crate::Context;
use crate::cleanse::plan::{compile, default_job, rules, target_of};
use crate::cleanse::predicate::Predicate;
use crate::cli::verify::VerifyArgs;
use crate::config::values::Namespace;
use crate::cutover::record::Record;
use crate::error::{Error, Result};
use crate::job::store;
use crate::mongo::Mongo;

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
    /// The sides of the configured or named copy, else those of the one copy of
    /// the source that was made; `None` where there is none.
    ///
    /// # Errors
    /// A usage error where one side is not named, several could be meant, or
    /// both are the same; a stop where the jobs can't be read.
    pub async fn of(context: &Context, args: &VerifyArgs) -> Result<Option<Self>> {
        let settings = &context.settings;
        if settings.cleanse.is_none() && args.source.is_none() {
            if args.to.is_some() {
                return Err(Error::usage("--to needs --source, or `[cleanse]` in the config"));
            }
            return Ok(None);
        }
        let rules = rules(settings, args.source.as_ref())?;
        let source = rules.source.clone();
        let target = match args.to.as_ref().or(rules.to.as_ref()) {
            Some(to) => target_of(&source, to)?,
            None if args.source.is_some() => {
                return Err(Error::usage("--source needs --to, the collection to compare with"));
            }
            None => match copied_to(&context.mongo, &source, args.job.as_deref()).await? {
                Some(target) => target,
                None => return Ok(None),
            },
        };
        if target == source {
            return Err(Error::usage(format!(
                "source and target are both {source}: that would prove nothing"
            )));
        }
        let job = args.job.clone().unwrap_or_else(|| default_job(&source, &target));
        Ok(Some(Self { predicate: compile(settings, &rules)?, source, target, job }))
    }
}

/// What a source was copied to, as the jobs tell. A copy that was not cut over
/// is meant rather than one that was.
async fn copied_to(mongo: &Mongo, source: &Namespace, job: Option<&str>) -> Result<Option<Namespace>> {
    let jobs = store::list(mongo, job).await?;
    let (done, open): (Vec<_>, Vec<_>) = jobs
        .iter()
        .filter_map(|job| Some((job, target_in(job, source)?)))
        .partition(|(job, _)| matches!(Record::of(job), Ok(Some(record)) if record.is_done()));
    if open.len() > 1 {
        let targets: Vec<_> = open.iter().map(|(_, target)| target.to_string()).collect();
        return Err(Error::usage(format!("{source} was copied to {}: which one?", targets.join(" and to ")))
            .hint("give --to COLLECTION"));
    }
    Ok(open.into_iter().chain(done).next().map(|(_, target)| target))
}

/// The target of a cleanse of that source.
fn target_in(job: &Document, source: &Namespace) -> Option<Namespace> {
    let identity = job.get_document("identity").ok()?;
    let is_of_source = job.get_str("command").is_ok_and(|command| command == "cleanse")
        && identity.get_str("source").is_ok_and(|known| known == source.to_string());
    is_of_source.then(|| identity.get_str("target").ok()?.parse().ok()).flatten()
}
