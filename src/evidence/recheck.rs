//! `report --check FILE.json`: whether a report is still what was written.

use std::path::Path;

use serde_json::{Value, json};

use super::files::Files;
use super::{KIND, canonical, page};
use crate::error::{Error, Result};
use crate::report::outcome::Outcome;

/// Looks whether the document bears its own hash, and whether the page beside it is
/// the one that this version makes of it.
///
/// # Errors
/// A usage error for a file that can't be read or is no report.
pub fn recheck(path: &Path) -> Result<Outcome> {
    let files = Files::named(path)?;
    let document: Value = std::fs::read_to_string(&files.json)
        .map_err(|error| error.to_string())
        .and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()))
        .map_err(|error| Error::usage(format!("{} can't be read: {error}", files.json.display())))?;
    if document["kind"] != json!(KIND) {
        return Err(Error::usage(format!("{} is no evidence report", files.json.display())));
    }
    let (told, found) = canonical::hashes(&document);
    let is_unchanged = told == Some(found.as_str());
    let page_is_of_it = std::fs::read_to_string(&files.html)
        .ok()
        .map(|text| text.trim_end() == page::of(&document).trim_end());
    let json = json!({
        "schema": 1,
        "command": "report",
        "unchanged": is_unchanged,
        "page_unchanged": page_is_of_it,
        "sha256": {"told": told, "found": found},
    });
    let mut lines = vec![if is_unchanged {
        format!("ok     {}: sha256 {found}", files.json.display())
    } else {
        format!("FAIL   {} was CHANGED: it tells {told:?} and has {found}", files.json.display())
    }];
    lines.push(match page_is_of_it {
        Some(true) => format!("ok     {}: the page of this document", files.html.display()),
        Some(false) => {
            format!("FAIL   {}: not the page that this version makes of the document", files.html.display())
        }
        None => format!("       {} is not there", files.html.display()),
    });
    lines.push(
        "compare the hash with the one on the signed paper: who changes a report can seal it anew".into(),
    );
    let text = lines.join("\n");
    Ok(if is_unchanged && page_is_of_it != Some(false) {
        Outcome::reached(json, text)
    } else {
        Outcome::not_reached(json, text)
    })
}
