//! Which documents are valid. Pure: from rules to conditions.
//!
//! The rules are compiled once; dry-run, copy, counts and verification all use
//! the same conditions, so they can't disagree about a document.

use bson::{Bson, Document, doc};

use crate::config::file::Cleanse;
use crate::config::values::FieldPath;
use crate::mongo::valid::{Grouping, Membership, Valid};

/// The name under which documents that fail `keep` are counted.
pub const KEEP: &str = "keep";
/// The name under which documents are counted that lose to another one.
pub const DEDUPE: &str = "dedupe";

/// Operators whose result changes without a change of the document, or that an
/// aggregation can't evaluate.
const FORBIDDEN: [&str; 13] = [
    "$where",
    "$function",
    "$accumulator",
    "$text",
    "$near",
    "$nearSphere",
    "$geoNear",
    "$rand",
    "$sampleRate",
    "$sample",
    "$search",
    "$lookup",
    "$meta",
];
/// Variables that change without a change of the document.
const FORBIDDEN_VARIABLES: [&str; 3] = ["$$NOW", "$$CLUSTER_TIME", "$$USER_ROLES"];

/// The compiled rules.
#[derive(Debug, Clone, PartialEq)]
pub struct Predicate {
    keep: Document,
    rejects: Vec<(String, Document)>,
    memberships: Vec<(String, Membership)>,
    grouping: Option<Grouping>,
}

/// A rule, and the documents that it is the first to hit, as stages.
#[derive(Debug, Clone, PartialEq)]
pub struct Hits {
    /// Name of the rule.
    pub rule: String,
    /// Leave one document with their number, as `n`, or none where there are none.
    pub count: Vec<Document>,
    /// Leave documents with their `_id`.
    pub sample: Vec<Document>,
}

impl Predicate {
    /// Compiles the rules.
    ///
    /// # Errors
    /// The key of the rule that can't be used, and why.
    pub fn compile(rules: &Cleanse) -> Result<Self, (String, String)> {
        let check = |key: String, condition: &Document| match forbidden(condition) {
            Some(found) => Err((
                key,
                format!(
                    "`{found}` can't be used: its result changes without a change of the document, or it can't run in a pipeline"
                ),
            )),
            None => Ok(()),
        };
        check("cleanse.keep".into(), &rules.keep.0)?;
        for (index, rule) in rules.reject.iter().enumerate() {
            check(format!("cleanse.reject.{index}.when"), &rule.when.0)?;
        }
        Ok(Self {
            keep: rules.keep.0.clone(),
            rejects: rules.reject.iter().map(|rule| (rule.name.clone(), rule.when.0.clone())).collect(),
            memberships: memberships(rules)?,
            grouping: grouping(rules)?,
        })
    }

    /// A predicate that every document passes.
    pub fn everything() -> Self {
        Self { keep: Document::new(), rejects: Vec::new(), memberships: Vec::new(), grouping: None }
    }

    /// What makes a document valid: what every step asks the database.
    pub fn valid(&self) -> Valid {
        Valid { grouping: self.grouping.clone(), ..self.passing(self.memberships.len()) }
    }

    /// What passes `keep`, `reject` and so many of `exists_in`.
    fn passing(&self, memberships: usize) -> Valid {
        let memberships: Vec<Membership> =
            self.memberships.iter().take(memberships).map(|(_, membership)| membership.clone()).collect();
        let mut conditions = vec![Bson::Document(self.condition())];
        conditions.extend(memberships.iter().map(|membership| Bson::Document(membership.asks())));
        Valid { condition: all_of(conditions), memberships, grouping: None }
    }

    /// The condition on the document alone: `keep`, and none of `reject`.
    pub fn condition(&self) -> Document {
        let mut conditions = Vec::new();
        if !self.keep.is_empty() {
            conditions.push(Bson::Document(self.keep.clone()));
        }
        if !self.rejects.is_empty() {
            let rejects: Vec<Bson> =
                self.rejects.iter().map(|(_, when)| Bson::Document(when.clone())).collect();
            conditions.push(Bson::Document(doc! {"$nor": rejects}));
        }
        all_of(conditions)
    }

    /// The rules in the order in which they count, each with the documents that it
    /// is the first to hit.
    pub fn hits(&self) -> Vec<Hits> {
        let counted = |rule: &str, documents: Vec<Document>| Hits {
            rule: rule.to_owned(),
            count: documents.iter().cloned().chain([doc! {"$count": "n"}]).collect(),
            sample: documents,
        };
        let mut hits: Vec<Hits> = self
            .first_hits()
            .into_iter()
            .map(|(rule, condition)| counted(&rule, vec![doc! {"$match": condition}]))
            .collect();
        for (number, (rule, membership)) in self.memberships.iter().enumerate() {
            let mut stages = self.passing(number).stages();
            stages.extend(membership.strangers());
            hits.push(counted(rule, stages));
        }
        if let Some(grouping) = &self.grouping {
            let candidates = self.valid().stages();
            let with = |stages: Vec<Document>| candidates.iter().cloned().chain(stages).collect();
            hits.push(Hits {
                rule: DEDUPE.into(),
                count: with(grouping.count_losers()),
                sample: with(grouping.losers()),
            });
        }
        hits
    }

    /// The rules on the document alone in the order in which they count, each with
    /// the condition for documents that it is the first to hit.
    pub fn first_hits(&self) -> Vec<(String, Document)> {
        let mut hits = Vec::new();
        let mut passed: Vec<Bson> = Vec::new();
        if !self.keep.is_empty() {
            hits.push((KEEP.to_owned(), doc! {"$nor": [self.keep.clone()]}));
            passed.push(Bson::Document(self.keep.clone()));
        }
        for (name, when) in &self.rejects {
            let mut conditions = passed.clone();
            conditions.push(Bson::Document(when.clone()));
            hits.push((name.clone(), all_of(conditions)));
            passed.push(Bson::Document(doc! {"$nor": [when.clone()]}));
        }
        hits
    }

    /// The rules as extended JSON, for the identity of a job.
    pub fn identity(&self) -> Document {
        let text =
            |document: &Document| Bson::Document(document.clone()).into_canonical_extjson().to_string();
        let rejects: Vec<Bson> = self
            .rejects
            .iter()
            .map(|(name, when)| Bson::Document(doc! {"name": name, "when": text(when)}))
            .collect();
        let mut identity = doc! {"keep": text(&self.keep), "reject": rejects};
        if !self.memberships.is_empty() {
            let exists_in = self.memberships.iter().map(|(name, membership)| {
                let Membership { collection, local, foreign } = membership;
                Bson::Document(
                    doc! {"name": name, "collection": collection, "local": local, "foreign": foreign},
                )
            });
            identity.insert("exists_in", exists_in.collect::<Vec<_>>());
        }
        if let Some(Grouping { by, keep_latest }) = &self.grouping {
            identity.insert("dedupe", doc! {"by": by, "keep_latest": keep_latest});
        }
        identity
    }
}

/// The error of a rule: its key in the config, and what is wrong with it.
type BadRule = (String, String);

fn memberships(rules: &Cleanse) -> Result<Vec<(String, Membership)>, BadRule> {
    let membership = |(index, rule): (usize, &crate::config::file::ExistsIn)| {
        let bad = |key: &str, message: String| Err((format!("cleanse.exists_in.{index}.{key}"), message));
        if rule.collection.database != rules.source.database {
            return bad(
                "collection",
                format!(
                    "`{}` is in another database than {}: the server can't look it up from there",
                    rule.collection, rules.source
                ),
            );
        }
        if rule.foreign != "_id"
            && let Err(message) = rule.foreign.parse::<FieldPath>()
        {
            return bad("foreign", message);
        }
        let membership = Membership {
            collection: rule.collection.collection.clone(),
            local: rule.local.to_string(),
            foreign: rule.foreign.clone(),
        };
        Ok((rule.name.clone(), membership))
    };
    rules.exists_in.iter().enumerate().map(membership).collect()
}

fn grouping(rules: &Cleanse) -> Result<Option<Grouping>, BadRule> {
    let Some(dedupe) = &rules.dedupe else { return Ok(None) };
    let bad = |message: &str| Err(("cleanse.dedupe".to_owned(), message.to_owned()));
    if dedupe.by.is_empty() {
        return bad("`by` names no field");
    }
    for (index, field) in dedupe.by.iter().enumerate() {
        if dedupe.by[..index].iter().any(|other| other.overlaps(field)) {
            return bad("`by` names a field twice");
        }
    }
    let by = dedupe.by.iter().map(ToString::to_string).collect();
    Ok(Some(Grouping { by, keep_latest: dedupe.keep_latest.to_string() }))
}

/// All conditions at once, without a needless `$and`.
pub fn all_of(mut conditions: Vec<Bson>) -> Document {
    conditions.retain(|condition| condition.as_document().is_none_or(|document| !document.is_empty()));
    match conditions.as_slice() {
        [] => Document::new(),
        [Bson::Document(only)] => only.clone(),
        _ => doc! {"$and": conditions},
    }
}

fn forbidden(condition: &Document) -> Option<String> {
    condition.iter().find_map(|(name, value)| {
        if FORBIDDEN.contains(&name.as_str()) { Some(name.clone()) } else { forbidden_value(value) }
    })
}

fn forbidden_value(value: &Bson) -> Option<String> {
    match value {
        Bson::Document(inner) => forbidden(inner),
        Bson::Array(items) => items.iter().find_map(forbidden_value),
        Bson::String(text) => FORBIDDEN_VARIABLES
            .iter()
            .find(|variable| {
                text.strip_prefix(**variable).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            })
            .map(|variable| (*variable).to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file::RejectRule;
    use crate::config::values::ExtendedJson;

    fn rules(keep: Document, rejects: &[(&str, Document)]) -> Cleanse {
        Cleanse {
            source: "app.users".parse().expect("a namespace"),
            to: None,
            keep: ExtendedJson(keep),
            reject: rejects
                .iter()
                .map(|(name, when)| RejectRule { name: (*name).into(), when: ExtendedJson(when.clone()) })
                .collect(),
            exists_in: Vec::new(),
            documents_per_second: 0,
            max_replication_lag: crate::config::file::default_max_replication_lag(),
            dedupe: None,
        }
    }

    #[test]
    fn the_first_rule_that_hits_counts() {
        let predicate =
            Predicate::compile(&rules(doc! {"k": 1}, &[("a", doc! {"a": 1}), ("b", doc! {"b": 1})]))
                .expect("valid");
        assert!(predicate.valid().is_condition());
        assert_eq!(predicate.valid().condition, doc! {"$and": [{"k": 1}, {"$nor": [{"a": 1}, {"b": 1}]}]});
        let hits = predicate.first_hits();
        assert_eq!(hits[0], ("keep".into(), doc! {"$nor": [{"k": 1}]}));
        assert_eq!(hits[1], ("a".into(), doc! {"$and": [{"k": 1}, {"a": 1}]}));
        assert_eq!(hits[2], ("b".into(), doc! {"$and": [{"k": 1}, {"$nor": [{"a": 1}]}, {"b": 1}]}));
    }

    #[test]
    fn no_rules_keep_everything() {
        let predicate = Predicate::compile(&rules(Document::new(), &[])).expect("valid");
        assert_eq!(predicate, Predicate::everything());
        assert!(predicate.valid().is_everything() && predicate.first_hits().is_empty());
    }

    fn with_members_and_groups() -> Cleanse {
        let mut rules = rules(doc! {"k": 1}, &[("a", doc! {"a": 1})]);
        rules.exists_in = ["one", "other"]
            .map(|name| crate::config::file::ExistsIn {
                name: name.into(),
                collection: format!("app.{name}").parse().expect("a namespace"),
                local: "l".parse().expect("a path"),
                foreign: "_id".into(),
            })
            .to_vec();
        rules.dedupe = Some(crate::config::file::Dedupe {
            by: vec!["b".parse().expect("a path")],
            keep_latest: "at".parse().expect("a path"),
        });
        rules
    }

    #[test]
    fn every_rule_is_asked_of_what_passed_the_ones_before() {
        let predicate = Predicate::compile(&with_members_and_groups()).expect("valid");
        let hits = predicate.hits();
        let names: Vec<&str> = hits.iter().map(|hits| hits.rule.as_str()).collect();
        assert_eq!(names, ["keep", "a", "one", "other", "dedupe"]);
        let lookups = |hits: &Hits| hits.count.iter().filter(|stage| stage.contains_key("$lookup")).count();
        assert_eq!(hits.iter().map(lookups).collect::<Vec<_>>(), [0, 0, 1, 2, 2]);
        assert!(!predicate.valid().is_condition());
        assert_eq!(predicate.valid().memberships.len(), 2);
    }

    #[test]
    fn rules_that_look_elsewhere_belong_to_the_identity() {
        let all = with_members_and_groups();
        let identity = |rules: &Cleanse| Predicate::compile(rules).expect("valid").identity();
        let mut without = all.clone();
        without.dedupe = None;
        let mut other = all.clone();
        other.exists_in[1].foreign = "n".into();
        assert_ne!(identity(&all), identity(&without));
        assert_ne!(identity(&all), identity(&other));
        without.exists_in.clear();
        assert_eq!(identity(&without).len(), 2, "that of a job of an earlier version");
    }

    #[test]
    fn rules_that_can_not_be_asked_are_refused_at_their_key() {
        let refused = |change: fn(&mut Cleanse)| {
            let mut rules = with_members_and_groups();
            change(&mut rules);
            Predicate::compile(&rules).expect_err("refused").0
        };
        let elsewhere = |rules: &mut Cleanse| {
            rules.exists_in[1].collection = "elsewhere.members".parse().expect("a namespace");
        };
        assert_eq!(refused(elsewhere), "cleanse.exists_in.1.collection");
        assert_eq!(refused(|rules| rules.exists_in[0].foreign = "$x".into()), "cleanse.exists_in.0.foreign");
        for by in [&[][..], &["a", "a"], &["a", "a.b"]] {
            let mut rules = with_members_and_groups();
            let dedupe = rules.dedupe.as_mut().expect("set");
            dedupe.by = by.iter().map(|field| field.parse().expect("a path")).collect();
            assert_eq!(Predicate::compile(&rules).expect_err("refused").0, "cleanse.dedupe");
        }
    }

    #[test]
    fn what_changes_by_itself_is_refused_wherever_it_stands() {
        for bad in [
            doc! {"$where": "true"},
            doc! {"$expr": {"$lt": ["$at", "$$NOW"]}},
            doc! {"$and": [{"a": 1}, {"$expr": {"$gt": [{"$rand": {}}, 0.5]}}]},
            doc! {"$or": [{"$text": {"$search": "x"}}]},
            doc! {"$sampleRate": 0.5},
            doc! {"place": {"$near": [0, 0]}},
        ] {
            let (key, _) = Predicate::compile(&rules(bad.clone(), &[])).expect_err("refused");
            assert_eq!(key, "cleanse.keep", "{bad}");
            let (key, _) = Predicate::compile(&rules(Document::new(), &[("x", bad)])).expect_err("refused");
            assert_eq!(key, "cleanse.reject.0.when");
        }
    }
}
