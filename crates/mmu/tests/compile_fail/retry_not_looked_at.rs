//! A fault that was not served must be noticed.
#![deny(unused_must_use)]

use afterimage_mmu::{Fault, PrimaryMmu, SecondaryMmu, Vcpu};

fn served<S, M>(vcpu: &mut Vcpu<'_, S>, primary: &M, fault: &Fault) -> Option<()>
where
    S: SecondaryMmu,
    M: PrimaryMmu<Page = S::Page>,
{
    vcpu.handle_fault(primary, fault).ok()?;
    Some(())
}

fn main() {}
