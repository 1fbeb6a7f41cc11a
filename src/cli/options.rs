//! The options of a command as they hold, defaults among them, for a report.

use std::ffi::OsString;

use clap::CommandFactory as _;
use clap::parser::ValueSource;
use serde_json::{Value, json};

use super::Cli;

/// Options whose values may hold a secret.
const SECRET: [&str; 2] = ["uri", "api_url"];

/// Those of the command that this process runs.
pub fn of_this_process() -> Vec<Value> {
    of(std::env::args_os())
}

fn of(arguments: impl Iterator<Item = OsString>) -> Vec<Value> {
    let command = Cli::command();
    let Ok(matches) = command.clone().try_get_matches_from(arguments) else { return Vec::new() };
    let Some((name, matches)) = matches.subcommand() else { return Vec::new() };
    let Some(command) = command.find_subcommand(name) else { return Vec::new() };
    let arguments = command.get_arguments().filter(|argument| !SECRET.contains(&argument.get_id().as_str()));
    arguments
        .filter_map(|argument| {
            let id = argument.get_id().as_str();
            let values = matches.try_get_raw(id).ok().flatten()?;
            let values: Vec<String> = values.map(|value| value.to_string_lossy().into_owned()).collect();
            let is_default = matches.value_source(id) == Some(ValueSource::DefaultValue);
            // A switch that is off says nothing.
            let is_off = is_default && values == ["false"];
            let name = argument.get_long().map_or_else(|| id.to_owned(), |long| format!("--{long}"));
            (!is_off).then(|| json!({"name": name, "value": values.join(", "), "is_default": is_default}))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_told_and_secrets_are_not() {
        let line = "mongorekey verify --full --uri mongodb://u:hunter2@h/ --api-url http://h/{key}?t=hunter3";
        let options = of(line.split(' ').map(OsString::from));
        let value = |name: &str| options.iter().find(|option| option["name"] == json!(name));
        assert_eq!(value("--full").expect("given")["is_default"], json!(false));
        assert_eq!(value("--settle").expect("a default")["value"], json!("10s"));
        assert_eq!(value("--counts"), None);
        assert!(!format!("{options:?}").contains("hunter"), "{options:?}");
    }
}
