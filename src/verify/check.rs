//! One check and its result.

use serde_json::{Map, Value, json};

/// The result of a check.
#[derive(Debug, Clone, PartialEq)]
pub struct Check {
    /// Name, such as `counts` or `sample`.
    pub name: String,
    /// Whether it passed.
    pub passed: bool,
    /// What should be there.
    pub expected: Value,
    /// What is there.
    pub found: Value,
    /// Differences, at most as many as asked for.
    pub differences: Vec<Value>,
    /// Further words for people.
    pub remark: Option<String>,
    /// Further entries of the result.
    pub more: Map<String, Value>,
}

impl Check {
    /// A check that passes if both values are equal and there is no difference.
    pub fn of(name: impl Into<String>, expected: Value, found: Value, differences: Vec<Value>) -> Self {
        let passed = expected == found && differences.is_empty();
        Self { name: name.into(), passed, expected, found, differences, remark: None, more: Map::new() }
    }

    /// A check that fails because there is nothing to look at.
    pub fn nothing(name: impl Into<String>, what: &str) -> Self {
        Self {
            name: name.into(),
            passed: false,
            expected: json!("documents"),
            found: json!("none"),
            differences: Vec::new(),
            remark: Some(what.to_owned()),
            more: Map::new(),
        }
    }

    /// Adds words for people.
    #[must_use]
    pub fn remark(mut self, remark: impl Into<String>) -> Self {
        self.remark = Some(remark.into());
        self
    }

    /// Adds an entry to the result.
    #[must_use]
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.more.insert(name.into(), value);
        self
    }

    /// As an entry of the JSON result.
    pub fn json(&self) -> Value {
        let mut json = json!({
            "name": self.name,
            "passed": self.passed,
            "expected": self.expected,
            "found": self.found,
            "differences": self.differences,
            "remark": self.remark,
        });
        for (name, value) in &self.more {
            json[name] = value.clone();
        }
        json
    }

    /// As lines for people.
    pub fn text(&self) -> String {
        let mark = if self.passed { "ok  " } else { "FAIL" };
        let remark = self.remark.as_ref().map_or(String::new(), |remark| format!(" ({remark})"));
        let mut lines =
            vec![format!("{mark}   {}: expected {}, found {}{remark}", self.name, self.expected, self.found)];
        lines.extend(self.differences.iter().map(|difference| format!("         {}", text(difference))));
        lines.join("\n")
    }
}

/// A difference as a line for people.
fn text(difference: &Value) -> String {
    let (Some(id), Some(kind)) = (difference.get("_id"), difference["kind"].as_str()) else {
        return difference.to_string();
    };
    let fields = difference["details"].as_array().map(Vec::as_slice).unwrap_or_default();
    let told: Vec<String> = fields
        .iter()
        .map(|field| {
            let word = |name: &str| field[name].as_str().unwrap_or_default();
            format!("{}: {}", word("path"), word("detail"))
        })
        .collect();
    let age = difference["age_seconds"].as_f64().map_or(String::new(), |age| format!(" (for {age:.1} s)"));
    let late = difference["late_seconds"].as_f64().map_or(String::new(), |late| format!(" (by {late:.1} s)"));
    if told.is_empty() {
        format!("{kind} {id}{age}{late}")
    } else {
        format!("{kind} {id}{age}{late}: {}", told.join("; "))
    }
}
