//! Small pieces of HTML. Pure.

use serde_json::Value;

/// Text that is shown as it is, whatever it holds. Characters that would turn the
/// direction of the text around, or can't be seen, are shown by their number.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => {
                escaped.push_str(&format!("\\u{{{:x}}}", u32::from(character)));
            }
            '\n' | '\t' => escaped.push(character),
            _ if character.is_control() => {
                escaped.push_str(&format!("\\u{{{:x}}}", u32::from(character)));
            }
            _ => escaped.push(character),
        }
    }
    escaped
}

/// A value as text: texts without quotes, nothing as a dash, anything else as JSON.
pub(in crate::evidence) fn text(value: &Value) -> String {
    match value {
        Value::Null => "–".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) => number.as_u64().map_or_else(|| number.to_string(), grouped),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        other => other.to_string(),
    }
}

/// The same, for a page.
pub(super) fn shown(value: &Value) -> String {
    escape(&text(value))
}

/// A number in groups of three digits: `1,234,567`.
pub(in crate::evidence) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A moment as people read it: `2026-11-24 03:31:11 UTC`.
pub(in crate::evidence) fn moment(value: &Value) -> String {
    let text = text(value);
    match (text.get(..10), text.get(10..11), text.get(11..19)) {
        (Some(date), Some("T"), Some(time)) if text.ends_with('Z') => escape(&format!("{date} {time} UTC")),
        _ => escape(&text),
    }
}

/// A duration as people read it.
pub(super) fn duration(seconds: &Value) -> String {
    match seconds.as_f64() {
        None => "–".into(),
        Some(seconds) if seconds < 60.0 => format!("{seconds:.1} s"),
        Some(seconds) => std::time::Duration::try_from_secs_f64(seconds)
            .map_or_else(|_| "–".into(), crate::report::progress::duration),
    }
}

/// The items of a list; none where there is no list.
pub(super) fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// A section with its heading; `body` is HTML already.
pub(super) fn section(id: &str, title: &str, body: &str) -> String {
    format!("<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{}</h2>\n{body}</section>\n", escape(title))
}

/// A table with a heading row; headings, cells and caption are HTML already. A
/// heading that begins with `#` is one of numbers; one that ends with `@30` takes 30 %
/// of the width, which all of a table tell or none.
pub(super) fn table(caption: &str, headings: &[&str], rows: &[Vec<String>]) -> String {
    let class = |index: usize| {
        let is_number = headings.get(index).is_some_and(|heading| heading.starts_with('#'));
        if is_number { " class=\"number\"" } else { "" }
    };
    let (mut columns, mut head) = (String::new(), String::new());
    for (index, heading) in headings.iter().enumerate() {
        let (name, width) = heading.split_once('@').unwrap_or((heading, ""));
        if !width.is_empty() {
            columns.push_str(&format!("<col style=\"width: {width}%\">"));
        }
        head.push_str(&format!("<th scope=\"col\"{}>{}</th>", class(index), name.trim_start_matches('#')));
    }
    let fixed = if columns.is_empty() { "" } else { " class=\"fixed\"" };
    let body: String = rows
        .iter()
        .map(|row| {
            let cells = row.iter().enumerate();
            let cells: String =
                cells.map(|(index, cell)| format!("<td{}>{cell}</td>", class(index))).collect();
            format!("<tr>{cells}</tr>\n")
        })
        .collect();
    let caption = if caption.is_empty() { String::new() } else { format!("<caption>{caption}</caption>") };
    format!(
        "<div class=\"table\"><table{fixed}>{caption}{columns}<thead><tr>{head}</tr></thead>\n\
         <tbody>\n{body}</tbody></table></div>\n"
    )
}

/// Facts by their names; values are HTML already, those without one are left out.
pub(super) fn facts(facts: &[(&str, String)]) -> String {
    let items: String = facts
        .iter()
        .filter(|(_, value)| !value.is_empty() && value != "–")
        .map(|(name, value)| format!("<div><dt>{}</dt><dd>{value}</dd></div>\n", escape(name)))
        .collect();
    format!("<dl>\n{items}</dl>\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whatever_text_holds_it_stays_text() {
        assert_eq!(escape("<a href='x'>&\"홍길동\""), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;홍길동&quot;");
        assert_eq!(escape("a\u{202e}b\u{0}c\nd"), "a\\u{202e}b\\u{0}c\nd");
    }

    #[test]
    fn values_read_well() {
        assert_eq!(text(&json!(1_234_567)), "1,234,567");
        assert_eq!((grouped(0), grouped(999), grouped(1000)), ("0".into(), "999".into(), "1,000".into()));
        assert_eq!(moment(&json!("2026-11-24T03:31:11.123Z")), "2026-11-24 03:31:11 UTC");
        assert_eq!(
            (moment(&json!("soon")), moment(&json!("2026-11-24T홍길동Z"))),
            ("soon".into(), "2026-11-24T홍길동Z".into())
        );
        assert_eq!((duration(&json!(1.26)), duration(&json!(125))), ("1.3 s".into(), "2 m 5 s".into()));
        assert_eq!(duration(&json!(null)), "–");
    }
}
