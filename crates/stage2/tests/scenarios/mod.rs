//! What must hold, as functions over any format: `engine.rs` runs each, `mutations.rs` runs them with a rule switched off.

pub(crate) mod dirty;
pub(crate) mod faults;
pub(crate) mod frozen;
pub(crate) mod large;
pub(crate) mod near;
pub(crate) mod nx;
pub(crate) mod roots;
pub(crate) mod yields;
