//! Invalidation storms against the fault path of a virtual machine: what Linux commit d02c357e5bfa changed, measured.
//!
//! * [`Policies`] are what can be chosen, [`Scenario`] what blows.
//! * A [`Cell`] is what was measured at one point of that matrix: on real threads over this project's engine and tables, in
//!   a simulation, or by watching a real kernel.

mod cell;
mod course;
mod guest;
mod invalidator;
mod matrix;
mod platform;
mod policy;
mod ram;
mod recording;
mod scenario;
mod sim;
mod start;
mod storm;
mod windows;

pub use hdrhistogram::Histogram;

pub use cell::{Cell, Engine, Latencies, Latency, Load, LockWait, Measured, Retries, Times};
pub use matrix::{Matrix, Outcome, Outcomes};
pub use policy::{
    AfterRetry, Coverage, Policies, Precheck, Scenario, Sequence, Turns, UnknownChoice, Witness, Yielding,
};
pub use recording::{Event, KEPT, Recording, What};
pub use sim::{Compared, Costs, Cut, Simulated, Simulation};
pub use storm::{MAX_MEMORY, MAX_VCPUS, Run, Storm, StormError};
