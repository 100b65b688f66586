//! Whether every vCPU gets on.

use std::time::{Duration, Instant};

use afterimage_vm::GuestHandle;

/// A vCPU that makes no access for so long hangs.
pub(super) const STALL: Duration = Duration::from_secs(10);

/// When each vCPU was last seen to get on, and how far it was then.
#[derive(Debug)]
pub(super) struct Progress {
    vcpus: Vec<(Instant, u64)>,
}

/// What is seen of a vCPU.
#[derive(Clone, Copy, Debug)]
enum Seen {
    Accesses(u64),
    /// It makes no more.
    Ended,
}

impl Progress {
    pub(super) fn new(vcpus: usize, now: Instant) -> Self {
        Self { vcpus: vec![(now, 0); vcpus] }
    }

    /// Whether no vCPU has made an access yet.
    pub(super) fn is_none(&self) -> bool {
        self.vcpus.iter().all(|(_, accesses)| *accesses == 0)
    }

    /// Looks at `guest`; the vCPUs that hang.
    pub(super) fn look(&mut self, guest: &GuestHandle) -> Vec<usize> {
        let seen = |vcpu| match guest.end_of(vcpu) {
            Some(_) => Seen::Ended,
            None => Seen::Accesses(guest.vcpu_counters(vcpu).accesses),
        };
        self.see(Instant::now(), seen)
    }

    fn see(&mut self, now: Instant, seen: impl Fn(usize) -> Seen) -> Vec<usize> {
        let mut hanging = Vec::new();
        for (vcpu, (since, accesses)) in self.vcpus.iter_mut().enumerate() {
            match seen(vcpu) {
                Seen::Accesses(now_made) if now_made == *accesses => {
                    if now.saturating_duration_since(*since) > STALL {
                        hanging.push(vcpu);
                    }
                }
                Seen::Accesses(now_made) => (*since, *accesses) = (now, now_made),
                Seen::Ended => {}
            }
        }
        hanging
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `see` says second by second, where vCPU 0 gets on, 1 stands still after `stands` seconds, and 2 has ended.
    fn hangs_after(stands: u64) -> Option<(u64, Vec<usize>)> {
        let started = Instant::now();
        let mut progress = Progress::new(3, started);
        (1..60).find_map(|second| {
            let hanging = progress.see(started + Duration::from_secs(second), |vcpu| match vcpu {
                0 => Seen::Accesses(second),
                1 => Seen::Accesses(second.min(stands)),
                _ => Seen::Ended,
            });
            (!hanging.is_empty()).then_some((second, hanging))
        })
    }

    #[test]
    fn one_vcpu_that_stands_still_is_a_hang() {
        for stands in [0, 7] {
            assert_eq!(hangs_after(stands), Some((stands + STALL.as_secs() + 1, vec![1])));
        }
        assert_eq!(hangs_after(60), None);
    }

    #[test]
    fn an_access_of_any_vcpu_is_one() {
        let started = Instant::now();
        let mut progress = Progress::new(2, started);
        assert!(progress.is_none());
        progress.see(started, |vcpu| Seen::Accesses(vcpu as u64));
        assert!(!progress.is_none());
    }
}
