use super::*;
use crate::key_map::Remembered;

fn rules() -> Rules {
    Rules { key_pattern: Some("^N".parse().expect("a pattern")), ..Rules::default() }
}

fn rows(text: impl AsRef<[u8]>, format: Format, rules: Rules) -> Vec<(u64, Result<Record, &'static str>)> {
    let input = std::io::Cursor::new(text.as_ref().to_vec());
    read(input, format, rules)
        .expect("a good header")
        .map(|row| row.expect("readable"))
        .map(|row| (row.line, row.record.map_err(|problem| problem.reason)))
        .collect()
}

fn found(line: u64, legacy: &str, new: &str) -> (u64, Result<Record, &'static str>) {
    (line, Ok(Record { legacy_key: legacy.into(), answer: Answer::Found(new.into()) }))
}

fn refused(text: &str, rules: Rules) -> String {
    let rows = read(std::io::Cursor::new(text.as_bytes().to_vec()), Format::Csv, rules);
    rows.err().expect("must be refused").message().to_owned()
}

#[test]
fn lines_are_counted_whatever_ends_them() {
    for end in ["\n", "\r\n"] {
        let text = ["legacyKey,newKey", "K1,N1", "", "", "\"K\n2\",\"N,2\"", "K3,\"N\"\"3\"", "K4"].join(end);
        let rows = rows(&text, Format::Csv, Rules::default());
        let wanted =
            [found(2, "K1", "N1"), found(5, "K\n2", "N,2"), found(7, "K3", "N\"3"), (8, Err("fields"))];
        assert_eq!(rows, wanted, "{end:?}");
    }
}

#[test]
fn columns_are_found_by_their_names() {
    let own =
        Rules { legacy_column: Some("old id".into()), key_column: Some("key".into()), ..Rules::default() };
    let text = "\u{feff}x,key,old id\n,N1,K1\n";
    assert_eq!(rows(text, Format::Csv, own.clone()), [found(2, "K1", "N1")]);
    assert_eq!(rows("new_key,legacy_key\nN1,K1", Format::Csv, rules()), [found(2, "K1", "N1")]);
    assert!(refused("a,b\n", rules()).contains("a, b"));
    assert!(refused("legacyKey,legacy_key,newKey\n", rules()).contains("two columns"));
    assert!(refused("legacyKey,b\n", rules()).contains("new key"));
    assert!(refused("", rules()).contains("empty"));
    assert!(refused("legacyKey,newKey\n", own).contains("legacy key"));
}

#[test]
fn bad_rows_are_told_and_the_others_read() {
    let text: Vec<u8> = [
        &b"legacyKey,newKey,outcome\n"[..],
        b"K1,N1,found\n",
        b",N2,\n",
        b"K3,,\n",
        b"K4,X4,\n",
        b"K5,N\xff,\n",
        b"K6,,not_found\n",
        b"K7,N7,not_found\n",
        b"K8,,gone\n",
        b"K9,  ,\n",
        b"K10,,rejected\n",
        b"K11,N1,found,more\n",
        b"K12,\"N1\nK13,\"N2,\n",
    ]
    .concat();
    let negative = |line, key: &str, answer| (line, Ok(Record { legacy_key: key.into(), answer }));
    assert_eq!(
        rows(text, Format::Csv, rules()),
        [
            found(2, "K1", "N1"),
            (3, Err("legacy_key")),
            (4, Err("new_key")),
            (5, Err("key_pattern")),
            (6, Err("encoding")),
            negative(7, "K6", Answer::NotFound),
            (8, Err("outcome")),
            (9, Err("outcome")),
            (10, Err("new_key")),
            negative(11, "K10", Answer::Rejected),
            (12, Err("fields")),
            (13, Err("new_key")),
        ]
    );
}

#[test]
fn a_quote_that_is_not_closed_swallows_nothing_silently() {
    let text = "newKey,legacyKey\nN1,K1\nN2,\"K2\nN3,K3\n";
    assert_eq!(rows(text, Format::Csv, rules()), [found(2, "K1", "N1"), (3, Err("quote"))]);
    let long = format!("newKey,legacyKey\nN1,\"{}", "K\n".repeat(2 << 20));
    let rows = rows(long, Format::Csv, rules());
    assert_eq!((rows.len(), &rows[0].1), (1, &Err("too_long")));
}

#[test]
fn json_keys_have_the_text_that_documents_have() {
    let text = [
        r#"{"legacyKey":"K1","newKey":"N1"}"#,
        r#"{"legacy_key":42,"new_key":"N2"}"#,
        r#"{"legacyKey":42.0,"newKey":"N3"}"#,
        "  ",
        r#"{"legacyKey":1.5,"newKey":"N4"}"#,
        r#"{"legacyKey":{"$oid":"507f1f77bcf86cd799439011"},"newKey":"N5"}"#,
        r#"{"legacyKey":9007199254740993,"newKey":"N6"}"#,
        r#"{"legacyKey":null,"newKey":"N7"}"#,
        r#"{"legacyKey":"K8","newKey":8}"#,
        r#"{"legacyKey":"K9","newKey":null,"outcome":"not_found"}"#,
        r#"{"legacyKey":"K10","newKey":"N"#,
        r#"{"legacyKey":"K11","outcome":"not_found","held":true}"#,
        r#"{"legacyKey":"K12","newKey":"N12"}"#,
    ]
    .join("\r\n");
    let text = format!("\u{feff}{text}");
    let mut rows = rows(text, Format::Jsonl, rules()).into_iter();
    let mut next = || rows.next().expect("a row");
    assert_eq!(next(), found(1, "K1", "N1"));
    assert_eq!(next(), found(2, "42", "N2"));
    assert_eq!(next(), found(3, "42", "N3"));
    assert_eq!(next(), (5, Err("legacy_key")));
    assert_eq!(next(), found(6, "507f1f77bcf86cd799439011", "N5"));
    assert_eq!(next(), found(7, "9007199254740993", "N6"));
    assert_eq!(next(), (8, Err("legacy_key")));
    assert_eq!(next(), (9, Err("new_key")));
    assert!(next().1.is_ok());
    assert_eq!(next(), (11, Err("json")));
    assert_eq!(next(), (12, Err("held")));
    assert_eq!(next(), found(13, "K12", "N12"));
}

#[test]
fn a_line_without_end_is_passed_over() {
    let text =
        format!("{{\"legacyKey\":\"{}\"}}\n{}\n", "x".repeat(3 << 20), r#"{"legacyKey":"K","newKey":"N"}"#);
    assert_eq!(rows(text, Format::Jsonl, rules()), [(1, Err("too_long")), found(2, "K", "N")]);
}

#[test]
fn what_is_written_is_read_again() {
    let answers = [
        ("a,b", Answer::Found("N\"1".into())),
        ("line\nbreak\r", Answer::Found("N,2".into())),
        (" ", Answer::NotFound),
        ("홍길동", Answer::Rejected),
    ];
    for format in [Format::Csv, Format::Jsonl] {
        let mut writer = Writer::new(Vec::new(), format, false).expect("written");
        for (key, answer) in &answers {
            let known = Remembered { answer: answer.clone(), held: false };
            writer.write(key, &known, false).expect("written");
        }
        let text = writer.finish().expect("written");
        let read: Vec<_> = rows(text, format, rules()).into_iter().map(|row| row.1.expect("good")).collect();
        let wanted: Vec<_> = answers
            .iter()
            .map(|(key, answer)| Record { legacy_key: (*key).into(), answer: answer.clone() })
            .collect();
        assert_eq!(read, wanted, "{format:?}");
    }
}
