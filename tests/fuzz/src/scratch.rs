//! A world that is given back: a process that plays thousands of inputs cannot leak one each time.

use core::mem::ManuallyDrop;

use galvan_kernel::testing::World;

/// A [`World`] that ends with its owner. Nothing of it may be kept.
#[derive(Debug)]
pub struct Scratch(ManuallyDrop<World>);

impl Scratch {
    /// As [`World::new`].
    pub fn new(domains: u16, vcpus: u32) -> Self {
        Self(ManuallyDrop::new(World::new(domains, vcpus)))
    }

    /// The world.
    pub fn world(&self) -> &World {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the world is taken once, here.
        let World {
            machine,
            hv,
            infos,
            domains,
        } = unsafe { ManuallyDrop::take(&mut self.0) };
        let (machine, hv, console) = (
            core::ptr::from_ref(machine).cast_mut(),
            core::ptr::from_ref(hv).cast_mut(),
            core::ptr::from_ref(hv.console).cast_mut(),
        );
        let infos = core::ptr::from_ref(infos).cast_mut();
        drop(domains);
        // SAFETY: `World` made each of these by leaking a box, and gives `'static` references to them to
        // nobody but each other and to borrowers of this scratch, which are gone. The hypervisor refers to
        // the others, so it goes first.
        unsafe {
            drop(Box::from_raw(hv));
            drop(Box::from_raw(console));
            drop(Box::from_raw(infos));
            drop(Box::from_raw(machine));
        }
    }
}
