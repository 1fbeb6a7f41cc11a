//! A Markdown file, taken apart as a reader's browser does it, with the lines where things stand.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// A line of a file, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub file: String,
    pub line: usize,
}

/// A fenced code block.
#[derive(Debug, Clone)]
pub struct CodeBlock {
    pub language: String,
    pub text: String,
    /// Of its first line of text.
    pub place: Place,
}

/// One file.
pub struct Markdown {
    /// Its path within the repository.
    pub name: String,
    pub links: Vec<(Place, String)>,
    text: String,
    headings: Vec<(Place, HeadingLevel, String)>,
    blocks: Vec<CodeBlock>,
    tables: Vec<Range<usize>>,
    /// Paragraphs and list items, in pieces.
    prose: Vec<(Place, Vec<Piece>)>,
}

/// A piece of a paragraph.
enum Piece {
    Plain(String),
    /// Text of `**…**`.
    Strong(String),
    /// Code, an image or a line break: something that is no plain text.
    Other,
}

impl Markdown {
    pub fn read(file: &Path, root: &Path) -> Self {
        let text = std::fs::read_to_string(file).expect("a readable file");
        Self::parse(&file.strip_prefix(root).expect("a file of the repository").to_string_lossy(), &text)
    }

    pub fn parse(name: &str, text: &str) -> Self {
        let mut document = Self {
            name: name.to_owned(),
            links: Vec::new(),
            text: text.to_owned(),
            headings: Vec::new(),
            blocks: Vec::new(),
            tables: Vec::new(),
            prose: Vec::new(),
        };
        let mut heading: Option<(HeadingLevel, String)> = None;
        let mut block: Option<CodeBlock> = None;
        let mut strong: Option<String> = None;
        for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
            let place = document.place(range.start);
            match event {
                Event::Start(Tag::Heading { level, .. }) => heading = Some((level, String::new())),
                Event::End(TagEnd::Heading(_)) => {
                    let (level, title) = heading.take().expect("it began");
                    document.headings.push((place, level, title));
                }
                Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(language))) => {
                    let place = Place { line: place.line + 1, ..place };
                    block = Some(CodeBlock { language: language.to_string(), text: String::new(), place });
                }
                Event::End(TagEnd::CodeBlock) => document.blocks.extend(block.take()),
                Event::Start(Tag::Table(_)) => document.tables.push(range),
                Event::Start(Tag::Link { dest_url, .. }) => {
                    document.links.push((place, dest_url.to_string()))
                }
                Event::Start(Tag::Paragraph | Tag::Item) => document.prose.push((place, Vec::new())),
                Event::Start(Tag::Strong) => strong = Some(String::new()),
                Event::End(TagEnd::Strong) => {
                    let text = strong.take().expect("it began");
                    document.piece(Piece::Strong(text));
                }
                Event::Text(text) => match (&mut block, &mut heading, &mut strong) {
                    (Some(block), _, _) => block.text.push_str(&text),
                    (_, Some((_, title)), _) => title.push_str(&text),
                    (_, _, Some(strong)) => strong.push_str(&text),
                    _ => document.piece(Piece::Plain(text.to_string())),
                },
                Event::Code(code) => match (&mut heading, &mut strong) {
                    (Some((_, title)), _) => title.push_str(&code),
                    (_, Some(strong)) => strong.push_str(&code),
                    _ => document.piece(Piece::Other),
                },
                Event::SoftBreak => document.piece(Piece::Plain(" ".into())),
                _ => {}
            }
        }
        document
    }

    pub fn code_blocks<'a>(&'a self, language: &'a str) -> impl Iterator<Item = &'a CodeBlock> {
        self.blocks.iter().filter(move |block| block.language == language)
    }

    /// The names by which links reach the headings of this file, made as code hosts make them.
    pub fn anchors(&self) -> BTreeSet<String> {
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        let mut anchors = BTreeSet::new();
        for (_, _, title) in &self.headings {
            let title = title.to_lowercase();
            let kept = title.chars().filter_map(|letter| match letter {
                ' ' => Some('-'),
                '-' | '_' => Some(letter),
                _ if letter.is_alphanumeric() => Some(letter),
                _ => None,
            });
            let anchor: String = kept.collect();
            let number = seen.entry(anchor.clone()).or_default();
            anchors.insert(if *number == 0 { anchor } else { format!("{anchor}-{number}") });
            *number += 1;
        }
        anchors
    }

    /// The first cells of the first table below a heading, without its head.
    pub fn first_column_below(&self, title: &str) -> Vec<(Place, String)> {
        let (heading, ..) = self.headings.iter().find(|heading| heading.2 == title).expect("the heading");
        let table = self.tables.iter().find(|table| self.place(table.start).line > heading.line);
        let rows = self.rows(table.expect("a table"));
        rows.into_iter().skip(2).map(|(place, mut cells)| (place, cells.remove(0))).collect()
    }

    /// Headings, tables, lists and paragraphs that a reader would not see as they were meant.
    pub fn broken_structure(&self) -> Vec<String> {
        let mut problems = self.broken_headings();
        problems.extend(self.tables.iter().flat_map(|table| self.broken_table(table)));
        for (place, pieces) in &self.prose {
            problems.extend(broken_paragraph(pieces).map(|problem| format!("{place}: {problem}")));
        }
        if self.text.lines().filter(|line| line.trim_start().starts_with("```")).count() % 2 == 1 {
            problems.push(format!("{}: a code block that is not closed", self.name));
        }
        problems
    }

    fn broken_headings(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let tops = self.headings.iter().filter(|heading| heading.1 == HeadingLevel::H1).count();
        if tops != 1 && !self.headings.is_empty() {
            problems.push(format!("{}: expected one heading of level 1, found {tops}", self.name));
        }
        for pair in self.headings.windows(2) {
            let (before, after) = (pair[0].1 as usize, pair[1].1 as usize);
            if after > before + 1 {
                problems.push(format!("{}: from level {before} to level {after}", pair[1].0));
            }
        }
        problems
    }

    fn broken_table(&self, table: &Range<usize>) -> Vec<String> {
        let rows = self.rows(table);
        let columns = rows[0].1.len();
        let wrong = rows.iter().filter(|(_, cells)| cells.len() != columns);
        wrong
            .map(|(place, cells)| format!("{place}: a row of {} cells in a table of {columns}", cells.len()))
            .collect()
    }

    /// The rows of a table as they are written, its head and the line below it first.
    fn rows(&self, table: &Range<usize>) -> Vec<(Place, Vec<String>)> {
        let first = self.place(table.start).line;
        let lines = self.text[table.clone()].trim_end().lines().enumerate();
        lines
            .map(|(number, line)| (Place { file: self.name.clone(), line: first + number }, cells(line)))
            .collect()
    }

    fn piece(&mut self, piece: Piece) {
        if let Some((_, pieces)) = self.prose.last_mut() {
            pieces.push(piece);
        }
    }

    fn place(&self, offset: usize) -> Place {
        Place { file: self.name.clone(), line: self.text[..offset].matches('\n').count() + 1 }
    }
}

/// The cells of a row: what stands between bars that are not escaped.
fn cells(line: &str) -> Vec<String> {
    let line = line.trim().replace("\\|", "\u{1}");
    let inner = line.strip_prefix('|').unwrap_or(&line);
    let inner = inner.strip_suffix('|').unwrap_or(inner);
    inner.split('|').map(|cell| cell.trim().replace('\u{1}', "|")).collect()
}

/// What says that lines were joined which belong apart.
fn broken_paragraph(pieces: &[Piece]) -> Option<String> {
    let mut before = String::new();
    for piece in pieces {
        match piece {
            // `**A title.**` begins a paragraph; within one, emphasis is no sentence of its own.
            Piece::Strong(text) if text.ends_with('.') && !before.trim().is_empty() => {
                return Some(format!("\"{text}\" starts in the middle of a paragraph"));
            }
            Piece::Strong(text) | Piece::Plain(text) => before.push_str(text),
            Piece::Other => before.push('`'),
        }
    }
    let words: Vec<&str> = before.split_whitespace().collect();
    if before.contains("| --- |") || before.contains("| | ---") {
        return Some("a table within a paragraph".into());
    }
    for (number, pair) in words.windows(2).enumerate() {
        if pair[0].len() >= 2 && pair[0].chars().all(|letter| letter == '#') {
            return Some(format!("a heading within a paragraph: {} {}", pair[0], pair[1]));
        }
        let ends_sentence = number > 0 && words[number - 1].ends_with(['.', ';']);
        if ends_sentence && matches!(pair[0], "-" | "*") && pair[1].starts_with(char::is_uppercase) {
            return Some(format!("a list within a paragraph: - {}", pair[1]));
        }
    }
    None
}
