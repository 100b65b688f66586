//! What must hold, one function each. `protocol.rs` runs them as they are; `mutations.rs` runs them with one rule
//! switched off and wants them to fail.

pub(crate) mod fault;
pub(crate) mod handshake;
pub(crate) mod intents;
pub(crate) mod invalidation;
pub(crate) mod memslots;
pub(crate) mod pages;
pub(crate) mod precheck;
pub(crate) mod stress;
pub(crate) mod turns;
pub(crate) mod waiting;
pub(crate) mod words;
pub(crate) mod yielding;
