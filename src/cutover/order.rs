//! What is decided before a cutover begins: what is exchanged, and under which fence.

use std::time::Duration;

use bson::Bson;

use crate::cleanse::plan::{default_job, rules, target_of};
use crate::cli::cutover::{CopyArgs, ExchangeArgs, FenceKind, Mode};
use crate::config::Settings;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::mongo::Mongo;

/// The longest name of a collection with its database, in bytes.
const LONGEST_NAME: usize = 255;

/// Names and identities that are exchanged.
#[derive(Debug, Clone, PartialEq)]
pub struct Renames {
    /// The name that the application uses.
    pub live: Namespace,
    /// The collection that bears it before.
    pub live_uuid: Bson,
    /// The name of the collection that takes its place.
    pub incoming: Namespace,
    /// That collection.
    pub incoming_uuid: Bson,
    /// The name that the former one gets; `None` where it is dropped.
    pub retired: Option<Namespace>,
    /// The name of the incoming collection during one attempt; `None` outside of it. Whoever
    /// recovers takes it away, and a rename that arrives after that finds nothing.
    pub working: Option<Namespace>,
}

impl Renames {
    /// The same for an attempt of that id.
    #[must_use]
    pub fn in_attempt(&self, id: &str) -> Self {
        Self { working: Some(working_name(&self.incoming, id)), ..self.clone() }
    }

    /// The names from which a collection can have got the live one: that of the copy, or the one
    /// that the former collection had for a moment.
    pub fn to_become_live(&self) -> Vec<&Namespace> {
        [Some(self.incoming_now()), self.retired.as_ref()].into_iter().flatten().collect()
    }

    /// The name of the incoming collection at the time of the exchange.
    pub fn incoming_now(&self) -> &Namespace {
        self.working.as_ref().unwrap_or(&self.incoming)
    }
}

/// Before the id of the attempt, where the name of the collection leaves no room for it.
const SHORT_NAME: &str = "mongorekey.";

/// The name of a collection during the attempt of that id. Pure.
pub fn working_name(incoming: &Namespace, id: &str) -> Namespace {
    let name = |collection| Namespace { database: incoming.database.clone(), collection };
    let working = name(format!("{}.{id}", incoming.collection));
    if working.to_string().len() <= LONGEST_NAME { working } else { name(format!("{SHORT_NAME}{id}")) }
}

/// Whether a collection has the name of some attempt. Pure.
pub fn is_working_name(incoming: &Namespace, name: &Namespace) -> bool {
    let before = format!("{}.", incoming.collection);
    let id = name.collection.strip_prefix(&before).or_else(|| name.collection.strip_prefix(SHORT_NAME));
    let is_id = |id: &str| id.len() == 16 && id.chars().all(|letter| letter.is_ascii_hexdigit());
    name.database == incoming.database && id.is_some_and(is_id)
}

/// How the two renames become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joint {
    /// One rename, which drops what bears the name.
    Replacing,
    /// Two renames under one lock.
    Together,
    /// Two renames; nobody can write in between.
    Blocked,
    /// Two renames with a gap.
    Gap,
}

/// How names are exchanged, decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Method {
    /// What holds writes off.
    pub is_blocking_all: bool,
    /// How the renames are done.
    pub joint: Joint,
    /// For how long writes may be held off.
    pub max_pause: Duration,
}

/// Decides how names are exchanged.
///
/// # Errors
/// A usage error for options that don't go together, a refusal for what this
/// user may not do.
pub async fn method(mongo: &Mongo, args: &ExchangeArgs, mode: Mode, live: &Namespace) -> Result<Method> {
    let max_pause = args.max_pause.0;
    let method = |is_blocking_all, joint| Method { is_blocking_all, joint, max_pause };
    match (mode, args.fence) {
        (Mode::Switch, _) => {
            Err(Error::usage("a switch exchanges no names and needs no fence").hint("leave --fence out"))
        }
        (Mode::Swap, Some(FenceKind::ApplyOps)) => {
            Err(Error::usage("a swap is one rename already").hint("leave --fence out"))
        }
        (_, Some(FenceKind::WriteBlock)) => {
            check_write_block(mongo).await?;
            let joint = if mode == Mode::Swap { Joint::Replacing } else { Joint::Blocked };
            Ok(method(true, joint))
        }
        (Mode::Swap, _) => Ok(method(false, Joint::Replacing)),
        (Mode::Keep, Some(FenceKind::Validator)) if args.allow_gap => Ok(method(false, Joint::Gap)),
        (Mode::Keep, Some(FenceKind::Validator)) => {
            Err(Error::usage("between two renames under a validator the name is free for a moment")
                .hint("accept that with --allow-gap, or leave --fence out"))
        }
        (Mode::Keep, fence) => {
            if mongo.may_rename_together(&live.database).await? {
                Ok(method(false, Joint::Together))
            } else if args.allow_gap && fence.is_none() {
                Ok(method(false, Joint::Gap))
            } else {
                Err(Error::refused("this user may not rename two collections at once (applyOps)").hint(
                    "use a user who may do any action on any resource, or --fence write-block, \
                     or accept with --allow-gap that the name is free for a moment",
                ))
            }
        }
    }
}

/// The block must not be somebody else's, and must let us through.
async fn check_write_block(mongo: &Mongo) -> Result<()> {
    if mongo.are_writes_blocked().await? {
        return Err(Error::refused("the writes of this deployment are blocked already, by somebody else")
            .hint("find out why before you lift it: setUserWriteBlockMode"));
    }
    let may = mongo.may_bypass_write_block().await?;
    if may {
        return Ok(());
    }
    Err(Error::refused("this user may not block writes, or would be blocked too").hint(
        "it needs the actions setUserWriteBlockMode and bypassWriteBlockingMode, as the role restore has",
    ))
}

/// The name of the job that options and config name.
///
/// # Errors
/// A usage error where they name none.
pub fn job_name(settings: &Settings, copy: &CopyArgs) -> Result<String> {
    if let Some(job) = &copy.job {
        return Ok(job.clone());
    }
    let rules = rules(settings, copy.source.as_ref())?;
    let to = copy.to.clone().or_else(|| rules.to.clone()).ok_or_else(|| {
        Error::usage("the target is not named").hint("give --to COLLECTION, or set `cleanse.to`")
    })?;
    Ok(default_job(&rules.source, &target_of(&rules.source, &to)?))
}

/// The name that a collection gets which gives way.
///
/// # Errors
/// A usage error where it would be too long.
pub fn retired_name(live: &Namespace, job: &str) -> Result<Namespace> {
    // A job's name may hold what a collection's may not.
    let safe: String =
        job.chars().map(|letter| if letter.is_control() || letter == '$' { '_' } else { letter }).collect();
    let retired = Namespace {
        database: live.database.clone(),
        collection: format!("{}_before_{safe}", live.collection),
    };
    if retired.to_string().len() > LONGEST_NAME {
        return Err(Error::usage(format!("the old collection would be called {retired}, which is too long"))
            .hint("give the cleanse a shorter name with --job"));
    }
    Ok(retired)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_has_a_name_of_its_own_that_is_not_too_long() {
        let renames = |incoming: String| Renames {
            live: "app.users".parse().expect("valid"),
            live_uuid: 1.into(),
            incoming: Namespace { database: "app".into(), collection: incoming },
            incoming_uuid: 2.into(),
            retired: None,
            working: None,
        };
        let working = |incoming: String| renames(incoming).in_attempt("a1b2").working.expect("a name");
        assert_eq!(working("users_v2".into()).to_string(), "app.users_v2.a1b2");
        assert_eq!(working("x".repeat(250)).to_string(), "app.mongorekey.a1b2");
        let incoming: Namespace = "app.users_v2".parse().expect("valid");
        let id = "0123456789abcdef";
        assert!(is_working_name(&incoming, &working_name(&incoming, id)));
        for other in ["app.users_v2", "app.users_v2.old", "b.users_v2.0123456789abcdef"] {
            assert!(!is_working_name(&incoming, &other.parse().expect("valid")), "{other}");
        }
    }

    #[test]
    fn what_gives_way_is_named_after_its_job() {
        let live: Namespace = "app.users".parse().expect("valid");
        let retired = retired_name(&live, "cleanse-app.users-to-users_v2").expect("short enough");
        assert_eq!(retired.to_string(), "app.users_before_cleanse-app.users-to-users_v2");
        assert!(retired_name(&live, &"x".repeat(250)).is_err());
        assert_eq!(retired_name(&live, "a$b").expect("valid").collection, "users_before_a_b");
    }
}
