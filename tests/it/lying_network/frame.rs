//! Messages of the MongoDB wire protocol, as far as a network has to know them to lie about them.
//!
//! The client of the program has no compressors, so that every command is an `OP_MSG` in plain BSON;
//! the first greeting of a connection may be an `OP_QUERY`, which is passed on unread.

use std::io;

use bson::Document;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The operation code of a message in sections.
const OP_MSG: i32 = 2013;
const HEADER: usize = 16;
/// Nothing larger is a message: a document of 16 MiB and what is around it, several times.
const LARGEST: usize = 100 << 20;

/// One message with its header.
#[derive(Debug, Clone)]
pub struct Frame {
    bytes: Vec<u8>,
}

/// What a client asks for.
#[derive(Debug, Clone)]
pub struct Command {
    /// The first field of the body.
    pub name: String,
    /// The body, with the documents of its sequences as arrays.
    pub body: Document,
}

impl Frame {
    /// Reads the next message; `None` where the other side has closed the connection.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let mut length = [0; 4];
        match from.read_exact(&mut length).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        };
        let size = usize::try_from(i32::from_le_bytes(length)).unwrap_or(0);
        if !(HEADER..=LARGEST).contains(&size) {
            return Err(io::Error::other(format!("{size} bytes are no message")));
        }
        let mut bytes = vec![0; size];
        bytes[..4].copy_from_slice(&length);
        from.read_exact(&mut bytes[4..]).await?;
        Ok(Some(Self { bytes }))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The number that its sender gave it.
    pub fn id(&self) -> i32 {
        self.number(4)
    }

    /// The number of the message that it answers.
    pub fn answers(&self) -> i32 {
        self.number(8)
    }

    /// The command or the answer in it; `None` where it is no `OP_MSG`.
    pub fn command(&self) -> Option<Command> {
        if self.number(12) != OP_MSG {
            return None;
        }
        let has_checksum = self.number(HEADER) & 1 == 1;
        let end = self.bytes.len() - if has_checksum { 4 } else { 0 };
        let (mut body, mut sequences) = (Document::new(), Document::new());
        let mut rest = self.bytes.get(HEADER + 4..end)?;
        while let [kind, section @ ..] = rest {
            let size = size_of_next(section)?;
            let content = section.get(..size)?;
            match kind {
                0 => body = Document::from_reader(content).ok()?,
                1 => add_sequence(&mut sequences, content.get(4..)?)?,
                _ => return None,
            }
            rest = section.get(size..)?;
        }
        body.extend(sequences);
        let name = body.keys().next()?.clone();
        Some(Command { name, body })
    }

    fn number(&self, at: usize) -> i32 {
        let bytes = self.bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, i32::from_le_bytes)
    }
}

/// Sections of both kinds and documents begin with their size.
fn size_of_next(bytes: &[u8]) -> Option<usize> {
    let size = i32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
    usize::try_from(size).ok().filter(|size| *size >= 5)
}

/// A name, which ends with a zero, and documents.
fn add_sequence(sequences: &mut Document, bytes: &[u8]) -> Option<()> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    let name = std::str::from_utf8(&bytes[..end]).ok()?;
    let (mut documents, mut rest) = (Vec::new(), &bytes[end + 1..]);
    while !rest.is_empty() {
        let size = size_of_next(rest)?;
        documents.push(Document::from_reader(rest.get(..size)?).ok()?);
        rest = &rest[size..];
    }
    sequences.insert(name, documents);
    Some(())
}

impl Command {
    /// The collection that it is about, where it is about one.
    pub fn collection(&self) -> &str {
        self.body.get_str(&self.name).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;

    fn message(code: i32, flags: u32, sections: &[u8]) -> Vec<u8> {
        let size = i32::try_from(HEADER + 4 + sections.len()).expect("small");
        let mut bytes = Vec::new();
        for number in [size, 7, 5, code] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(flags.to_le_bytes());
        bytes.extend(sections);
        bytes
    }

    fn body(document: &Document) -> Vec<u8> {
        [vec![0], document.to_vec().expect("valid BSON")].concat()
    }

    fn sequence(name: &str, documents: &[Document]) -> Vec<u8> {
        let mut content = [name.as_bytes(), &[0]].concat();
        content.extend(documents.iter().flat_map(|document| document.to_vec().expect("valid BSON")));
        let size = i32::try_from(content.len() + 4).expect("small");
        [vec![1], size.to_le_bytes().to_vec(), content].concat()
    }

    async fn read(bytes: &[u8]) -> io::Result<Option<Frame>> {
        Frame::read(&mut &*bytes).await
    }

    #[tokio::test]
    async fn a_lying_network_reads_bodies_and_sequences() {
        let update = [doc! {"q": {"_id": 1}, "u": {"$set": {"a": 1}}}, doc! {"q": {}, "u": {}}];
        let sections = [sequence("updates", &update), body(&doc! {"update": "docs", "$db": "app"})].concat();
        for (flags, checksum) in [(0, vec![]), (1, vec![1, 2, 3, 4])] {
            let bytes = message(OP_MSG, flags, &[sections.clone(), checksum].concat());
            let frame = read(&bytes).await.expect("a message").expect("one");
            assert_eq!((frame.id(), frame.answers(), frame.bytes()), (7, 5, bytes.as_slice()));
            let command = frame.command().expect("a command");
            assert_eq!((command.name.as_str(), command.collection()), ("update", "docs"));
            assert_eq!(command.body.get_array("updates").expect("a sequence").len(), 2);
        }
    }

    #[tokio::test]
    async fn a_lying_network_passes_on_what_it_can_not_read() {
        let hello = message(2004, 0, &body(&doc! {"hello": 1}));
        assert!(read(&hello).await.expect("a message").expect("one").command().is_none());
        let cut_off = message(OP_MSG, 0, &[0, 200, 0, 0, 0, 0]);
        assert!(read(&cut_off).await.expect("a message").expect("one").command().is_none());
        assert!(read(&[]).await.expect("an end").is_none());
        assert!(read(&[1, 0, 0, 0]).await.is_err());
        assert!(read(&hello[..20]).await.is_err());
    }

    #[tokio::test]
    async fn a_lying_network_reads_one_message_after_the_other() {
        let both = [message(OP_MSG, 0, &body(&doc! {"a": 1})), message(OP_MSG, 0, &body(&doc! {"b": 1}))];
        let both = both.concat();
        let mut from = both.as_slice();
        for name in ["a", "b"] {
            let frame = Frame::read(&mut from).await.expect("a message").expect("one");
            assert_eq!(frame.command().expect("a command").name, name);
        }
    }
}
