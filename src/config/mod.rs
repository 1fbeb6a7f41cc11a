//! What was decided: options over environment over file, validated once.
//!
//! Nothing later asks whether an option was given. A rule that spans several
//! keys is checked here and reported at the line of the key to change.

pub mod file;
mod key_api;
pub mod load;
pub mod template;
pub mod values;

use std::path::{Path, PathBuf};

use self::file::{Cleanse, File, KeyApi, Method};
use self::load::Source;
use self::values::{ExtendedJson, FieldPath, Namespace, Secret};
use crate::error::{Error, Result};
use crate::key_api::tls;

pub use self::file::Backfill;

/// The file that is read where `--config` names no other.
pub const DEFAULT_FILE: &str = "mongorekey.toml";
/// Overrides the URI of the file.
pub const URI_VARIABLE: &str = "MONGOREKEY_URI";

/// Overrides the URL of the key API in the file; `--api-url` overrides both.
pub const API_URL_VARIABLE: &str = "MONGOREKEY_API_URL";

/// A collection to fill, with everything decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// Name, unique among the targets.
    pub name: String,
    /// The collection.
    pub namespace: Namespace,
    /// Field that holds the legacy key.
    pub legacy_field: FieldPath,
    /// Field that receives the new key.
    pub key_field: FieldPath,
    /// Field that receives the flag.
    pub flag_field: FieldPath,
    /// Further condition on candidates.
    pub filter: ExtendedJson,
}

/// A target as options describe it, for use without a config file.
#[derive(Debug, Clone, Default)]
pub struct TargetOptions {
    /// `--collection`
    pub collection: Option<Namespace>,
    /// `--legacy-field`
    pub legacy_field: Option<FieldPath>,
    /// `--key-field`
    pub key_field: Option<FieldPath>,
    /// `--flag-field`
    pub flag_field: Option<FieldPath>,
}

/// What the options say that concerns the configuration as a whole.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--config`
    pub config: Option<PathBuf>,
    /// `--uri`
    pub uri: Option<Secret>,
    /// `--api-url`
    pub api_url: Option<String>,
    /// `--collection` and the fields.
    pub target: TargetOptions,
}

/// The whole configuration, decided.
#[derive(Debug)]
pub struct Settings {
    /// Connection string.
    pub uri: Secret,
    /// Database of jobs, checkpoints and the key map.
    pub state_database: String,
    /// The key API, where one is configured.
    pub key_api: Option<KeyApi>,
    /// Collections to fill.
    pub targets: Vec<Target>,
    /// How to fill them.
    pub backfill: Backfill,
    /// What to cleanse, where that is configured.
    pub cleanse: Option<Cleanse>,
    /// For errors that point at a line.
    source: Source,
}

impl Settings {
    /// Reads, merges and validates.
    ///
    /// # Errors
    /// A usage error naming file, line and key.
    pub fn load(overrides: &Overrides) -> Result<Self> {
        let environment = |name: &str| std::env::var(name).ok();
        let source = read_source(overrides.config.as_deref())?;
        let mut file = source.parse(&environment)?;
        let api_url = overrides.api_url.clone().or_else(|| environment(API_URL_VARIABLE));
        apply_api_url(&mut file, api_url.as_deref());
        default_to_post(&mut file, &source);
        let targets = resolve_targets(&source, &file, &overrides.target)?;
        let mongodb_uri = file.mongodb.as_mut().and_then(|mongodb| mongodb.uri.take());
        let uri = overrides
            .uri
            .clone()
            .or_else(|| environment(URI_VARIABLE).map(Secret::new))
            .or(mongodb_uri)
            .ok_or_else(|| {
                Error::usage("no MongoDB URI is given")
                    .hint(format!("set `mongodb.uri` in the config, the variable {URI_VARIABLE} or --uri"))
            })?;
        let state_database =
            file.mongodb.map_or_else(file::default_state_database, |mongodb| mongodb.state_database);
        let settings = Self {
            uri,
            state_database,
            key_api: file.key_api,
            targets,
            backfill: file.backfill,
            cleanse: file.cleanse,
            source,
        };
        settings.validate()?;
        Ok(settings)
    }

    /// A usage error at a key of the config file.
    pub fn error_at(&self, key: &str, message: impl std::fmt::Display) -> Error {
        self.source.error_at(key, message)
    }

    /// The key API, for a command that calls it: only those need its
    /// certificates, so only here they are looked at.
    ///
    /// # Errors
    /// A usage error where none is configured or its certificates are unusable.
    pub fn key_api(&self) -> Result<&KeyApi> {
        let api = self.key_api.as_ref().ok_or_else(|| {
            Error::usage("no key API is configured").hint("add `[key_api]` with its `url`, or give --api-url")
        })?;
        tls::client_config(api).map_err(|unusable| self.error_at(unusable.key, unusable.reason))?;
        Ok(api)
    }

    /// The targets, all or the one named.
    ///
    /// # Errors
    /// A usage error where there is none, or none of that name.
    pub fn targets(&self, name: Option<&str>) -> Result<Vec<Target>> {
        if self.targets.is_empty() {
            return Err(Error::usage("no target is configured")
                .hint("add `[[backfill.targets]]`, or give --collection, --legacy-field, --key-field and --flag-field"));
        }
        let chosen: Vec<_> = self
            .targets
            .iter()
            .filter(|target| name.is_none_or(|name| target.name == name))
            .cloned()
            .collect();
        if chosen.is_empty() {
            let known: Vec<_> = self.targets.iter().map(|target| target.name.as_str()).collect();
            return Err(Error::usage(format!("there is no target `{}`", name.unwrap_or_default()))
                .hint(format!("the config names: {}", known.join(", "))));
        }
        Ok(chosen)
    }

    fn validate(&self) -> Result<()> {
        if self.state_database.is_empty()
            || self.state_database.contains(['/', '\\', '.', ' ', '"', '$', '\0'])
        {
            return Err(self.error_at("mongodb.state_database", "is no valid name of a database"));
        }
        if !(1..=100_000).contains(&self.backfill.chunk) {
            return Err(self.error_at("backfill.chunk", "must be from 1 to 100000"));
        }
        if let Some(api) = &self.key_api {
            key_api::check(api).map_err(|(key, message)| self.error_at(key, message))?;
        }
        if let Some(cleanse) = &self.cleanse {
            self.validate_cleanse(cleanse)?;
        }
        Ok(())
    }

    fn validate_cleanse(&self, cleanse: &Cleanse) -> Result<()> {
        let mut names = vec!["keep", "dedupe"];
        for (index, name) in cleanse
            .reject
            .iter()
            .map(|rule| &rule.name)
            .chain(cleanse.exists_in.iter().map(|rule| &rule.name))
            .enumerate()
        {
            let list = if index < cleanse.reject.len() { "reject" } else { "exists_in" };
            if name.is_empty() || names.contains(&name.as_str()) {
                return Err(self.error_at(
                    &format!("cleanse.{list}"),
                    format!("the rule name `{name}` is empty, reserved or used twice"),
                ));
            }
            names.push(name);
        }
        Ok(())
    }
}

fn read_source(named: Option<&Path>) -> Result<Source> {
    match named {
        Some(path) => Source::read(path),
        None if Path::new(DEFAULT_FILE).exists() => Source::read(Path::new(DEFAULT_FILE)),
        None => Ok(Source::from_text("(no config file)", "")),
    }
}

fn apply_api_url(file: &mut File, url: Option<&str>) {
    let Some(url) = url else { return };
    match &mut file.key_api {
        Some(api) => url.clone_into(&mut api.url),
        None => file.key_api = Some(KeyApi::for_url(url)),
    }
}

/// A batch has its keys in the body, so that a method which was not chosen is POST.
fn default_to_post(file: &mut File, source: &Source) {
    if let Some(api) = &mut file.key_api
        && api.batch.is_some()
        && !source.names("key_api.method")
    {
        api.method = Method::Post;
    }
}

fn resolve_targets(source: &Source, file: &File, options: &TargetOptions) -> Result<Vec<Target>> {
    if let Some(target) = target_from_options(options)? {
        return Ok(vec![target]);
    }
    let mut targets: Vec<Target> = Vec::new();
    for (index, configured) in file.backfill.targets.iter().enumerate() {
        let at = |key: &str| format!("backfill.targets.{index}.{key}");
        let target = Target {
            name: configured.name.clone().unwrap_or_else(|| default_name(&configured.collection)),
            namespace: configured.collection.clone(),
            legacy_field: configured.legacy_field.clone(),
            key_field: configured.key_field.clone(),
            flag_field: configured.flag_field.clone(),
            filter: configured.filter.clone(),
        };
        check_target(&target).map_err(|(key, message)| source.error_at(&at(key), message))?;
        if targets.iter().any(|earlier| earlier.name == target.name) {
            return Err(source.error_at(&at("name"), format!("two targets are named `{}`", target.name)));
        }
        targets.push(target);
    }
    Ok(targets)
}

/// A target given by options replaces those of the file. Key and flag fields
/// have the names of the example config as defaults.
fn target_from_options(options: &TargetOptions) -> Result<Option<Target>> {
    let given = options.legacy_field.is_some() || options.key_field.is_some() || options.flag_field.is_some();
    let Some(namespace) = options.collection.clone() else {
        return if given {
            Err(Error::usage("--legacy-field, --key-field and --flag-field need --collection"))
        } else {
            Ok(None)
        };
    };
    let field = |given: &Option<FieldPath>, default: &str| {
        given.clone().map_or_else(|| default.parse().map_err(Error::usage), Ok)
    };
    let target = Target {
        name: default_name(&namespace),
        namespace,
        legacy_field: field(&options.legacy_field, "legacyKey")?,
        key_field: field(&options.key_field, "newKey")?,
        flag_field: field(&options.flag_field, "newKeyFlag")?,
        filter: ExtendedJson::default(),
    };
    check_target(&target)
        .map_err(|(key, message)| Error::usage(format!("--{}: {message}", key.replace('_', "-"))))?;
    Ok(Some(target))
}

fn default_name(namespace: &Namespace) -> String {
    namespace.collection.replace('.', "_")
}

/// What is wrong with a target: the key to change and why.
fn check_target(target: &Target) -> std::result::Result<(), (&'static str, String)> {
    let plain = |character: char| character.is_ascii_alphanumeric() || "_-".contains(character);
    if target.name.is_empty() || !target.name.chars().all(plain) {
        return Err(("name", format!("`{}` must consist of letters, digits, `_` and `-`", target.name)));
    }
    for (first, second, key) in [
        (&target.key_field, &target.legacy_field, "key_field"),
        (&target.flag_field, &target.legacy_field, "flag_field"),
        (&target.flag_field, &target.key_field, "flag_field"),
    ] {
        if first.overlaps(second) {
            return Err((key, format!("`{first}` and `{second}` lie one within the other")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Result<Settings> {
        let directory = std::env::temp_dir().join(format!("mongorekey-config-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a temporary folder");
        let path = directory.join(format!("{}.toml", text.len()));
        std::fs::write(&path, text).expect("a writable folder");
        let settings = Settings::load(&Overrides {
            config: Some(path.clone()),
            uri: Some(Secret::new("mongodb://localhost")),
            ..Overrides::default()
        });
        std::fs::remove_file(path).expect("just written");
        settings
    }

    fn refusal(text: &str) -> String {
        settings(text).expect_err("must be refused").message().to_owned()
    }

    const TARGET: &str = "[[backfill.targets]]\ncollection = \"app.users\"\nlegacy_field = \"a\"\n";

    fn batch(url: &str, line: &str, size: usize) -> String {
        format!(
            "[key_api]\nurl = \"{url}\"\necho_pointer = \"/legacyKey\"\n{line}\
             [key_api.batch]\nsize = {size}\nbody = '{{keys_json}}'\nitems_pointer = \"/items\"\n"
        )
    }

    #[test]
    fn a_batch_is_posted_where_no_method_is_named() {
        let api = settings(&batch("http://h/", "", 10)).expect("valid").key_api.expect("a key API");
        assert_eq!(api.method, Method::Post);
    }

    #[test]
    fn rules_across_keys_name_the_key_to_change() {
        let cases = [
            (format!("{TARGET}key_field = \"a.b\"\nflag_field = \"c\"\n"), "backfill.targets.0.key_field"),
            (format!("{TARGET}key_field = \"b\"\nflag_field = \"b\"\n"), "backfill.targets.0.flag_field"),
            ("[backfill]\nchunk = 0\n".into(), "backfill.chunk"),
            ("[key_api]\nurl = \"http://h/x\"\n".into(), "key_api.url"),
            ("[key_api]\nurl = \"http://u:p@h/{key}\"\n".into(), "key_api.url"),
            ("[key_api]\nurl = \"ftp://h/{key}\"\n".into(), "key_api.url"),
            ("[key_api]\nurl = \"http://h/{key}\"\nbody = \"x\"\n".into(), "key_api.body"),
            ("[key_api]\nurl = \"http://h/\"\nmethod = \"POST\"\n".into(), "key_api.method"),
            (
                "[key_api]\nurl = \"http://h/{key}\"\nclient_key_file = \"k.pem\"\n".into(),
                "key_api.client_key_file",
            ),
            ("[key_api]\nurl = \"http://h/{key}\"\nproxy = \"socks5://p:1\"\n".into(), "key_api.proxy"),
            (batch("http://h/{key}", "", 10), "key_api.url"),
            (batch("http://h/", "method = \"GET\"\n", 10), "key_api.method"),
            (batch("http://h/", "", 0), "key_api.batch.size"),
            (
                "[key_api]\nurl = \"http://h/{key}\"\nnot_found_status = [200]\n".into(),
                "key_api.not_found_status",
            ),
            (
                "[cleanse]\nsource = \"a.b\"\nreject = [{name = \"keep\", when = '{}'}]\n".into(),
                "cleanse.reject",
            ),
            ("[mongodb]\nstate_database = \"a.b\"\n".into(), "mongodb.state_database"),
        ];
        for (text, key) in cases {
            let message = refusal(&text);
            assert!(message.contains(&format!("`{key}`")), "{message}");
        }
    }

    #[test]
    fn the_password_of_a_url_is_not_repeated() {
        for text in [
            "url = \"http://user:hunter2@h/{key}\"\n",
            "url = \"http://h/{key}\"\nproxy = \"user:hunter2@p:3128\"\n",
            "url = \"http://h/{key}\"\nproxy = \"http://user:hunter2@p:port\"\n",
        ] {
            let message = refusal(&format!("[key_api]\n{text}"));
            assert!(!message.contains("hunter2"), "{message}");
        }
    }

    #[test]
    fn options_replace_the_targets_of_the_file() {
        let options = TargetOptions { collection: "app.members".parse().ok(), ..TargetOptions::default() };
        let target = target_from_options(&options).expect("valid").expect("given");
        assert_eq!((target.name.as_str(), target.key_field.as_str()), ("members", "newKey"));
        let lonely = TargetOptions { key_field: "k".parse().ok(), ..TargetOptions::default() };
        assert!(target_from_options(&lonely).is_err());
    }
}
