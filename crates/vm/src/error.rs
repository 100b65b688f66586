//! What can keep a guest from starting, or from ending.

use std::io;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// The specification cannot be run as it stands.
    #[error("{what}")]
    Spec {
        /// What is wrong with it, as a sentence.
        what: String,
    },
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {error}; a thread guest needs no KVM")]
    NoKvm {
        /// What the system said.
        error: io::Error,
    },
    /// A KVM call failed.
    #[error("KVM cannot {what}: {error}{}", way_out(error))]
    Kvm {
        /// What it was asked to do.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// Another system call failed.
    #[error("cannot {what}: {error}{}", way_out(error))]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// The guest program could not be assembled; a bug of this crate.
    #[error("the guest program cannot be assembled: {what}")]
    Assemble {
        /// What the assembler said.
        what: String,
    },
    /// Only a KVM guest can do this.
    #[error("only a KVM guest can {what}")]
    NeedsKvm {
        /// What was asked for.
        what: &'static str,
    },
    /// Only a software guest can do this.
    #[error("only a software guest can {what}")]
    NeedsSoft {
        /// What was asked for.
        what: &'static str,
    },
    /// These vCPUs did not end in time, not even when kicked. Their threads are left behind, and may still touch
    /// the managed memory: it must stay mapped.
    #[error("vCPU {vcpus:?} did not stop, not even when kicked")]
    DidNotStop {
        /// Their numbers.
        vcpus: Vec<usize>,
    },
}

impl VmError {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { what, error: io::Error::from_raw_os_error(error.errno()) }
    }

    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::System { what, error: error.into() }
    }

    pub(crate) fn spec(what: impl Into<String>) -> Self {
        Self::Spec { what: what.into() }
    }
}

/// What helps, where that is known.
fn way_out(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "; raise the limit of open files with `ulimit -n`",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn an_error_of_the_system_is_told_once_with_what_helps() {
        let error = VmError::kvm("create a vCPU")(kvm_ioctls::Error::new(libc::EMFILE));
        assert!(error.source().is_none(), "it is in the sentence already");
        let said = error.to_string();
        assert_eq!(said.matches("os error 24").count(), 1, "{said}");
        assert!(said.ends_with("; raise the limit of open files with `ulimit -n`"), "{said}");
    }
}
