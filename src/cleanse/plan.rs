//! What is decided before a copy starts: source, target, rules, ranges.

use bson::{Document, doc};

use super::build;
use super::combine;
use super::dual_write;
use super::names;
use super::needs;
use super::predicate::Predicate;
use super::quarantine;
use crate::cli::cleanse::CleanseArgs;
use crate::config::Settings;
use crate::config::file::{Cleanse, default_max_replication_lag};
use crate::config::values::{ExtendedJson, Namespace};
use crate::error::{Error, Result, describe_mongo};
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;
use crate::mongo::catch_up::quarantine::Quarantine;
use crate::mongo::command::{is_transient, retrying};
use crate::mongo::valid::{Grouping, Valid};

/// Documents per range: large enough that starting one costs nothing, small
/// enough that an interrupted one is soon copied again.
const DOCUMENTS_PER_RANGE: u64 = 250_000;
/// Ranges per worker at least, so that none waits long for the last.
const RANGES_PER_WORKER: usize = 4;
/// Ranges at most: their states are kept in memory.
const MOST_RANGES: usize = 10_000;

/// Everything decided before the job starts.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Name of the job.
    pub job: String,
    /// The collection to copy from.
    pub source: Namespace,
    /// The collection to copy to.
    pub target: Namespace,
    /// The collection for rejected documents, where they are kept.
    pub quarantine: Option<Namespace>,
    /// Which documents are valid.
    pub predicate: Predicate,
    /// What the source looks like.
    pub description: Description,
    /// Ranges at once.
    pub parallel: usize,
    /// Whether the application writes to the target too.
    pub dual_write: bool,
    /// What the job does.
    pub identity: Document,
}

/// Decides source, target and rules from config and options.
///
/// # Errors
/// A usage error where something is missing or can't be used.
pub async fn prepare(mongo: &Mongo, settings: &Settings, args: &CleanseArgs) -> Result<Plan> {
    let rules = rules(settings, args.source.as_ref())?;
    let to = args.to.clone().or_else(|| rules.to.clone()).ok_or_else(|| {
        Error::usage("the target is not named").hint("give --to COLLECTION, or set `cleanse.to`")
    })?;
    let source = rules.source.clone();
    let target = target_of(&source, &to)?;
    if target == source {
        return Err(Error::usage(format!("source and target are both {source}")));
    }
    let quarantine = args.quarantine.as_deref();
    let quarantine = quarantine.map(|name| quarantine::named(&source, &target, name)).transpose()?;
    [Some(&target), quarantine.as_ref()].into_iter().flatten().try_for_each(names::check_length)?;
    let predicate = compile(settings, &rules)?;
    combine::check(args, &predicate.valid())?;
    if let Some(index) = rules.exists_in.iter().position(|rule| rule.collection == target) {
        let key = format!("cleanse.exists_in.{index}.collection");
        return Err(settings.error_at(&key, format!("{target} is the target: its documents prove nothing")));
    }
    let description = build::describe_source(mongo, &source).await?;
    check_on_server(mongo, settings, &source, &predicate).await?;
    needs::check_reading(mongo, &source, &predicate.valid()).await?;
    let mut identity = doc! {
        "source": source.to_string(),
        "target": target.to_string(),
        "rules": predicate.identity(),
    };
    // Absent without: jobs that were begun before there was any go on.
    if let Some(quarantine) = &quarantine {
        identity.insert(quarantine::NAME, quarantine.to_string());
    }
    dual_write::mark_identity(&mut identity, args.dual_write);
    Ok(Plan {
        job: args.job.clone().unwrap_or_else(|| default_job(&source, &target)),
        dual_write: args.dual_write,
        identity,
        source,
        target,
        quarantine,
        predicate,
        description,
        parallel: usize::from(args.parallel),
    })
}

/// The target that `--to` names: a collection of the source's database, with or
/// without the name of the database before it.
///
/// # Errors
/// A usage error for a name that no collection can have.
pub fn target_of(source: &Namespace, to: &str) -> Result<Namespace> {
    let collection = to.strip_prefix(&format!("{}.", source.database)).unwrap_or(to);
    format!("{}.{collection}", source.database).parse().map_err(Error::usage)
}

/// The name under which the job of a copy is found again.
pub fn default_job(source: &Namespace, target: &Namespace) -> String {
    format!("cleanse-{source}-to-{}", target.collection)
}

/// The configured rules; without any, everything is kept.
///
/// # Errors
/// A usage error where neither config nor options name a source.
pub fn rules(settings: &Settings, source: Option<&Namespace>) -> Result<Cleanse> {
    match (&settings.cleanse, source) {
        (Some(rules), None) => Ok(rules.clone()),
        (Some(rules), Some(source)) if rules.source == *source => Ok(rules.clone()),
        (_, Some(source)) => Ok(Cleanse {
            source: source.clone(),
            to: None,
            keep: ExtendedJson::default(),
            reject: Vec::new(),
            exists_in: Vec::new(),
            dedupe: None,
            documents_per_second: 0,
            max_replication_lag: default_max_replication_lag(),
        }),
        (None, None) => Err(Error::usage("nothing to cleanse is configured")
            .hint("add `[cleanse]` with its `source`, or give --source")),
    }
}

/// Compiles the rules.
///
/// # Errors
/// A usage error at the key of a rule that can't be used.
pub fn compile(settings: &Settings, rules: &Cleanse) -> Result<Predicate> {
    Predicate::compile(rules).map_err(|(key, message)| settings.error_at(&key, message))
}

/// Lets the server parse the rules: it knows operators that we do not.
async fn check_on_server(
    mongo: &Mongo,
    settings: &Settings,
    source: &Namespace,
    predicate: &Predicate,
) -> Result<()> {
    let explain = explain(source, &predicate.valid());
    let database = mongo.database(&source.database);
    let refused = retrying("checking the rules on the server", || {
        let reply = database.run_command(explain.clone());
        async move {
            match reply.await {
                Ok(_) => Ok(None),
                Err(error) if is_parse_error(&error) => Ok(Some(describe_mongo(&error))),
                Err(error) => Err(error),
            }
        }
    })
    .await?;
    match refused {
        None => Ok(()),
        Some(reason) => Err(settings
            .error_at("cleanse", format!("the server does not accept the rules: {reason}"))
            .hint("mend `keep` or the `when` of a rule")),
    }
}

fn explain(source: &Namespace, valid: &Valid) -> Document {
    if valid.is_condition() {
        return doc! {"explain": {"find": &source.collection, "filter": valid.condition.clone(), "limit": 1}};
    }
    let mut pipeline = valid.stages();
    pipeline.extend(valid.grouping.iter().flat_map(Grouping::winners));
    doc! {
        "explain": {"aggregate": &source.collection, "pipeline": pipeline, "cursor": {}},
        "verbosity": "queryPlanner",
    }
}

/// Whether the server could not make sense of a condition, as opposed to being
/// unable or not allowed to answer.
fn is_parse_error(error: &mongodb::error::Error) -> bool {
    const NOT_THE_RULES: [i32; 3] = [13, 18, 8000];
    match error.kind.as_ref() {
        mongodb::error::ErrorKind::Command(command) => {
            !is_transient(error) && !NOT_THE_RULES.contains(&command.code)
        }
        _ => false,
    }
}

impl Plan {
    /// The quarantine with the rules that fill it, where there is one.
    pub fn rejected(&self) -> Option<Quarantine> {
        let namespace = self.quarantine.clone()?;
        Some(Quarantine { namespace, hits: self.predicate.first_hits() })
    }
}

/// Ranges for the copy of a source of this size.
pub async fn range_count(mongo: &Mongo, plan: &Plan) -> usize {
    let documents = mongo.collection(&plan.source).estimated_document_count().await.unwrap_or(0);
    let by_size = usize::try_from(documents / DOCUMENTS_PER_RANGE).unwrap_or(MOST_RANGES);
    by_size.clamp(plan.parallel * RANGES_PER_WORKER, MOST_RANGES)
}
