//! Everything that slows calls down, each able to say why.

pub mod pacer;
pub mod window;
