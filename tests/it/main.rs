//! Tests against a real replica set and real HTTP: `scripts/mongod run -- cargo nextest run`.
#![expect(unreachable_pub, reason = "nothing of a test binary is reachable; `pub` says what a module is for")]

mod answers;
mod backfill;
mod backfill_kill;
mod backfill_race;
mod chunk_cost;
mod cleanse;
mod cleanse_kill;
mod cleanse_refusals;
mod cleanse_rules;
mod cleanse_shape;
mod cleansing;
mod command_line;
mod config;
mod fail_points;
mod fields;
mod goodbooks;
mod guard;
mod harness;
mod identity;
mod key_api;
mod outages;
mod own_set;
mod pacing;
mod plan_and_index;
mod program;
mod random_kills;
mod regressions;
mod replica_set;
mod secrets;
mod surroundings;
mod targets;
mod verify;
