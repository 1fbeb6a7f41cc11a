//! The ledger of a cleanse: where every document of the source went. Pure.

use serde_json::Value;

use super::html::{escape, section as section_of, shown, table};

pub(super) fn section(document: &Value) -> Option<String> {
    let ledger = &document["ledger"];
    ledger.is_object().then_some(())?;
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |name: String, value: &Value, class: &str| {
        if !value.is_null() {
            rows.push(vec![name, format!("<span class=\"{class}\">{}</span>", shown(value))]);
        }
    };
    row("Documents of the source when the copy began".into(), &ledger["source_at_start"], "");
    row("+ inserted since".into(), &ledger["inserted_during"], "");
    row("− deleted since".into(), &ledger["deleted_during"], "");
    row("= documents of the source at the moment of the ledger".into(), &ledger["source_now"], "sum");
    row("kept: documents in the target at that moment".into(), &ledger["kept"], "");
    row("rejected".into(), &ledger["rejected"], "");
    for (rule, count) in ledger["rejected_by"].as_object().into_iter().flatten() {
        row(format!("&emsp;of these by the rule <code>{}</code>", escape(rule)), count, "");
    }
    row("in the quarantine".into(), &ledger["quarantined"], "");
    row("changes not yet applied at that moment".into(), &ledger["changes_not_applied"], "");
    let verdict = match ledger["balanced"].as_bool() {
        Some(true) => {
            "<p class=\"note good\">✓ It balances: what the rules keep is what the target holds.</p>\n"
        }
        Some(false) => {
            "<p class=\"note bad\">✗ It does not balance: the target holds something else than what the rules keep.</p>\n"
        }
        None => {
            "<p class=\"note\">Whether it balances was not counted (<code>--count-rules</code> does that), or the source was written to at that moment.</p>\n"
        }
    };
    let body = format!("{}{verdict}", table("", &["Entry", "#Documents"], &rows));
    Some(section_of("ledger", "Ledger", &body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nothing_is_claimed_that_was_not_counted() {
        let of = |balanced: Value| {
            section(
                &json!({"ledger": {"source_now": 1000, "kept": 600, "rejected": 400, "balanced": balanced,
                "source_at_start": null, "rejected_by": {"old": 400}}}),
            )
            .expect("a section")
        };
        assert!(of(json!(true)).contains("It balances") && of(json!(false)).contains("does not balance"));
        let unknown = of(json!(null));
        assert!(unknown.contains("was not counted") && !unknown.contains("when the copy began"), "{unknown}");
        assert!(unknown.contains("<code>old</code>") && unknown.contains("1,000"), "{unknown}");
        assert_eq!(section(&json!({"ledger": null})), None);
    }
}
