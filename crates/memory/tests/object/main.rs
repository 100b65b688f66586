//! Memory objects under real userfaultfd, with threads as guests.

#[path = "../support/mod.rs"]
mod support;

mod budget;
mod full;
mod lost;
mod machines;
mod model;
mod moves;
mod races;
mod scarce;
mod tampered;
