//! `afterimage`: serve guest page faults while memory is taken away.

mod host;
mod output;
mod run;
mod signals;
mod storm;
mod units;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exit code of a run that found something wrong.
const EXIT_WRONG: u8 = 1;
/// Exit code of a command that could not start, or whose result could not be kept.
const EXIT_USAGE: u8 = 2;

/// Serve guest page faults, fast and never stale, while the memory underneath is taken away.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a guest that verifies its memory while that is restored lazily, evicted and discarded
    Run(Box<run::RunArgs>),
    /// Provoke KVM's invalidation storms, and measure what each policy makes of them
    Storm(Box<storm::StormArgs>),
    /// Show what this host offers, and how to turn on what is missing
    Host(host::HostArgs),
}

fn main() -> ExitCode {
    signals::take_file_limits_as_errors();
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(*args),
        Command::Storm(args) => storm::run(*args),
        Command::Host(args) => host::run(args),
    };
    result.unwrap_or_else(|error| {
        output::say(format_args!(": {error:#}"));
        ExitCode::from(EXIT_USAGE)
    })
}
