//! Request, kick and acknowledgement: when a flush returns, no guest uses what was zapped before it.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::{RACE, STUCK, fails_without, holds};
use crate::addr::{Gfn, GfnRange};
use crate::flush::Flush;
use crate::intent::Barrier;
use crate::mutation::Mutation;
use crate::platform::model::Loom;
use crate::vcpu_words::{Requests, VcpuShared, VcpuWords};

/// A page, one entry that shows it, and a vCPU that may have it in its TLB.
struct Machine {
    vcpus: VcpuWords<Loom>,
    present: AtomicBool,
    page: UnsafeCell<()>,
}

impl Machine {
    fn new() -> Arc<Self> {
        let page = UnsafeCell::new(());
        Arc::new(Self { vcpus: VcpuWords::new(Barrier::Symmetric), present: AtomicBool::new(true), page })
    }

    /// Enters the guest so many times, uses the page each time if the TLB or the table has it, and leaves.
    fn run(&self, vcpu: &VcpuShared, rounds: usize) {
        let mut tlb = false;
        for _ in 0..rounds {
            match vcpu.enter_guest::<Loom>() {
                Ok(()) => {
                    tlb = tlb || self.present.load(Ordering::Acquire);
                    if tlb {
                        self.page.with(|_| ());
                    }
                    vcpu.leave_guest::<Loom>();
                    if vcpu.take_requests().contains(Requests::FLUSH_TLB) {
                        tlb = false;
                    }
                }
                Err(requests) => tlb = tlb && !requests.contains(Requests::FLUSH_TLB),
            }
        }
    }

    /// Zaps the entry, flushes, and frees the page.
    fn take_away(&self) {
        self.zap_and_flush();
        self.page.with_mut(|_| ());
    }

    fn zap_and_flush(&self) {
        self.present.store(false, Ordering::Relaxed);
        self.vcpus.request_and_wait(Requests::FLUSH_TLB, |_| ());
    }
}

fn a_guest_against_a_flush(rounds: usize) {
    let machine = Machine::new();
    let (other, vcpu) = (Arc::clone(&machine), machine.vcpus.register());
    let guest = thread::spawn(move || other.run(&vcpu, rounds));
    machine.take_away();
    guest.join().expect("the guest does not panic");
}

fn once_in_the_guest() {
    a_guest_against_a_flush(1);
}

fn twice_in_the_guest() {
    a_guest_against_a_flush(2);
}

fn three_times_in_the_guest() {
    a_guest_against_a_flush(3);
}

/// Two pages, and a vCPU that forgets of them what it is told to.
struct Pages {
    vcpus: VcpuWords<Loom>,
    present: [AtomicBool; 2],
    pages: [UnsafeCell<()>; 2],
}

impl Pages {
    fn run(&self, vcpu: &VcpuShared, rounds: usize) {
        let mut tlb = [false; 2];
        let obey = |tlb: &mut [bool; 2], requests: Requests| {
            if requests.contains(Requests::FLUSH_TLB) {
                let flush = vcpu.take_flush();
                for (frame, cached) in (0..).zip(tlb) {
                    *cached = *cached && !flush.translations.contains(Gfn::new(frame));
                }
            }
        };
        for _ in 0..rounds {
            match vcpu.enter_guest::<Loom>() {
                Ok(()) => {
                    for ((cached, present), page) in tlb.iter_mut().zip(&self.present).zip(&self.pages) {
                        *cached = *cached || present.load(Ordering::Relaxed);
                        if *cached {
                            page.with(|_| ());
                        }
                    }
                    vcpu.leave_guest::<Loom>();
                    obey(&mut tlb, vcpu.take_requests());
                }
                Err(requests) => obey(&mut tlb, requests),
            }
        }
    }

    fn take_away(&self, frame: u64) {
        self.present[frame as usize].store(false, Ordering::Relaxed);
        let flush = Flush::of(GfnRange::frame(Gfn::new(frame)));
        self.vcpus.flush_and_wait(flush, |_| ());
        self.pages[frame as usize].with_mut(|_| ());
    }
}

fn pages() -> Arc<Pages> {
    Arc::new(Pages {
        vcpus: VcpuWords::new(Barrier::Symmetric),
        present: core::array::from_fn(|_| AtomicBool::new(true)),
        pages: core::array::from_fn(|_| UnsafeCell::new(())),
    })
}

/// One page after the other: what the vCPU has not taken of the first flush when the second comes is not lost.
fn ranges_in_turn() {
    let machine = pages();
    let (other, vcpu) = (Arc::clone(&machine), machine.vcpus.register());
    let guest = thread::spawn(move || other.run(&vcpu, 3));
    machine.take_away(0);
    machine.take_away(1);
    guest.join().expect("the guest does not panic");
}

/// Both at once: a vCPU may take the range of one with the request of the other.
fn ranges_at_once() {
    let machine = pages();
    let (other, vcpu) = (Arc::clone(&machine), machine.vcpus.register());
    let guest = thread::spawn(move || other.run(&vcpu, 3));
    let second = Arc::clone(&machine);
    let flusher = thread::spawn(move || second.take_away(1));
    machine.take_away(0);
    guest.join().expect("the guest does not panic");
    flusher.join().expect("the flusher does not panic");
}

/// Two flushes at once: one of them finds the vCPU kicked already, and may not go on before it has left either.
fn two_flushes() {
    let machine = Machine::new();
    let (other, vcpu) = (Arc::clone(&machine), machine.vcpus.register());
    let guest = thread::spawn(move || other.run(&vcpu, 1));
    let second = Arc::clone(&machine);
    let flusher = thread::spawn(move || second.zap_and_flush());
    machine.take_away();
    guest.join().expect("the guest does not panic");
    flusher.join().expect("the flusher does not panic");
}

fn two_guests() {
    let machine = Machine::new();
    let guests = [(); 2].map(|()| {
        let (other, vcpu) = (Arc::clone(&machine), machine.vcpus.register());
        thread::spawn(move || other.run(&vcpu, 1))
    });
    machine.take_away();
    for guest in guests {
        guest.join().expect("the guest does not panic");
    }
}

#[test]
fn loom_a_flush_waits_for_every_guest() {
    holds("guest once, flush", 5, once_in_the_guest);
    holds("guest twice, flush", 4, twice_in_the_guest);
    holds("guest three times, flush", 4, three_times_in_the_guest);
    holds("two guests, flush", 3, two_guests);
    holds("guest, two flushes", 3, two_flushes);
    holds("guest, flushes of ranges in turn", 3, ranges_in_turn);
    holds("guest, flushes of ranges at once", 2, ranges_at_once);
}

#[test]
fn loom_each_rule_of_the_handshake_is_needed() {
    fails_without(Mutation::EnterWithoutFence, RACE, 3, once_in_the_guest);
    fails_without(Mutation::RequestWithoutFence, RACE, 3, once_in_the_guest);
    fails_without(Mutation::KickWithoutAck, RACE, 3, once_in_the_guest);
    fails_without(Mutation::LeaveWithoutWake, STUCK, 3, once_in_the_guest);
    fails_without(Mutation::GuestLeaveRelaxed, RACE, 3, once_in_the_guest);
    fails_without(Mutation::GuestEnterRelaxed, RACE, 3, three_times_in_the_guest);
    fails_without(Mutation::FlushWidenedLate, RACE, 3, ranges_in_turn);
    fails_without(Mutation::FlushWidenedRelaxed, RACE, 2, ranges_at_once);
}
