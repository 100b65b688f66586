//! A host in memory for the tests: tables, pages, guests with a TLB, and points to stop a thread at.
//!
//! Nothing here sleeps for a while and hopes. A race is made by a [`Hook`](hooks::Hooks) that runs the other side at a
//! named point, or by a [`Gate`](gate::Gate) that keeps a thread at one until the test lets it go.

pub(crate) mod frames;
pub(crate) mod gate;
pub(crate) mod hooks;
pub(crate) mod machine;
pub(crate) mod platform;
pub(crate) mod table;
