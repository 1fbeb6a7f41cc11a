//! The text of a config file, put together line by line.

/// A config file.
#[derive(Clone)]
pub struct Config {
    mongodb: Vec<String>,
    key_api: Vec<String>,
    backfill: Vec<String>,
    targets: Vec<String>,
    batch: Option<usize>,
}

impl Config {
    /// Few attempts, so that a key that fails does so within a second; everything else as by default.
    pub fn new(uri: &str, state_database: &str, url: &str) -> Self {
        Self {
            mongodb: vec![format!("uri = '{uri}'"), format!("state_database = '{state_database}'")],
            key_api: vec![format!("url = '{url}'")],
            backfill: Vec::new(),
            targets: Vec::new(),
            batch: None,
        }
    }

    /// Another URI.
    pub fn uri(mut self, uri: &str) -> Self {
        self.mongodb[0] = format!("uri = '{uri}'");
        self
    }

    /// A line of `[key_api]`.
    pub fn key_api(mut self, line: &str) -> Self {
        self.key_api.push(line.to_owned());
        self
    }

    /// A line of `[backfill]`.
    pub fn backfill(mut self, line: &str) -> Self {
        self.backfill.push(line.to_owned());
        self
    }

    /// Asks for so many keys at once; each answer must repeat its key.
    pub fn batch(mut self, size: usize) -> Self {
        self.batch = Some(size);
        self.key_api("echo_pointer = '/legacyKey'")
            .key_api("not_found_when = [{ pointer = '/code', equals = 'NO_KEY' }]")
    }

    /// One more target: its name, its collection and the paths of legacy, key and flag field.
    pub fn target(mut self, name: &str, collection: &str, [legacy, key, flag]: [&str; 3]) -> Self {
        self.targets.push(format!(
            "[[backfill.targets]]\nname = '{name}'\ncollection = '{collection}'\n\
             legacy_field = '{legacy}'\nkey_field = '{key}'\nflag_field = '{flag}'\n"
        ));
        self
    }

    /// Forgets the targets so far.
    pub fn no_targets(mut self) -> Self {
        self.targets.clear();
        self
    }

    /// A further line of the last target.
    pub fn target_line(mut self, line: &str) -> Self {
        let target = self.targets.last_mut().expect("a target");
        target.push_str(line);
        target.push('\n');
        self
    }

    pub fn text(&self) -> String {
        let batch = self.batch.map_or(String::new(), |size| {
            format!(
                "[key_api.batch]\nsize = {size}\nbody = '{{\"keys\": {{keys_json}}}}'\n\
                 items_pointer = '/items'\n"
            )
        });
        format!(
            "[mongodb]\n{}\n\n[key_api]\n{}\n\n{batch}\n[backfill]\n{}\n\n{}",
            self.mongodb.join("\n"),
            self.key_api.join("\n"),
            self.backfill.join("\n"),
            self.targets.join("\n")
        )
    }
}
