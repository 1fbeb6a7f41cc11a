//! Everything that slows calls down, each able to say why.

pub mod daily;
pub mod deadline;
pub mod pacer;
pub mod window;
