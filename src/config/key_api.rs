//! Rules across the keys of `[key_api]`. Pure: no file is read here, no name
//! resolved.

use super::file::{Batch, KeyApi, Method};
use super::template;

/// Keys per call, at most: beyond it an answer would take minutes, not seconds.
const LARGEST_BATCH: usize = 10_000;

/// The key to change and why.
type Mistake = (&'static str, String);

/// Whether the parts of `[key_api]` fit together.
///
/// # Errors
/// The dotted key to change and what is wrong with it; never a secret.
pub(super) fn check(api: &KeyApi) -> Result<(), Mistake> {
    template::check_url(&api.url).map_err(|message| ("key_api.url", message))?;
    match &api.batch {
        Some(batch) => check_batch(api, batch)?,
        None => check_single(api)?,
    }
    if api.max_attempts == 0 {
        return Err(mistake("key_api.max_attempts", "must be at least 1"));
    }
    check_not_found(api)?;
    check_connection(api)
}

fn mistake(key: &'static str, message: &str) -> Mistake {
    (key, message.into())
}

fn check_single(api: &KeyApi) -> Result<(), Mistake> {
    let in_url = api.url.contains(template::KEY);
    match (api.method, &api.body) {
        (Method::Get, Some(_)) => Err(mistake("key_api.body", "a GET has no body; set method = \"POST\"")),
        (Method::Get, None) if !in_url => {
            Err(mistake("key_api.url", "must contain {key}, where the legacy key goes"))
        }
        (Method::Post, body)
            if !in_url && body.as_ref().is_none_or(|body| !body.contains(template::KEY_JSON)) =>
        {
            Err(mistake("key_api.method", "a POST needs a body with {key_json}, or {key} in the url"))
        }
        _ => Ok(()),
    }
}

fn check_batch(api: &KeyApi, batch: &Batch) -> Result<(), Mistake> {
    if api.method == Method::Get {
        return Err(mistake("key_api.method", "a batch is sent by POST"));
    }
    if api.url.contains(template::KEY) {
        let message = "must not contain {key}: the keys of a batch go into the body of key_api.batch";
        return Err(mistake("key_api.url", message));
    }
    if api.body.is_some() {
        return Err(mistake("key_api.body", "is not sent: a batch has a body of its own in key_api.batch"));
    }
    if api.echo_pointer.is_none() {
        let message = "needs key_api.echo_pointer: an item is told by the legacy key that it repeats, \
                       never by its position";
        return Err(mistake("key_api.batch", message));
    }
    if !(1..=LARGEST_BATCH).contains(&batch.size) {
        return Err(("key_api.batch.size", format!("must be from 1 to {LARGEST_BATCH}")));
    }
    if !batch.body.contains(template::KEYS_JSON) {
        return Err(mistake("key_api.batch.body", "must contain {keys_json}, where the legacy keys go"));
    }
    Ok(())
}

fn check_not_found(api: &KeyApi) -> Result<(), Mistake> {
    let key = "key_api.not_found_status";
    let claims_success = |status: &u16| (200..300).contains(status);
    if api.not_found_when.is_empty() && api.not_found_status.iter().any(claims_success) {
        let message =
            "a 2xx status alone can't mean \"not found\": say by not_found_when what the answer looks like";
        return Err(mistake(key, message));
    }
    match api.not_found_status.iter().find(|status| !(100..600).contains(*status)) {
        Some(status) => Err((key, format!("{status} is no HTTP status"))),
        None => Ok(()),
    }
}

fn check_connection(api: &KeyApi) -> Result<(), Mistake> {
    match (&api.client_cert_file, &api.client_key_file) {
        (Some(_), None) => return Err(mistake("key_api.client_cert_file", "needs client_key_file too")),
        (None, Some(_)) => return Err(mistake("key_api.client_key_file", "needs client_cert_file too")),
        _ => {}
    }
    let proxy = api.proxy.as_ref().map_or(Ok(()), |proxy| template::check_proxy(proxy.expose()));
    proxy.map_err(|message| ("key_api.proxy", message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::values::Secret;

    fn batch() -> KeyApi {
        let mut api = KeyApi::for_url("http://h/keys");
        api.method = Method::Post;
        api.echo_pointer = "/legacyKey".parse().ok();
        let items_pointer = "/items".parse().expect("a pointer");
        api.batch = Some(Batch { size: 100, body: "{keys_json}".into(), items_pointer });
        api
    }

    #[track_caller]
    fn refused_key(change: impl Fn(&mut KeyApi)) -> &'static str {
        let mut api = batch();
        assert_eq!(check(&api), Ok(()));
        change(&mut api);
        check(&api).expect_err("must be refused").0
    }

    fn with_batch(api: &mut KeyApi, change: impl Fn(&mut Batch)) {
        change(api.batch.as_mut().expect("a batch"));
    }

    #[test]
    fn a_batch_needs_all_that_makes_it_safe() {
        assert_eq!(refused_key(|api| api.echo_pointer = None), "key_api.batch");
        assert_eq!(refused_key(|api| api.method = Method::Get), "key_api.method");
        assert_eq!(refused_key(|api| api.url = "http://h/{key}".into()), "key_api.url");
        assert_eq!(refused_key(|api| api.body = Some("{key_json}".into())), "key_api.body");
        assert_eq!(
            refused_key(|api| with_batch(api, |batch| batch.body = "{key_json}".into())),
            "key_api.batch.body"
        );
        for size in [0, LARGEST_BATCH + 1] {
            assert_eq!(refused_key(|api| with_batch(api, |batch| batch.size = size)), "key_api.batch.size");
        }
        let mut largest = batch();
        with_batch(&mut largest, |batch| batch.size = LARGEST_BATCH);
        assert_eq!(check(&largest), Ok(()));
    }

    #[test]
    fn a_client_certificate_goes_with_its_key() {
        assert_eq!(refused_key(|api| api.client_cert_file = Some("c".into())), "key_api.client_cert_file");
        assert_eq!(refused_key(|api| api.client_key_file = Some("k".into())), "key_api.client_key_file");
    }

    #[test]
    fn proxies_are_http_and_their_passwords_are_not_repeated() {
        let proxied = |proxy: &str| {
            let mut api = KeyApi::for_url("https://h/{key}");
            api.proxy = Some(Secret::new(proxy));
            check(&api)
        };
        for good in ["http://proxy:3128", "https://user:hunter2@proxy.example.com"] {
            assert_eq!(proxied(good), Ok(()), "{good}");
        }
        for bad in
            ["", "proxy:3128", "socks5://u:hunter2@p", "http://u:hunter2@p:port", "http://p/path?hunter2"]
        {
            let (key, message) = proxied(bad).expect_err(bad);
            assert_eq!(key, "key_api.proxy");
            assert!(!message.contains("hunter2"), "{message}");
        }
    }
}
