//! From a file on disk to a [`File`], with every error
//! naming file, line and key.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::file::File;
use crate::error::{Error, Result};

/// The text of a config file and its parsed form, kept together so that a rule
/// across several keys can still point at a line.
#[derive(Debug)]
pub struct Source {
    name: String,
    text: String,
}

impl Source {
    /// Reads a file.
    ///
    /// # Errors
    /// A usage error naming the file where it can't be read.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::usage(format!("the config file {name} can't be read: {error}"))
                .hint("name another one with --config, or write one with `mongorekey init`")
        })?;
        Ok(Self { name, text })
    }

    /// A config that comes from a string; `name` stands for it in errors.
    pub fn from_text(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { name: name.into(), text: text.into() }
    }

    /// Parses and validates everything; `environment` looks up `${NAME}`.
    ///
    /// # Errors
    /// A usage error naming file, line and key.
    pub fn parse(&self, environment: &dyn Fn(&str) -> Option<String>) -> Result<File> {
        let mut table = DeTable::parse(&self.text).map_err(|error| self.explain(&error, None))?;
        self.expand_table(table.get_mut(), "", environment)?;
        let tree = table.clone();
        File::deserialize(toml::Deserializer::from(table))
            .map_err(|error| self.explain(&error, Some(tree.get_ref())))
    }

    /// An error at a key that was read without error but breaks a rule.
    pub fn error_at(&self, key: &str, message: impl std::fmt::Display) -> Error {
        let line = DeTable::parse(&self.text)
            .ok()
            .and_then(|table| find_key(table.get_ref(), key))
            .map_or(String::new(), |span| format!(":{}", self.line(span.start)));
        Error::usage(format!("{}{line}: `{key}`: {message}", self.name))
    }

    /// Whether the file itself gives a dotted key a value.
    pub fn names(&self, key: &str) -> bool {
        let table = DeTable::parse(&self.text).ok();
        let value = key.split('.').try_fold(table.as_ref().map(Spanned::get_ref), |table, part| {
            let value = table?.get(part)?.get_ref();
            Some(value.as_table())
        });
        value.is_some()
    }

    fn explain(&self, error: &toml::de::Error, tree: Option<&DeTable<'_>>) -> Error {
        let span = error.span().unwrap_or(0..0);
        let key = tree
            .and_then(|tree| innermost_key(tree, "", &span))
            .map_or(String::new(), |key| format!(" `{key}`:"));
        let message = without_value(error.message().trim());
        Error::usage(format!("{}:{}:{key} {message}", self.name, self.line(span.start)))
            .hint("`mongorekey init` writes a commented example")
    }

    fn line(&self, offset: usize) -> usize {
        self.text.as_bytes()[..offset.min(self.text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
    }

    fn expand_table(
        &self,
        table: &mut DeTable<'_>,
        prefix: &str,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<()> {
        for (key, value) in table.iter_mut() {
            self.expand_value(value, &join(prefix, key.get_ref()), environment)?;
        }
        Ok(())
    }

    fn expand_value(
        &self,
        value: &mut Spanned<DeValue<'_>>,
        key: &str,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<()> {
        let start = value.span().start;
        match value.get_mut() {
            DeValue::String(text) => {
                let expanded = expand(text, environment).map_err(|message| {
                    Error::usage(format!("{}:{}: `{key}`: {message}", self.name, self.line(start)))
                        .hint("export the variable, or write the value into the file")
                })?;
                *text = Cow::Owned(expanded);
                Ok(())
            }
            DeValue::Array(items) => {
                items.iter_mut().try_for_each(|item| self.expand_value(item, key, environment))
            }
            DeValue::Table(table) => self.expand_table(table, key, environment),
            _ => Ok(()),
        }
    }
}

/// A message about a value of the wrong type without the value, which may be a
/// secret in the wrong place: `invalid type: string "…", expected a map`.
fn without_value(message: &str) -> Cow<'_, str> {
    match (message.find("string \""), message.rfind("\", expected")) {
        (Some(start), Some(end)) if start < end => {
            let (start, end) = (start + "string".len(), end + 1);
            format!("{}{}", &message[..start], &message[end..]).into()
        }
        _ => message.into(),
    }
}

/// Replaces every `${NAME}`; `$` elsewhere stays, because extended JSON is full
/// of it.
fn expand(text: &str, environment: &dyn Fn(&str) -> Option<String>) -> std::result::Result<String, String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let (before, reference) = rest.split_at(start);
        let Some(end) = reference.find('}') else {
            return Err("`${` without a closing `}`".into());
        };
        let name = &reference[2..end];
        let value = environment(name).ok_or_else(|| format!("the environment variable {name} is not set"))?;
        expanded.push_str(before);
        expanded.push_str(&value);
        rest = &reference[end + 1..];
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.into() } else { format!("{prefix}.{key}") }
}

/// The dotted name of the deepest key whose name or value covers the span.
fn innermost_key(table: &DeTable<'_>, prefix: &str, span: &Range<usize>) -> Option<String> {
    table.iter().find_map(|(key, value)| {
        let name = join(prefix, key.get_ref());
        let deeper = match value.get_ref() {
            DeValue::Table(inner) => innermost_key(inner, &name, span),
            DeValue::Array(items) => items
                .iter()
                .filter_map(|item| item.get_ref().as_table())
                .find_map(|inner| innermost_key(inner, &name, span)),
            _ => None,
        };
        deeper.or_else(|| (covers(&key.span(), span) || covers(&value.span(), span)).then_some(name))
    })
}

fn covers(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// The span of a dotted key, where a number selects an array's entry.
fn find_key(table: &DeTable<'_>, key: &str) -> Option<Range<usize>> {
    let mut span = None;
    let mut parts = key.split('.').peekable();
    let mut current = table;
    while let Some(part) = parts.next() {
        let (name, value) = current.iter().find(|(name, _)| name.get_ref() == part)?;
        span = Some(name.span());
        match value.get_ref() {
            DeValue::Table(inner) => current = inner,
            DeValue::Array(items) => {
                let Some(index) = parts.next().and_then(|index| index.parse::<usize>().ok()) else { break };
                match items.get(index)?.get_ref() {
                    DeValue::Table(inner) => current = inner,
                    _ => break,
                }
            }
            _ => break,
        }
    }
    span
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        let environment = |name: &str| (name == "SET").then(|| "value".to_owned());
        Source::from_text("m.toml", text)
            .parse(&environment)
            .expect_err("must be refused")
            .message()
            .to_owned()
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let cases = [
            ("[mongodb]\nuri = \"x\"\nurii = \"y\"\n", "m.toml:3:", "urii"),
            ("[mongodb]\nuri = 5\n", "m.toml:2:", "mongodb.uri"),
            (
                "[key_api]\nurl = \"http://x/{key}\"\n\nkey_pointer = \"newKey\"\n",
                "m.toml:4:",
                "key_api.key_pointer",
            ),
            ("[cleanse]\nsource = \"app.users\"\nkeep = '{\"a\": }'\n", "m.toml:3:", "cleanse.keep"),
            ("[backfill]\ntps = 0\n", "m.toml:2:", "backfill.tps"),
            ("[mongodb]\n\nuri = \"${UNSET}\"\n", "m.toml:3:", "mongodb.uri"),
            ("[backfill]\nwindows = [\"25:00-26:00\"]\n", "m.toml:2:", "backfill.windows"),
            (
                "[[backfill.targets]]\ncollection = \"users\"\nlegacy_field = \"a\"\nkey_field = \"b\"\nflag_field = \"c\"\n",
                "m.toml:2:",
                "backfill.targets.collection",
            ),
            (
                "[cleanse]\nsource = \"app.users\"\nreject = [{ name = \"x\", when = '{\"$a\": {\"$oid\": \"1\"}}' }]\n",
                "m.toml:3:",
                "cleanse.reject.when",
            ),
            ("[mongodb\n", "m.toml:1:", ""),
        ];
        for (text, place, key) in cases {
            let message = message(text);
            assert!(message.starts_with(place), "{message}");
            assert!(message.contains(key), "{message}");
        }
    }

    #[test]
    fn variables_are_expanded_and_other_dollars_kept() {
        let environment = |name: &str| (name == "SET").then(|| "value".to_owned());
        assert_eq!(expand("a${SET}b{\"$gt\": 1}", &environment), Ok("avalueb{\"$gt\": 1}".into()));
        assert!(expand("${SET", &environment).is_err());
    }

    #[test]
    fn a_variable_cannot_break_out_of_its_string() {
        let environment = |_: &str| Some("x\"\n[backfill]\ntps = 99".to_owned());
        let file =
            Source::from_text("m.toml", "[mongodb]\nuri = \"${A}\"\n").parse(&environment).expect("valid");
        assert!((file.backfill.tps.per_second() - 10.0).abs() < f64::EPSILON);
    }

    #[test]
    fn rules_across_keys_point_at_a_line() {
        let source = Source::from_text(
            "m.toml",
            "[key_api]\nurl = \"u\"\n[[backfill.targets]]\nname = \"a\"\n[[backfill.targets]]\nname = \"b\"\n",
        );
        assert!(source.error_at("key_api.url", "x").message().starts_with("m.toml:2: `key_api.url`"));
        assert!(source.error_at("backfill.targets.1.name", "x").message().starts_with("m.toml:6:"));
    }
}
