//! Which checks apply. Pure.

use super::sample::DEFAULT_SAMPLE;
use crate::cli::verify::VerifyArgs;

/// What there is to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct There {
    /// Two collections to compare.
    pub sides: bool,
    /// Whether the options name them.
    pub named_sides: bool,
    /// A job that has made the copy.
    pub copy: bool,
    /// Whether its collections have changed their names since.
    pub cut_over: bool,
    /// A job that has filled the targets.
    pub backfill: bool,
    /// Whether a new key may stand for one legacy key only.
    pub unique_keys: bool,
}

/// The checks that are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Candidates left, and flags.
    pub candidates: bool,
    /// Indexes and options.
    pub structure: bool,
    /// Documents by number.
    pub counts: bool,
    /// So many random documents.
    pub sample: Option<u32>,
    /// Every document.
    pub full: bool,
    /// What is written meanwhile.
    pub dual_write: bool,
    /// Legacy keys with two new keys.
    pub unique: bool,
    /// New keys of two legacy keys too.
    pub unique_new_keys: bool,
    /// So many keys, asked for again.
    pub keys: Option<u32>,
}

impl Wanted {
    /// What the options name; without any, all that there is something to check for.
    pub fn of(args: &VerifyArgs, there: There) -> Self {
        let of_sides = args.counts || args.sample.is_some() || args.full || args.dual_write;
        let of_targets = args.unique || args.keys.is_some();
        if of_sides || of_targets {
            return Self {
                // Counts of a backfill, where there are no collections to compare.
                candidates: of_sides && !there.sides && there.backfill,
                structure: there.sides && args.full,
                counts: there.sides && args.counts,
                sample: args.sample.filter(|_| there.sides),
                full: there.sides && args.full,
                dual_write: there.sides && args.dual_write,
                unique: args.unique,
                unique_new_keys: args.unique,
                keys: args.keys,
            };
        }
        let sides = there.sides && (there.named_sides || there.copy && !there.cut_over);
        let backfill = there.backfill && !there.named_sides;
        Self {
            candidates: backfill,
            structure: sides,
            counts: sides,
            sample: sides.then_some(DEFAULT_SAMPLE),
            full: sides,
            dual_write: false,
            unique: backfill,
            unique_new_keys: there.unique_keys,
            keys: None,
        }
    }

    /// Whether the two sides of a copy are looked at.
    pub fn concerns_sides(&self) -> bool {
        self.structure || self.counts || self.sample.is_some() || self.full || self.dual_write
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        verify: VerifyArgs,
    }

    fn wanted(line: &str, there: There) -> Wanted {
        let words = std::iter::once("verify").chain(line.split_whitespace());
        Wanted::of(&Line::parse_from(words).verify, there)
    }

    const COPY: There = There {
        sides: true,
        named_sides: false,
        copy: true,
        cut_over: false,
        backfill: false,
        unique_keys: false,
    };

    #[test]
    fn without_flags_all_that_applies_is_checked() {
        let copied = wanted("", COPY);
        assert!(copied.full && copied.counts && copied.structure && copied.sample == Some(DEFAULT_SAMPLE));
        assert!(!copied.candidates && !copied.unique && copied.keys.is_none() && !copied.dual_write);
        let filled = wanted("", There { backfill: true, ..There::default() });
        assert!(filled.candidates && filled.unique && !filled.unique_new_keys && !filled.concerns_sides());
        let nothing = wanted("", There { sides: true, ..There::default() });
        assert_eq!(nothing, Wanted::default());
        assert!(!wanted("", There { cut_over: true, ..COPY }).concerns_sides());
        assert!(wanted("", There { copy: false, named_sides: true, ..COPY }).full);
    }

    #[test]
    fn flags_name_what_is_checked() {
        let counts = wanted("--counts", COPY);
        assert_eq!(counts, Wanted { counts: true, ..Wanted::default() });
        let keys = wanted("--keys 5", There { backfill: true, ..COPY });
        assert_eq!(keys, Wanted { keys: Some(5), ..Wanted::default() });
        let full = wanted("--full --unique", COPY);
        assert!(full.full && full.structure && full.unique && full.unique_new_keys && full.sample.is_none());
    }
}
