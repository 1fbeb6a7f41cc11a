//! A real key migration: 10,000 books whose ISBN-10 lost its leading zeros in a spreadsheet.

use std::path::PathBuf;

use bson::{Document, doc};

use crate::harness::{Bench, DOCS};
use crate::key_api::{Call, KeyApi, Reply};

/// The file is not ours to copy; where it is absent the test says so.
#[expect(clippy::print_stderr, reason = "the only way for a test to say that it was skipped")]
fn books() -> Option<String> {
    let path = std::env::var_os("MONGOREKEY_GOODBOOKS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/data/goodbooks/books.csv"),
        PathBuf::from,
    );
    match std::fs::read_to_string(&path) {
        Ok(text) => Some(text),
        Err(error) => {
            eprintln!("skipped: {} ({error}); MONGOREKEY_GOODBOOKS names the file", path.display());
            None
        }
    }
}

/// The rows of a CSV file with quoted fields.
fn rows(text: &str) -> Vec<Vec<String>> {
    let (mut rows, mut row, mut field, mut quoted) = (Vec::new(), Vec::new(), String::new(), false);
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => row.push(std::mem::take(&mut field)),
            '\n' if !quoted => {
                row.push(std::mem::take(&mut field));
                rows.push(std::mem::take(&mut row));
            }
            '\r' if !quoted => {}
            other => field.push(other),
        }
    }
    if !field.is_empty() {
        row.push(field);
        rows.push(row);
    }
    rows
}

/// What the API does: pad to ten, check the check digit, give the ISBN-13.
fn isbn13(raw: &str) -> Option<String> {
    let padded = format!("{raw:0>10}");
    let value = |(index, character): (usize, char)| match character {
        'X' if index == 9 => Some(10),
        digit => digit.to_digit(10),
    };
    let digits: Vec<u32> = padded.chars().enumerate().map(value).collect::<Option<_>>()?;
    let sum: u32 = digits.iter().zip((1..=10).rev()).map(|(digit, weight)| digit * weight).sum();
    if digits.len() != 10 || !sum.is_multiple_of(11) {
        return None;
    }
    let thirteen: Vec<u32> = [9, 7, 8].into_iter().chain(digits[..9].iter().copied()).collect();
    let sum: u32 =
        thirteen.iter().zip([1, 3].into_iter().cycle()).map(|(digit, weight)| digit * weight).sum();
    let text: String = thirteen.iter().map(u32::to_string).collect();
    Some(format!("{text}{}", (10 - sum % 10) % 10))
}

/// Whether a new key is right, told without repeating how the API made it: a valid ISBN-13 whose
/// nine middle digits are those of the legacy key as a number.
fn is_right(raw: &str, new_key: &str) -> bool {
    let digits: Vec<u64> = new_key.bytes().map(|byte| u64::from(byte) - u64::from(b'0')).collect();
    let sum: u64 =
        digits.iter().enumerate().map(|(index, digit)| if index % 2 == 0 { *digit } else { 3 * digit }).sum();
    let without_check = raw[..raw.len() - 1].parse::<u64>();
    digits.len() == 13
        && new_key.starts_with("978")
        && sum.is_multiple_of(10)
        && new_key[3..12].parse::<u64>() == without_check
}

fn answer(call: &Call) -> Reply {
    isbn13(&call.key).map_or_else(Reply::not_found, |new_key| Reply::key(call, &new_key))
}

#[tokio::test]
async fn ten_thousand_real_books_receive_their_isbn_13() {
    let Some(text) = books() else { return };
    let rows = rows(&text);
    let column = |name: &str| rows[0].iter().position(|other| other == name).expect("the column");
    let (id, isbn, title) = (column("book_id"), column("isbn"), column("title"));
    let documents = rows[1..].iter().map(|row| {
        let id: i32 = row[id].parse().expect("a number");
        doc! {"_id": id, "isbn": &row[isbn], "title": &row[title]}
    });
    let bench = Bench::new().await;
    bench.insert(documents.clone()).await;
    let before: Vec<Document> = documents.collect();
    let api = KeyApi::start(answer);
    let target = [("docs"), &bench.namespace(DOCS)];
    let config = bench
        .config(&api)
        .no_targets()
        .target(target[0], target[1], ["isbn", "isbn13", "flag"])
        .key_api("echo_pointer = '/legacyKey'")
        .key_api("key_pattern = '^978[0-9]{10}$'");
    bench.configure(&config);
    bench.run("index create").await.expect_exit(0);

    let plan = bench.run("plan").await.expect_exit(0);
    assert_eq!(plan.number("/calls"), 9300);

    let run = bench.run("backfill --tps 100000").await.expect_exit(0);
    run.expect_documents(&[("candidates", 10_000), ("filled", 9277), ("flagged", 723)]);
    assert_eq!(
        run.json["documents"]["flagged_by"],
        serde_json::json!({"no_legacy_key": 700, "not_found": 23})
    );
    run.expect_calls(9300);
    assert_eq!(api.count(), 9300);

    let after = bench.documents(DOCS).await;
    assert_eq!(after.len(), before.len());
    let (mut filled, mut unusable, mut not_found) = (0, 0, 0);
    for (mut document, original) in after.into_iter().zip(before) {
        let raw = original.get_str("isbn").expect("a text");
        let new_key = document.remove("isbn13");
        let flag = document.remove("flag");
        assert_eq!(document, original, "nothing else changed");
        let reason = flag.as_ref().and_then(|flag| flag.as_document()?.get_str("reason").ok());
        match (new_key.as_ref().and_then(bson::Bson::as_str), reason) {
            (Some(new_key), None) if is_right(raw, new_key) => filled += 1,
            (None, Some("no_legacy_key")) if raw.is_empty() => unusable += 1,
            (None, Some("not_found")) if isbn13(raw).is_none() => not_found += 1,
            other => panic!("{original}: {other:?}"),
        }
    }
    assert_eq!((filled, unusable, not_found), (9277, 700, 23));

    let again = bench.run("backfill --tps 100000").await.expect_exit(0);
    again.expect_documents(&[]);
    again.expect_calls(0);
    assert_eq!(api.count(), 9300);
}
