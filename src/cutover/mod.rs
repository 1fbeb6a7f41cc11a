//! Cutting over: the clean collection takes the place of the old one, and back.
//!
//! `run` lists the steps of a cutover, `rollback` those of the way back; both go
//! by an exchange of names (`exchange`) under a `fence`, unless the application is
//! deployed to the new collection (`switch`). A swap leaves nothing to
//! exchange: `bring_back` puts what was rejected back into the live collection. After a keep
//! `feed_back` keeps the old collection up to date. What is on its way is
//! in the job document (`record`) before it happens, so that whoever comes after
//! a crash (`recover`: the `watchdog`, or any later command) finds out by the
//! identities of the collections what has become of it, and lifts the fence. Where the
//! job is gone, the fence itself tells (`orphan`).

pub mod bring_back;
pub mod exchange;
pub mod feed_back;
pub mod fence;
pub mod gap;
pub mod gates;
pub mod in_step;
pub mod order;
pub mod orphan;
pub mod record;
pub mod recover;
pub mod report;
pub mod residual;
pub mod rollback;
pub mod run;
pub mod situation;
pub mod switch;
pub mod watchdog;
pub mod working_name;
