//! The frame table against a model: no frame has two owners, none is lost, none leaks its contents.

use alloc::boxed::Box;
use std::collections::BTreeMap;
use std::vec::Vec;

use galvan_base::testing::FakeMachine;
use proptest::prelude::*;

use super::*;

fn m(n: u64) -> Mfn {
    Mfn::new(n).unwrap()
}
fn range(r: Range<u64>) -> Range<Mfn> {
    m(r.start)..m(r.end)
}
fn order(o: u32) -> PageOrder {
    PageOrder::new(o).unwrap()
}

/// A table over these ranges of RAM, with all that the tests need to live for ever.
fn table(ram: &[Range<u64>], reserved: &[Range<u64>]) -> (&'static FakeMachine, FrameTable) {
    let machine: &'static FakeMachine = Box::leak(Box::new(FakeMachine::with_ram(ram.to_vec())));
    let ram: Vec<_> = ram.iter().cloned().map(range).collect();
    let reserved: Vec<_> = reserved.iter().cloned().map(range).collect();
    let n = FrameTable::infos_needed(&ram);
    let infos: Vec<FrameInfo> = (0..n).map(|_| FrameInfo::new()).collect();
    let infos = Box::leak(infos.into_boxed_slice());
    let t = FrameTable::new(infos, machine, &ram, &reserved, true).unwrap();
    (machine, t)
}

impl FrameTable {
    /// Checks the free lists against the frames' states and gives the number of free blocks.
    fn check(&self) -> usize {
        let mut blocks = 0;
        let (mut free, mut dirty) = (0, 0);
        for s in &self.spans {
            let mut at = s.frames.start;
            while at < s.frames.end {
                let w = Word(self.info(m(at)).unwrap().word.load(Ordering::Relaxed));
                match w.state() {
                    State::FreeHead => {
                        let size = 1u64 << w.order();
                        assert_eq!(at % size, 0);
                        for i in at + 1..at + size {
                            let t = Word(self.info(m(i)).unwrap().word.load(Ordering::Relaxed));
                            assert!(t == Word::new(State::FreeTail), "frame {i:#x} in a block");
                        }
                        let buddy = at ^ size;
                        let twin = self
                            .info(m(buddy))
                            .map(|i| Word(i.word.load(Ordering::Relaxed)));
                        assert!(
                            w.order() == 18 || twin != Some(w),
                            "buddies {at:#x} and {buddy:#x} of order {} are both free",
                            w.order()
                        );
                        free += size;
                        dirty += if w.dirty() { size } else { 0 };
                        blocks += 1;
                        at += size;
                    }
                    State::FreeTail => panic!("frame {at:#x} is free but in no block"),
                    _ => at += 1,
                }
            }
        }
        assert_eq!((self.free_frames(), self.dirty_frames()), (free, dirty));
        blocks
    }
}

#[test]
fn a_memory_map_with_holes_makes_the_right_frames_free() {
    // Below 4 GiB with a hole, touching ranges, and memory above.
    let ram = [0..0x9f, 0x100..0x8000, 0x8000..0x9000, 0x10_0000..0x14_0000];
    let (_, t) = table(&ram, &[0..1, 0x200..0x400, 0x7fff..0x8001]);
    assert_eq!(t.total(), 0x9f + 0x8f00 + 0x4_0000);
    assert_eq!(t.free_frames(), t.total() - 1 - 0x200 - 2);
    t.check();
    assert_eq!(t.usage(m(0x9f)), FrameUse::NotRam);
    assert_eq!(t.usage(m(0)), FrameUse::Reserved);
    assert_eq!(t.usage(m(0x8000)), FrameUse::Reserved);
    assert_eq!(t.usage(m(0x400)), FrameUse::Free);
    assert_eq!(t.max_mfn(), 0x14_0000);
    assert!(t.touches_ram(m(0x90), 0x100));
    assert!(!t.touches_ram(m(0x9f), 0x61));
    // The whole of the last GiB is one block.
    assert_eq!(t.alloc(order(18), Owner::Galvan), Ok(m(0x10_0000)));
    t.donate(range(0x200..0x400)).unwrap();
    assert_eq!(t.donate(range(0x3ff..0x400)), Err(NotOurs));
    t.check();
}

#[test]
fn low_memory_is_used_last_and_found_when_asked_for() {
    let (_, t) = table(&[0x100..0x1100, 0x10_0000..0x10_0010], &[]);
    assert_eq!(t.alloc(order(4), Owner::Galvan), Ok(m(0x10_0000)));
    let low = t.alloc(order(0), Owner::Galvan).unwrap();
    assert!(low.get() < 0x1100);
    let b = t.alloc_below(order(3), Owner::Guest(1), m(0x120)).unwrap();
    assert!(b.get() + 8 <= 0x120);
    assert_eq!(
        t.alloc_below(order(8), Owner::Guest(1), m(0x200)),
        Err(Exhausted)
    );
    t.check();
}

#[test]
fn chosen_frames_are_taken_all_or_none() {
    let (_, t) = table(&[0..0x4000], &[]);
    t.alloc_at(range(0x123..0x2345), Owner::Guest(0)).unwrap();
    t.check();
    assert_eq!(t.count_owned(Owner::Guest(0)), 0x2345 - 0x123);
    let free = t.free_frames();
    assert_eq!(
        t.alloc_at(range(0x2340..0x2400), Owner::Guest(1)),
        Err(NotOurs)
    );
    assert_eq!(
        t.alloc_at(range(0x3ff0..0x4001), Owner::Guest(1)),
        Err(NotOurs)
    );
    assert_eq!(t.free_frames(), free);
    t.check();
    t.release(m(0x123), 0x2345 - 0x123, Owner::Guest(0))
        .unwrap();
    assert_eq!(t.free_frames(), 0x4000);
}

#[test]
fn a_frame_in_use_survives_its_owner() {
    let (machine, t) = table(&[0..16], &[]);
    let f = t.alloc(order(0), Owner::Guest(7)).unwrap();
    machine.fill(f, 0x5a);
    t.get_ref(f).unwrap();
    t.get_ref(f).unwrap();
    t.release(f, 1, Owner::Guest(7)).unwrap();
    assert_eq!(t.usage(f), FrameUse::Limbo);
    assert_eq!((t.count_owned(Owner::Guest(7)), t.free_frames()), (0, 15));
    assert_eq!(t.release(f, 1, Owner::Guest(7)), Err(NotOurs));
    t.put_ref(f);
    assert_eq!(t.usage(f), FrameUse::Limbo);
    assert!(!machine.is_zero(f));
    t.put_ref(f);
    assert_eq!((t.usage(f), t.free_frames()), (FrameUse::Free, 16));
    assert_eq!(t.get_ref(f), Err(NotOurs));
    t.check();
}

#[test]
fn a_superpage_with_one_frame_in_use_comes_back_but_for_that_frame() {
    let (_, t) = table(&[0..1024], &[]);
    let b = t.alloc(order(9), Owner::Guest(3)).unwrap();
    let used = m(b.get() + 77);
    t.get_ref(used).unwrap();
    t.release(b, 512, Owner::Guest(3)).unwrap();
    assert_eq!((t.free_frames(), t.count_limbo()), (1023, 1));
    t.check();
    t.put_ref(used);
    assert_eq!(t.free_frames(), 1024);
    t.check();
}

#[test]
fn what_a_domain_leaves_is_not_seen_by_the_next() {
    let (machine, t) = table(&[0..64], &[]);
    let f = t.alloc(order(6), Owner::Guest(1)).unwrap();
    for i in 0..64 {
        machine.fill(m(f.get() + i), 0xaa);
    }
    t.release(f, 64, Owner::Guest(1)).unwrap();
    assert_eq!(t.dirty_frames(), 64);
    // Half of it by idle time, half by the allocation itself.
    assert!(t.scrub(order(5), || true));
    assert_eq!(t.dirty_frames(), 32);
    t.check();
    for _ in 0..2 {
        let b = t.alloc(order(5), Owner::Guest(2)).unwrap();
        assert!((0..32).all(|i| machine.is_zero(m(b.get() + i))));
    }
    assert!(!t.scrub(order(5), || true));
}

#[test]
fn scrubbing_stops_when_it_is_told_to_and_keeps_what_it_did() {
    let (machine, t) = table(&[0..64], &[]);
    let f = t.alloc(order(4), Owner::Guest(1)).unwrap();
    (0..16).for_each(|i| machine.fill(m(f.get() + i), 0xaa));
    t.release(f, 16, Owner::Guest(1)).unwrap();
    let mut asked = 0;
    assert!(t.scrub(order(4), || {
        asked += 1;
        assert_eq!((t.free_frames(), t.dirty_frames()), (64, 16));
        asked < 3
    }));
    assert_eq!((t.free_frames(), t.dirty_frames()), (64, 13));
    assert!((0..16).all(|i| machine.is_zero(m(f.get() + i)) == (i < 3)));
    t.check();
    while t.scrub(order(4), || false) {}
    assert_eq!(t.dirty_frames(), 0);
    t.check();
}

#[test]
fn scrubbing_joins_the_blocks_again() {
    let (_, t) = table(&[0..4096], &[]);
    let mut all: Vec<Mfn> = Vec::new();
    while let Ok(f) = t.alloc(order(0), Owner::Guest(1)) {
        all.push(f);
    }
    all.iter()
        .for_each(|f| t.release(*f, 1, Owner::Guest(1)).unwrap());
    assert_eq!(t.alloc(order(12), Owner::Guest(2)), Err(Exhausted));
    while t.scrub(order(3), || true) {
        t.check();
    }
    assert_eq!(t.alloc(order(12), Owner::Guest(2)), Ok(m(0)));
}

#[test]
fn what_is_being_scrubbed_counts_as_free_and_can_be_had() {
    let (_, t) = table(&[0..64], &[]);
    let all = t.free_frames();
    std::thread::scope(|s| {
        for cpu in 0..3 {
            let t = &t;
            s.spawn(move || {
                for _ in 0..300 {
                    // Everything is dirty and one CPU or another has it in hand.
                    let Ok(f) = t.alloc(order(0), Owner::Guest(cpu)) else {
                        panic!("no frame although nearly all are free");
                    };
                    t.release(f, 1, Owner::Guest(cpu)).unwrap();
                    assert!((all - 2..=all).contains(&t.free_frames()));
                }
            });
        }
        s.spawn(|| {
            for _ in 0..3000 {
                t.scrub(order(6), || true);
            }
        });
    });
    assert_eq!(t.free_frames(), all);
}

#[test]
fn a_frame_changes_owner_only_while_nobody_else_uses_it() {
    let (_, t) = table(&[0..16], &[]);
    let f = t.alloc(order(0), Owner::Guest(1)).unwrap();
    t.get_ref(f).unwrap();
    assert_eq!(t.assign(f, Owner::Guest(1), Owner::Guest(2)), Err(NotOurs));
    t.put_ref(f);
    assert_eq!(t.assign(f, Owner::Guest(9), Owner::Guest(2)), Err(NotOurs));
    t.assign(f, Owner::Guest(1), Owner::Guest(2)).unwrap();
    assert_eq!(t.owner_of(f), Some(Owner::Guest(2)));
}

#[test]
fn references_taken_and_dropped_by_many_cpus_add_up() {
    let (_, t) = table(&[0..16], &[]);
    let f = t.alloc(order(0), Owner::Guest(1)).unwrap();
    t.get_ref(f).unwrap();
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for _ in 0..1000 {
                    t.get_ref(f).unwrap();
                    t.put_ref(f);
                }
            });
        }
        s.spawn(|| t.release(f, 1, Owner::Guest(1)).unwrap());
    });
    assert_eq!((t.usage(f), t.refs(f)), (FrameUse::Limbo, 1));
    t.put_ref(f);
    assert_eq!(t.usage(f), FrameUse::Free);
}

#[derive(Clone, Debug)]
enum Op {
    Alloc(u32, u16),
    AllocBelow(u32, u64),
    Release(usize),
    Get(usize, u64),
    Put(usize),
    Scrub(u32),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0u32..11, 0u16..3).prop_map(|(o, d)| Op::Alloc(o, d)),
        1 => (0u32..6, 0u64..0x10_0200).prop_map(|(o, l)| Op::AllocBelow(o, l)),
        4 => any::<usize>().prop_map(Op::Release),
        2 => (any::<usize>(), any::<u64>()).prop_map(|(i, n)| Op::Get(i, n)),
        2 => any::<usize>().prop_map(Op::Put),
        1 => (0u32..10).prop_map(Op::Scrub),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn no_frame_has_two_owners_and_all_come_back(ops in prop::collection::vec(op(), 1..80)) {
        let ram = [0x10..0x433, 0x500..0x600, 0x10_0000..0x10_0c00];
        let (machine, t) = table(&ram, &[0x20..0x23]);
        let total = t.free_frames();
        let blocks = t.check();
        // Blocks owned; frames with extra references; what each domain's frames are filled with.
        let mut owned: Vec<(u64, u64, Owner)> = Vec::new();
        let mut refs: Vec<u64> = Vec::new();
        let mut owner: BTreeMap<u64, Owner> = BTreeMap::new();
        for o in ops {
            match o {
                Op::Alloc(o, d) => {
                    let who = if d == 0 { Owner::Galvan } else { Owner::Guest(d) };
                    if let Ok(f) = t.alloc(order(o), who) {
                        prop_assert_eq!(f.get() % (1 << o), 0);
                        for i in f.get()..f.get() + (1 << o) {
                            prop_assert!(machine.is_ram(m(i)) && !(0x20..0x23).contains(&i));
                            prop_assert!(owner.insert(i, who).is_none());
                            prop_assert!(!refs.contains(&i), "a frame in use was given out");
                            prop_assert!(machine.is_zero(m(i)), "contents leaked");
                        }
                        machine.fill(f, 0xdd);
                        owned.push((f.get(), 1 << o, who));
                    }
                }
                Op::AllocBelow(o, limit) => {
                    let who = Owner::Guest(9);
                    if let Ok(f) = t.alloc_below(order(o), who, m(limit)) {
                        prop_assert!(f.get() + (1 << o) <= limit);
                        for i in f.get()..f.get() + (1 << o) {
                            prop_assert!(owner.insert(i, who).is_none());
                        }
                        owned.push((f.get(), 1 << o, who));
                    }
                }
                Op::Release(i) if !owned.is_empty() => {
                    let (f, n, who) = owned.swap_remove(i % owned.len());
                    t.release(m(f), n, who).unwrap();
                    (f..f + n).for_each(|i| { owner.remove(&i); });
                }
                Op::Get(i, n) if !owned.is_empty() => {
                    let (f, len, _) = owned[i % owned.len()];
                    t.get_ref(m(f + n % len)).unwrap();
                    refs.push(f + n % len);
                }
                Op::Put(i) if !refs.is_empty() => {
                    let f = refs.swap_remove(i % refs.len());
                    t.put_ref(m(f));
                }
                Op::Scrub(o) => { t.scrub(order(o), || true); }
                _ => {}
            }
            t.check();
            for (f, who) in &owner {
                prop_assert_eq!(t.owner_of(m(*f)), Some(*who));
            }
            let mut used: Vec<u64> = refs.clone();
            used.extend(owner.keys());
            used.sort_unstable();
            used.dedup();
            prop_assert_eq!(t.free_frames() + used.len() as u64, total);
        }
        for f in refs {
            t.put_ref(m(f));
        }
        for (f, n, who) in owned {
            t.release(m(f), n, who).unwrap();
        }
        while t.scrub(order(9), || true) {}
        prop_assert_eq!(t.free_frames(), total);
        prop_assert_eq!(t.check(), blocks, "the blocks did not join again");
    }
}
