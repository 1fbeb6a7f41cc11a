//! Which documents are valid. Pure: from rules to conditions.
//!
//! The rules are compiled once; dry-run, copy, counts and verification all use
//! the same conditions, so they can't disagree about a document.

use bson::{Bson, Document, doc};

use crate::config::file::Cleanse;

/// The name under which documents that fail `keep` are counted.
pub const KEEP: &str = "keep";

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
        })
    }

    /// A predicate that every document passes.
    pub fn everything() -> Self {
        Self { keep: Document::new(), rejects: Vec::new() }
    }

    /// The condition for valid documents.
    pub fn valid(&self) -> Document {
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

    /// The rules in the order in which they count, each with the condition for
    /// documents that it is the first to hit.
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
        doc! {"keep": text(&self.keep), "reject": rejects}
    }
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
        assert_eq!(predicate.valid(), doc! {"$and": [{"k": 1}, {"$nor": [{"a": 1}, {"b": 1}]}]});
        let hits = predicate.first_hits();
        assert_eq!(hits[0], ("keep".into(), doc! {"$nor": [{"k": 1}]}));
        assert_eq!(hits[1], ("a".into(), doc! {"$and": [{"k": 1}, {"a": 1}]}));
        assert_eq!(hits[2], ("b".into(), doc! {"$and": [{"k": 1}, {"$nor": [{"a": 1}]}, {"b": 1}]}));
    }

    #[test]
    fn no_rules_keep_everything() {
        let predicate = Predicate::compile(&rules(Document::new(), &[])).expect("valid");
        assert_eq!(predicate, Predicate::everything());
        assert!(predicate.valid().is_empty() && predicate.first_hits().is_empty());
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
