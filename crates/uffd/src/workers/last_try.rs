//! Asking for a page for the last time.

use core::fmt;

use afterimage_mmu::{Fault, FaultInError, Gfn, Memslot, Patience, PrimaryMmu, Privacy, Snapshot};

/// Why a page is not to be had.
#[derive(Debug)]
pub(super) enum Lack<E> {
    Memory,
    Page(E),
}

impl<E: fmt::Display> fmt::Display for Lack<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("there is no memory for it"),
            Self::Page(cause) => cause.fmt(f),
        }
    }
}

/// The primary MMU, asked for the last time: what it does not give now is lost.
pub(super) struct LastTry<'m, M>(pub(super) &'m M);

impl<M: PrimaryMmu> PrimaryMmu for LastTry<'_, M> {
    type Page = M::Page;
    type Error = Lack<M::Error>;

    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        since: &Snapshot,
        patience: Patience,
    ) -> Result<M::Page, FaultInError<Self::Error>> {
        self.0.fault_in(slot, fault, since, patience).map_err(|error| match error {
            FaultInError::WouldWait => FaultInError::WouldWait,
            FaultInError::ReadOnly => FaultInError::ReadOnly,
            FaultInError::Interrupted | FaultInError::NoMemory => FaultInError::Poisoned(Lack::Memory),
            FaultInError::Poisoned(cause) | FaultInError::Failed(cause) => {
                FaultInError::Poisoned(Lack::Page(cause))
            }
        })
    }

    fn privacy(&self, gfn: Gfn) -> Privacy {
        self.0.privacy(gfn)
    }
}
