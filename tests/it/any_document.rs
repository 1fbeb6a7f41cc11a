//! Documents as MongoDB can hold them and drivers rarely write them, encoded by hand: fields that stand
//! twice, names that are empty, numbers, dotted or hold a dollar, every type, text and names that are not
//! UTF-8, `_id`s that are equal across types, and great depth.

use std::sync::atomic::{AtomicI32, Ordering};

use bson::{Document, RawDocumentBuf, doc};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::Random;

/// The deepest nesting of a drawn document; the server takes 180 and some more.
const DEEPEST: usize = 170;
/// Bytes per insert command.
const MOST_BYTES: usize = 16_000_000;

/// Raw BSON of whole documents, each with an `_id` of its own, drawn by a seed.
pub fn documents(seed: u64, count: usize) -> Vec<Vec<u8>> {
    let mut random = Random::seeded(seed);
    (0..count).map(|number| document(&mut random, number, &[])).collect()
}

/// One document with an `_id` of that number, after it the elements that are given, and drawn fields
/// before, between and behind.
pub fn document(random: &mut Random, number: usize, given: &[Vec<u8>]) -> Vec<u8> {
    let mut elements = vec![id(random, number)];
    elements.extend(drawn_fields(random, 3));
    for element in given {
        elements.push(element.clone());
        elements.extend(drawn_fields(random, 2));
    }
    if random.below(40) == 0 {
        elements.push(deep(random.below(DEEPEST)));
    }
    if random.below(60) == 0 {
        elements.push(string(b"large", &vec![b'x'; 1_000_000 + random.below(1_000_000)]));
    }
    enclose(&elements.concat())
}

/// A document of these elements.
pub fn enclose(elements: &[u8]) -> Vec<u8> {
    let length = i32::try_from(elements.len() + 5).expect("a length");
    [&length.to_le_bytes()[..], elements, &[0]].concat()
}

/// An element: its type, its name, its value's bytes.
pub fn element(kind: u8, name: &[u8], value: &[u8]) -> Vec<u8> {
    [&[kind][..], name, &[0], value].concat()
}

/// An element that is a string, of whatever bytes.
pub fn string(name: &[u8], text: &[u8]) -> Vec<u8> {
    element(0x02, name, &text_bytes(text))
}

/// An element that is null.
pub fn null(name: &[u8]) -> Vec<u8> {
    element(0x0A, name, &[])
}

fn text_bytes(text: &[u8]) -> Vec<u8> {
    let length = i32::try_from(text.len() + 1).expect("a length");
    [&length.to_le_bytes()[..], text, &[0]].concat()
}

/// The `_id`s of two numbers are never equal, also not to a server that takes 1 for 1.0 and, under a
/// collation, "a" for "A".
fn id(random: &mut Random, number: usize) -> Vec<u8> {
    let whole = i32::try_from(number).expect("a small number");
    match random.below(8) {
        0 => element(0x10, b"_id", &whole.to_le_bytes()),
        1 => element(0x12, b"_id", &i64::from(whole).to_le_bytes()),
        2 => element(0x01, b"_id", &f64::from(whole).to_le_bytes()),
        3 => string(b"_id", format!("Id-{number}").as_bytes()),
        4 => string(b"_id", &[format!("id-{number}-").as_bytes(), &[0xC3, 0x28]].concat()),
        5 => element(0x03, b"_id", &enclose(&element(0x10, b"a", &whole.to_le_bytes()))),
        6 => {
            let twice = [element(0x10, b"a", &whole.to_le_bytes()), string(b"a", b"twice")].concat();
            element(0x03, b"_id", &enclose(&twice))
        }
        _ => element(0x07, b"_id", &[&whole.to_be_bytes()[..], &[7; 8]].concat()),
    }
}

fn drawn_fields(random: &mut Random, most: usize) -> Vec<Vec<u8>> {
    let mut fields = Vec::new();
    for _ in 0..random.below(most + 1) {
        let name = name(random);
        fields.push(value(random, &name, 3));
        if random.below(4) == 0 {
            fields.push(value(random, &name, 2));
        }
    }
    fields
}

fn name(random: &mut Random) -> Vec<u8> {
    let names: [&[u8]; 16] = [
        b"x",
        b"x",
        b"y",
        b"7",
        b"0",
        b"10",
        b"",
        b"a.b",
        b".",
        b"$a",
        b"$set",
        b"$",
        b"\xC3\x28",
        b"\xFF",
        "\u{e4}".as_bytes(),
        b"__proto__",
    ];
    names[random.below(names.len())].to_vec()
}

fn value(random: &mut Random, name: &[u8], depth: usize) -> Vec<u8> {
    let number = random.next();
    match random.below(if depth == 0 { 19 } else { 24 }) {
        0 => element(0x01, name, &number.to_le_bytes()),
        1 => element(0x01, name, &f64::NAN.to_le_bytes()),
        2 => element(0x01, name, &(-0.0_f64).to_le_bytes()),
        3 => string(name, b"text"),
        4 => string(name, b"not \xFF\xFE UTF-8"),
        5 => string(name, b"with \0 zero"),
        6 => element(0x05, name, &[3, 0, 0, 0, 0x80, 1, 2, 3]),
        7 => element(0x06, name, &[]),
        8 => element(0x07, name, &[9; 12]),
        9 => element(0x08, name, &[1]),
        10 => element(0x09, name, &number.to_le_bytes()),
        11 => null(name),
        12 => element(0x0B, name, b"a+\0i\0"),
        13 => element(0x0C, name, &[text_bytes(b"db.c"), vec![8; 12]].concat()),
        14 => element(if number.is_multiple_of(2) { 0x0D } else { 0x0E }, name, &text_bytes(b"code")),
        15 => element(0x10, name, &number.to_le_bytes()[..4]),
        16 => element(0x11, name, &number.to_le_bytes()),
        17 => element(0x12, name, &number.to_le_bytes()),
        18 => element(if number.is_multiple_of(2) { 0xFF } else { 0x7F }, name, &[]),
        19 => element(0x13, name, &[&number.to_le_bytes()[..], &[0, 0, 0, 0, 0, 0, 0x40, 0x30]].concat()),
        20 => {
            let scope = enclose(&element(0x10, b"s", &[1, 0, 0, 0]));
            let inner = [text_bytes(b"code"), scope].concat();
            let length = i32::try_from(inner.len() + 4).expect("a length");
            element(0x0F, name, &[&length.to_le_bytes()[..], &inner].concat())
        }
        21 => array(random, name, depth),
        _ => {
            let inner = (0..random.below(4)).flat_map(|_| {
                let name = self::name(random);
                let first = value(random, &name, depth - 1);
                let second = if random.below(3) == 0 { value(random, &name, depth - 1) } else { Vec::new() };
                [first, second].concat()
            });
            let inner: Vec<u8> = inner.collect();
            element(0x03, name, &enclose(&inner))
        }
    }
}

fn array(random: &mut Random, name: &[u8], depth: usize) -> Vec<u8> {
    let count = random.below(4);
    let items = (0..count).flat_map(|index| value(random, index.to_string().as_bytes(), depth - 1));
    let items: Vec<u8> = items.collect();
    element(0x04, name, &enclose(&items))
}

/// A field with that many documents within each other.
pub fn deep(depth: usize) -> Vec<u8> {
    let innermost = element(0x10, b"d", &[1, 0, 0, 0]);
    (0..depth).fold(innermost, |inner, _| element(0x03, b"d", &enclose(&inner)))
}

/// Inserts documents byte for byte through a connection of its own.
pub async fn insert_raw(uri: &str, database: &str, collection: &str, documents: &[Vec<u8>]) {
    let mut connection = connect(uri).await;
    let mut start = 0;
    while start < documents.len() {
        let mut end = start;
        let mut bytes = 0;
        while end < documents.len() && (end == start || bytes + documents[end].len() < MOST_BYTES) {
            bytes += documents[end].len();
            end += 1;
        }
        insert(&mut connection, database, collection, &documents[start..end]).await;
        start = end;
    }
}

/// Connects to the member that takes writes.
async fn connect(uri: &str) -> TcpStream {
    let client = crate::harness::connect(uri).await;
    let hello = client.database("admin").run_command(doc! {"hello": 1}).await.expect("an answer");
    TcpStream::connect(hello.get_str("primary").expect("a primary")).await.expect("a connection")
}

async fn insert(connection: &mut TcpStream, database: &str, collection: &str, documents: &[Vec<u8>]) {
    let concern = enclose(&string(b"w", b"majority"));
    let command = [
        string(b"insert", collection.as_bytes()),
        string(b"$db", database.as_bytes()),
        element(0x08, b"ordered", &[1]),
        element(0x03, b"writeConcern", &concern),
    ];
    let sequence = [&b"documents\0"[..], &documents.concat()].concat();
    let size = i32::try_from(sequence.len() + 4).expect("a size");
    let body =
        [&0_u32.to_le_bytes()[..], &[0], &enclose(&command.concat()), &[1], &size.to_le_bytes(), &sequence]
            .concat();
    let reply = converse(connection, &body).await;
    let errors = reply.get_array("writeErrors").map(Vec::len).unwrap_or_default();
    let count = i32::try_from(documents.len()).expect("a count");
    assert_eq!((reply.get_i32("n").ok(), errors), (Some(count), 0), "{reply}");
}

/// Sends a message of kind `OP_MSG` and reads its answer.
async fn converse(connection: &mut TcpStream, body: &[u8]) -> Document {
    static REQUEST: AtomicI32 = AtomicI32::new(1);
    let request = REQUEST.fetch_add(1, Ordering::Relaxed);
    let length = i32::try_from(body.len() + 16).expect("a length");
    for word in [length, request, 0, 2013] {
        connection.write_all(&word.to_le_bytes()).await.expect("a header");
    }
    connection.write_all(body).await.expect("a message");
    let length = connection.read_i32_le().await.expect("an answer");
    let mut answer = vec![0; usize::try_from(length).expect("a length") - 4];
    connection.read_exact(&mut answer).await.expect("an answer");
    // The rest of the header, flags and the kind of the only section.
    let answer = RawDocumentBuf::from_bytes(answer[17..].to_vec()).expect("a document");
    Document::try_from(&answer).expect("a readable answer")
}
