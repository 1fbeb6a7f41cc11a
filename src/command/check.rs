//! `check`: everything that can be known to go wrong before it does.

use serde_json::json;

use crate::Context;
use crate::config::Target;
use crate::config::values::{Namespace, ReadPreference};
use crate::error::{Class, Result};
use crate::key_api::classify::Outcome as Answer;
use crate::key_api::client::Client;
use crate::mongo::index::{self, IndexState};
use crate::mongo::preflight::{Finding, Level};
use crate::mongo::source::TargetCollection;
use crate::report::outcome::Outcome;

/// Asked for where no target has a candidate to take a key from.
const PROBE_KEY: &str = "mongorekey-probe";

/// Runs the command.
///
/// # Errors
/// A stop where the server goes away in between.
pub async fn run(context: &Context, target: Option<&str>) -> Result<Outcome> {
    let mongo = &context.mongo;
    let mut findings = mongo.check_server().await?;
    findings.extend(check_state(context).await);
    let targets =
        if context.settings.targets.is_empty() { Vec::new() } else { context.settings.targets(target)? };
    let mut namespaces: Vec<_> = targets.iter().map(|target| target.namespace.clone()).collect();
    namespaces.extend(context.settings.cleanse.iter().map(|cleanse| cleanse.source.clone()));
    namespaces.sort();
    namespaces.dedup();
    if let Some(cleanse) = &context.settings.cleanse {
        findings.push(check_source(context, &cleanse.source).await?);
    }
    for namespace in &namespaces {
        findings.extend(mongo.check_namespace(namespace).await?);
    }
    let mut probe_key = None;
    for target in &targets {
        let (finding, key) = check_index(context, target).await?;
        findings.push(finding);
        probe_key = probe_key.or(key);
    }
    if context.settings.key_api.is_some() {
        findings.push(probe(context, &probe_key.unwrap_or_else(|| PROBE_KEY.into())).await?);
    }
    Ok(report(&findings))
}

/// Whose the state database is, where it is somebody else's. One that can't be read is told with
/// the privileges.
async fn check_state(context: &Context) -> Option<Finding> {
    let refused = crate::job::refuse_others(&context.mongo).await.err()?;
    let name = format!("state database {}", context.settings.state_database);
    let hint = refused.next_step().unwrap_or_default().to_owned();
    (refused.class() == Class::Refused).then(|| Finding::fail(name, refused.to_string(), hint))
}

async fn check_source(context: &Context, source: &Namespace) -> Result<Finding> {
    let name = format!("cleanse {source}");
    Ok(match context.mongo.describe(source).await? {
        Some(description) if description.kind == "collection" => Finding::pass(name, "the collection exists"),
        Some(description) => {
            Finding::fail(name, format!("is a {}", description.kind), "name a plain collection")
        }
        None => Finding::fail(name, "the collection does not exist", "check `cleanse.source`"),
    })
}

/// The index, and the key of a candidate to probe the API with.
async fn check_index(context: &Context, target: &Target) -> Result<(Finding, Option<String>)> {
    let name = format!("index {}", target.namespace);
    let Some(description) = context.mongo.describe(&target.namespace).await? else {
        return Ok((
            Finding::fail(name, "the collection does not exist", "check `collection` of the target"),
            None,
        ));
    };
    match index::compare(target, &description) {
        IndexState::Missing => Ok((
            Finding::warn(name, "not created yet", "run `mongorekey index create` before the backfill"),
            None,
        )),
        IndexState::Different(difference) => {
            let hint = "drop it with `mongorekey index drop` and create it again";
            Ok((Finding::fail(name, difference, hint), None))
        }
        IndexState::Ready => {
            let collection =
                TargetCollection::open(&context.mongo, target, ReadPreference::Primary, false).await?;
            let explained = collection.explain(None, 100).await?;
            let found =
                format!("{} keys examined for {} documents", explained.keys_examined, explained.returned);
            let key = first_key(&collection).await?;
            let ours = explained.index.as_deref() == Some(index::name(target).as_str());
            if ours && !explained.sorted {
                Ok((Finding::pass(name, found), key))
            } else {
                Ok((
                    Finding::fail(
                        name,
                        format!("not used by the candidate query; {found}"),
                        "drop and create it again",
                    ),
                    key,
                ))
            }
        }
    }
}

async fn first_key(collection: &TargetCollection) -> Result<Option<String>> {
    let Some(bound) = collection.highest().await? else { return Ok(None) };
    let (candidates, _) = collection.chunk(None, &bound, 100, true).await?;
    Ok(candidates.iter().find_map(|candidate| candidate.legacy.text()))
}

async fn probe(context: &Context, key: &str) -> Result<Finding> {
    let api = context.settings.key_api()?.clone();
    let name = format!("key API {}", crate::config::template::shown(&api.url));
    let client = Client::new(api, 1, "check")?;
    let call = client.call(key).await;
    let milliseconds = call.latency.as_millis();
    Ok(match call.outcome {
        Answer::Found(_) | Answer::NotFound => {
            Finding::pass(name, format!("{} in {milliseconds} ms", call.outcome.describe()))
        }
        Answer::Rejected if key == PROBE_KEY => Finding::pass(
            name,
            format!("answers in {milliseconds} ms (refuses the probe key, which is no real one)"),
        ),
        Answer::Unauthorized(_) => {
            Finding::fail(name, call.outcome.describe(), "mend the credentials in `key_api.headers`")
        }
        Answer::Timeout | Answer::Connect(_) => {
            Finding::fail(name, call.outcome.describe(), "is the address right, and reachable from here?")
        }
        Answer::Invalid(_) | Answer::Redirect(_) | Answer::Rejected => Finding::fail(
            name,
            call.outcome.describe(),
            "describe the API's answers in `[key_api]`: url, key_pointer, not_found_status, not_found_when",
        ),
        _ => Finding::warn(name, call.outcome.describe(), "try again a little later"),
    })
}

fn report(findings: &[Finding]) -> Outcome {
    let passed = findings.iter().all(|finding| finding.level != Level::Fail);
    let lines: Vec<String> = findings.iter().map(Finding::text).collect();
    let json = json!({
        "schema": 1,
        "command": "check",
        "passed": passed,
        "checks": findings.iter().map(Finding::json).collect::<Vec<_>>(),
    });
    let outcome = Outcome::reached(json, lines.join("\n"));
    if passed { outcome } else { outcome.with_exit(3) }
}
