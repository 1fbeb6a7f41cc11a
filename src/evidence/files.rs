//! Where a report is written: two files side by side, each complete or not there.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{canonical, page};
use crate::error::{Error, Result};

/// The two files of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The page for people.
    pub html: PathBuf,
    /// The document that it is made of.
    pub json: PathBuf,
}

impl Files {
    /// The files that a name stands for; the extension says nothing but which of
    /// the two was named.
    ///
    /// # Errors
    /// A usage error for another extension.
    pub fn named(path: &Path) -> Result<Self> {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
        if path.file_stem().is_none() || !matches!(extension.as_deref(), Some("html" | "json")) {
            return Err(Error::usage(format!(
                "a report is written to FILE.html and FILE.json, so {} can't be its name",
                path.display()
            ))
            .hint("name it with the extension .html or .json"));
        }
        let with = |wanted: &str| match extension.as_deref() {
            Some(given) if given == wanted => path.to_owned(),
            _ => path.with_extension(wanted),
        };
        Ok(Self { html: with("html"), json: with("json") })
    }

    /// Makes sure that both can be written, before anything else is done.
    ///
    /// # Errors
    /// A usage error where the folder is missing or can't be written to.
    pub fn check(&self) -> Result<()> {
        for path in [&self.html, &self.json] {
            if path.is_dir() {
                return Err(Error::usage(format!("{} is a folder", path.display())));
            }
            let temporary = temporary(path);
            let tried = File::create(&temporary).and_then(|file| {
                drop(file);
                std::fs::remove_file(&temporary)
            });
            tried.map_err(|error| {
                Error::usage(format!("the report {} can't be written: {error}", path.display()))
                    .hint("name a file in a folder that exists and can be written to")
            })?;
        }
        Ok(())
    }

    /// Seals the document and writes it with its page; returns what the result of
    /// the command says about it.
    ///
    /// # Errors
    /// A stop where a file can't be written.
    pub fn write(&self, mut document: Value) -> Result<Value> {
        let hash = canonical::seal(&mut document);
        let page = page::of(&document);
        let text = serde_json::to_string_pretty(&document)
            .map_err(|error| Error::stopped(format!("the report could not be encoded: {error}")))?;
        // The document first: the page points to it.
        write(&self.json, &text)?;
        write(&self.html, &page)?;
        Ok(json!({"html": self.html, "json": self.json, "sha256": hash}))
    }
}

/// Writes a file as a whole: nobody ever sees half of it.
fn write(path: &Path, text: &str) -> Result<()> {
    let temporary = temporary(path);
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    });
    written.map_err(|error| {
        let _gone = std::fs::remove_file(&temporary);
        Error::stopped(format!("the report {} could not be written: {error}", path.display()))
            .hint("make room or name another file, and start the same command again")
    })
}

/// A name beside the file, so that the renaming stays within one file system.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_have_one_name() {
        for named in ["a/b.c.html", "a/b.c.json"] {
            let files = Files::named(Path::new(named)).expect("a name");
            assert_eq!((&*files.html, &*files.json), (Path::new("a/b.c.html"), Path::new("a/b.c.json")));
        }
        let upper = Files::named(Path::new("R.HTML")).expect("a name");
        assert_eq!((&*upper.html, &*upper.json), (Path::new("R.HTML"), Path::new("R.json")));
        for bad in ["report", "report.pdf", "", ".html", "report.html/"] {
            let result = Files::named(Path::new(bad));
            assert!(result.is_err() || bad == "report.html/", "{bad}: {result:?}");
        }
    }

    #[test]
    fn nothing_is_left_where_a_report_can_not_be_written() {
        let folder = std::env::temp_dir().join(format!("mongorekey-files-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("taken.json")).expect("a folder");
        let files = |name: &str| Files::named(&folder.join(name)).expect("a name");
        assert!(files("missing/r.html").check().is_err());
        assert!(files("taken.html").check().is_err());
        files("r.html").check().expect("it can be written");
        let left: Vec<_> = std::fs::read_dir(&folder).expect("a folder").collect();
        assert_eq!(left.len(), 1, "{left:?}");
        let document = json!({"schema": 1});
        files("r.html").write(document).expect("it is written");
        assert!(folder.join("r.html").is_file() && folder.join("r.json").is_file());
        assert_eq!(std::fs::read_dir(&folder).expect("a folder").count(), 3);
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
