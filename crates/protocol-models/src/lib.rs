//! Models of the protocols by which mongorekey keeps what an application writes, while processes are
//! stopped, killed and cut off: small programs and a small server, of which the tests visit every state
//! that they can come to.
//!
//! Time passes between any two steps, as much as you like: a process that stands still is one that
//! takes no step. So nothing here looks at a clock, and whatever holds in a model needs no lease, no
//! deadline and no patience to hold. A command whose answer is lost may have been carried out, or may be
//! carried out at any later time.
//!
//! Each mechanism of a protocol can be switched off, and a test asserts that something is lost then:
//! what is never missed would be no mechanism, or the model would not see what it is for.

#[cfg(test)]
mod checking;
pub mod exchange;
pub mod explore;
pub mod lanes;
