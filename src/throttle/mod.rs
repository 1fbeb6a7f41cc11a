//! Everything that slows calls down, each able to say why.

pub mod adaptive;
pub mod breaker;
pub mod daily;
pub mod deadline;
pub mod health;
pub mod limits;
pub mod pace;
pub mod pacer;
mod reserved;
pub mod waiting;
pub mod window;
