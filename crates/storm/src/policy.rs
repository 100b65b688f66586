//! What can be chosen for a storm, by the words of the command line.

use core::fmt;
use core::str::FromStr;

use afterimage_mmu::{
    Barrier, Coverage as ActiveCoverage, Policy, Precheck as Checks, SequenceScope, Turns as EngineTurns,
    WitnessKind, YieldPolicy,
};
use serde::{Serialize, Serializer};

/// Retries after which a fault is starved.
const STARVED: u32 = 2;
/// A vCPU's share of a stream of invalidations, in nanoseconds.
const SLICE_NS: u64 = 100_000;

/// A word that is none of the choices.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{word}\" is no {what}: write one of {choices}")]
pub struct UnknownChoice {
    word: String,
    what: &'static str,
    choices: String,
}

macro_rules! choices {
    ($(#[$meta:meta])* $name:ident, $what:literal { $($(#[$doc:meta])* $choice:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$doc])* $choice,)+
        }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$choice,)+];

            /// The word for it, on the command line and in JSON.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$choice => $word,)+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.word())
            }
        }

        impl FromStr for $name {
            type Err = UnknownChoice;

            fn from_str(word: &str) -> Result<Self, UnknownChoice> {
                Self::ALL.iter().find(|choice| choice.word().eq_ignore_ascii_case(word)).copied().ok_or_else(
                    || {
                        let choices: Vec<_> = Self::ALL.iter().map(|choice| choice.word()).collect();
                        UnknownChoice { word: word.to_owned(), what: $what, choices: choices.join(", ") }
                    },
                )
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.word())
            }
        }
    };
}

choices! {
    /// What kind of storm. Each has a published counterpart.
    Scenario, "scenario" {
        /// One wide zap, while vCPUs hammer a few frames that it has zapped already (Yan Zhao, August 2023).
        A = "A",
        /// A scanner invalidates large ranges over and over; half of the vCPUs touch them, the others are controls outside
        /// (Friedrich Weber, January 2024: NUMA balancing).
        B = "B",
        /// Very many invalidations of single pages that vCPUs use (Sean Christopherson, February 2024: KSM).
        C = "C",
        /// Overlapping invalidations far apart, and faults between them.
        D = "D",
        /// A stream of invalidations elsewhere in the virtual machine, against faults on fresh memory.
        E = "E",
        /// A continuous stream of invalidations over the memory that is touched.
        EInside = "E-inside",
    }
}

choices! {
    /// Where a fault looks, without the lock, whether it is doomed.
    Precheck, "place to check" {
        /// Nowhere: Linux before d02c357e5bfa (6.9).
        Off = "off",
        /// Before the page is faulted in.
        Before = "before",
        /// After it was, and before `mmu_lock` is taken.
        After = "after",
        /// In both places: Linux since.
        Both = "both",
    }
}

choices! {
    /// When a zap gives up `mmu_lock` between two entries.
    Yielding, "reason to yield" {
        /// When somebody waits for it, or the scheduler wants the CPU: a preemptible kernel.
        Contention = "contention",
        /// When the scheduler wants the CPU: a kernel that is not preemptible.
        Resched = "resched",
        /// Never.
        Never = "never",
    }
}

choices! {
    /// Whose end makes a fault under way retry.
    Sequence, "sequence" {
        /// That of any invalidation: Linux.
        Global = "global",
        /// That of an invalidation in the same region of 2 MiB, or of 64 MiB if it touches more than 64 of them.
        Region = "region",
    }
}

choices! {
    /// Which frames an active invalidation holds back.
    Coverage, "coverage" {
        /// The hull of all that are active: Linux.
        Hull = "hull",
        /// Its own, as far as a few are active.
        Exact = "exact",
    }
}

choices! {
    /// Whether a fault that is retried too often goes before the next invalidation.
    Turns, "way to take turns" {
        /// It does not: Linux.
        Never = "never",
        /// After two retries, for the one access.
        Starved = "starved",
        /// After one retry, for as long as it was held up, and a hundred microseconds at most.
        Slice = "slice",
    }
}

choices! {
    /// What keeps a verdict true until the install is done.
    Witness, "witness" {
        /// `mmu_lock`, held for read: Linux.
        Lock = "lock",
        /// A word of the vCPU's own, in which it announces what it installs.
        Intent = "intent",
    }
}

choices! {
    /// What becomes of a fault that has to be retried.
    AfterRetry, "way to go on after a retry" {
        /// It faults again at once: Linux.
        Refault = "refault",
        /// It sleeps until the invalidation that covers it has ended.
        Park = "park",
    }
}

/// One point of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Policies {
    /// Where faults look.
    pub precheck: Precheck,
    /// When zaps yield.
    #[serde(rename = "yield")]
    pub yielding: Yielding,
    /// Whose end matters.
    pub sequence: Sequence,
    /// What is held back.
    pub coverage: Coverage,
    /// Who goes first.
    pub turns: Turns,
    /// What keeps a verdict true.
    pub witness: Witness,
    /// What a retried fault does.
    pub after_retry: AfterRetry,
}

impl Policies {
    /// A preemptible Linux before d02c357e5bfa.
    pub const BEFORE: Self = Self { precheck: Precheck::Off, ..Self::LINUX };

    /// A preemptible Linux since 6.9.
    pub const LINUX: Self = Self {
        precheck: Precheck::Both,
        yielding: Yielding::Contention,
        sequence: Sequence::Global,
        coverage: Coverage::Hull,
        turns: Turns::Never,
        witness: Witness::Lock,
        after_retry: AfterRetry::Refault,
    };

    /// What this project makes of it with the lock.
    pub const OURS_LOCKED: Self = Self {
        precheck: Precheck::Both,
        yielding: Yielding::Never,
        sequence: Sequence::Region,
        coverage: Coverage::Exact,
        turns: Turns::Slice,
        witness: Witness::Lock,
        after_retry: AfterRetry::Park,
    };

    /// What this project makes of it.
    pub const OURS: Self = Self { witness: Witness::Intent, ..Self::OURS_LOCKED };

    /// What a reader knows these policies by, if they have a name.
    pub fn name(&self) -> Option<&'static str> {
        let resched = |policies: Self| Self { yielding: Yielding::Resched, ..policies };
        [
            (Self::BEFORE, "before the change"),
            (resched(Self::BEFORE), "before, voluntary"),
            (Self::LINUX, "Linux since 6.9"),
            (resched(Self::LINUX), "Linux, voluntary"),
            (Self::OURS_LOCKED, "ours, locked"),
            (Self::OURS, "ours"),
        ]
        .into_iter()
        .find_map(|(policies, name)| (policies == *self).then_some(name))
    }

    /// As the engine takes them. What becomes of a retried fault is its caller's business.
    pub fn engine(&self) -> Policy {
        Policy {
            precheck: match self.precheck {
                Precheck::Off => Checks::empty(),
                Precheck::Before => Checks::BEFORE_FAULT_IN,
                Precheck::After => Checks::AFTER_FAULT_IN,
                Precheck::Both => Checks::all(),
            },
            yielding: match self.yielding {
                Yielding::Contention => YieldPolicy::OnContention,
                Yielding::Resched => YieldPolicy::OnResched,
                Yielding::Never => YieldPolicy::Never,
            },
            scope: match self.sequence {
                Sequence::Global => SequenceScope::Global,
                Sequence::Region => SequenceScope::Region,
            },
            coverage: match self.coverage {
                Coverage::Hull => ActiveCoverage::Hull,
                Coverage::Exact => ActiveCoverage::Exact,
            },
            turns: match self.turns {
                Turns::Never => None,
                Turns::Starved => Some(EngineTurns { after: STARVED, at_most_ns: 0 }),
                Turns::Slice => Some(EngineTurns { after: 1, at_most_ns: SLICE_NS }),
            },
            witness: match self.witness {
                Witness::Lock => WitnessKind::Lock,
                Witness::Intent => WitnessKind::Intent,
            },
            // Invalidations are many in a storm, and a barrier on every CPU is dear for each.
            barrier: Barrier::Symmetric,
        }
    }
}

impl fmt::Display for Policies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { precheck, yielding, sequence, coverage, turns, witness, after_retry } = self;
        write!(f, "{precheck}/{yielding}/{sequence}/{coverage}/{turns}/{witness}/{after_retry}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_as_what_they_name() {
        for scenario in Scenario::ALL {
            assert_eq!(scenario.word().to_lowercase().parse(), Ok(*scenario));
        }
        for yielding in Yielding::ALL {
            assert_eq!(yielding.word().parse(), Ok(*yielding));
        }
        let unknown = "sometimes".parse::<Precheck>().expect_err("there is no such choice");
        assert_eq!(
            unknown.to_string(),
            "\"sometimes\" is no place to check: write one of off, before, after, both"
        );
    }

    #[test]
    fn linux_is_the_engines_default() {
        assert_eq!(Policies::LINUX.engine(), Policy::default());
        assert_eq!(Policies::LINUX.name(), Some("Linux since 6.9"));
        assert_eq!(Policies { precheck: Precheck::After, ..Policies::OURS }.name(), None);
    }
}
