//! How long the tests go on whose course is drawn by a seed (`random_…`): in a usual run a few rounds
//! with seeds that have found a fault before, under `scripts/soak` many rounds with ever new seeds.

use crate::harness::Random;

/// Set by `scripts/soak`: so many times the usual rounds.
const FACTOR: &str = "MONGOREKEY_SOAK_FACTOR";
/// Set by `scripts/soak`: other seeds than the usual ones.
const SEED: &str = "MONGOREKEY_SOAK_SEED";

/// How many rounds a test makes that usually makes so many.
pub fn rounds(usual: usize) -> usize {
    usual * number(FACTOR).map_or(1, |factor| usize::try_from(factor).expect("a small factor"))
}

/// The seed of a test that usually has this one.
pub fn seed(usual: u64) -> u64 {
    number(SEED).map_or(usual, |seed| Random::seeded(seed).next() ^ usual)
}

/// The numbers of a test that usually draws them by this seed.
pub fn random(usual: u64) -> Random {
    Random::seeded(seed(usual))
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}
