//! Guest memory as hypercalls and emulation reach it: by virtual address through the guest's own
//! page tables, or by guest physical address, always by copying.
//!
//! Nothing here hands out a reference into guest memory, so that a value is fetched once and then
//! checked (design rule 2). Accessed and dirty bits are set as the processor would.
//! (AMD APM "Page Translation and Protection"; Intel SDM "Paging".)

use alloc::sync::Arc;

use galvan_base::direct::KnownPage;
use galvan_base::hw::PagingMode;
use galvan_base::{Gfn, Gpa, Mpa, PAGE_SIZE};
use galvan_dom0_proto::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::domain::Domain;
use crate::hv::Hv;
use crate::p2m::{P2mError, P2mType, Page, Want};
use crate::vcpu::{Vcpu, VcpuState};
use crate::walk_cache::{Query, Spot, Trail};

/// Everything an exit or hypercall handler works on: the vCPU that is being served.
#[derive(Debug)]
pub struct Cx<'a> {
    /// The hypervisor.
    pub hv: Hv,
    /// The domain.
    pub dom: &'a Arc<Domain>,
    /// The vCPU.
    pub vcpu: &'a Arc<Vcpu>,
    /// Its state, owned while it is served.
    pub st: &'a mut VcpuState,
}

/// Why a guest virtual address could not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkFault {
    /// The guest's tables do not map it so: the #PF error code's P bit.
    PageFault {
        /// A translation is present but forbids the access.
        present: bool,
    },
    /// Not a canonical address.
    NotCanonical,
    /// A page table or the page itself is not guest RAM; the address that is not.
    NotRam(Gpa),
}

impl From<WalkFault> for Errno {
    fn from(_: WalkFault) -> Errno {
        Errno::EFAULT
    }
}

bitflags::bitflags! {
    /// What an access is, for the checks of the page walk.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Access: u8 {
        /// It writes.
        const WRITE = 1;
        /// It fetches an instruction.
        const FETCH = 2;
        /// It is made with user rights.
        const USER = 4;
        /// Pages that users may use are forbidden (SMAP, SMEP).
        const NO_USER_PAGES = 8;
        /// Read-only pages may be written (CR0.WP is clear and the access is no user's).
        const IGNORE_READ_ONLY = 16;
        /// Pages that may not be executed are known (EFER.NXE).
        const NX = 32;
    }
}

const PTE_P: u64 = 1;
const PTE_W: u64 = 1 << 1;
const PTE_U: u64 = 1 << 2;
const PTE_A: u64 = 1 << 5;
const PTE_D: u64 = 1 << 6;
const PTE_PS: u64 = 1 << 7;
const PTE_NX: u64 = 1 << 63;
const PTE_ADDR: u64 = 0x000f_ffff_ffff_f000;

impl Cx<'_> {
    /// Translates a guest virtual address for a supervisor access; user pages are allowed, as
    /// hypercall buffers of the tools are. Sets accessed and dirty bits.
    pub fn translate(&self, gva: u64, write: bool) -> Result<Gpa, WalkFault> {
        self.translate_as(
            gva,
            if write {
                Access::WRITE
            } else {
                Access::empty()
            },
        )
    }

    /// Translates a guest virtual address for an access of this kind. Sets accessed and dirty bits.
    pub fn translate_as(&self, gva: u64, a: Access) -> Result<Gpa, WalkFault> {
        let q = self.query(gva, a);
        match self.st.walks.address(self.hv.hw, &self.dom.p2m, &q) {
            Some(gpa) => Ok(gpa),
            None => self.look_up(&q),
        }
    }

    #[inline]
    fn query(&self, gva: u64, access: Access) -> Query {
        let (mode, cr3) = self.st.hw.paging();
        let gva = if mode == PagingMode::Long {
            gva
        } else {
            gva & 0xffff_ffff
        };
        Query {
            gva,
            cr3,
            mode,
            access,
        }
    }

    /// The page at a guest virtual address, held for an access that the hypervisor makes on behalf of
    /// the guest's supervisor, and the guest physical address.
    pub(crate) fn reach(&self, gva: u64, want: Want) -> Result<(Gpa, Page), WalkFault> {
        let access = match want {
            Want::Read => Access::empty(),
            Want::Write => Access::WRITE,
        };
        self.reach_as(gva, access, want)
    }

    /// Reads bytes that lie in one page, for an access of this kind.
    pub(crate) fn read_as(&self, gva: u64, a: Access, buf: &mut [u8]) -> Result<(), WalkFault> {
        let hw = self.hv.hw;
        if self.at_once(gva, buf.len(), a, |page, off| page.read(hw, off, buf)) == Some(Ok(())) {
            return Ok(());
        }
        let (gpa, page) = self.reach_as(gva, a, Want::Read)?;
        hw.read(page.mfn(), gpa.offset(), buf)
            .map_err(|_| WalkFault::NotRam(gpa))
    }

    fn reach_as(&self, gva: u64, access: Access, want: Want) -> Result<(Gpa, Page), WalkFault> {
        let q = self.query(gva, access);
        if let Some((gpa, page)) = self.st.walks.page(self.hv.hw, &self.dom.p2m, &q) {
            return Ok((gpa, Page::of_ram(page)));
        }
        let gpa = self.look_up(&q)?;
        let page = self
            .dom
            .p2m
            .get_page(gpa.frame(), want)
            .map_err(|_| WalkFault::NotRam(gpa))?;
        if page.ty() == P2mType::Ram {
            self.st.walks.keep_frame(&q, gpa, page.mfn());
        }
        Ok((gpa, page))
    }

    /// Walks the guest's tables, and remembers the way.
    fn look_up(&self, q: &Query) -> Result<Gpa, WalkFault> {
        let &Query { gva, cr3, mode, .. } = q;
        let mut trail = Trail::new(
            &self.dom.p2m,
            matches!(mode, PagingMode::Long | PagingMode::Pae),
        );
        let gpa = match mode {
            PagingMode::Off => return Ok(Gpa::new_truncate(gva)),
            PagingMode::Long => {
                if (gva as i64) << 16 >> 16 != gva as i64 {
                    return Err(WalkFault::NotCanonical);
                }
                self.walk(cr3 & PTE_ADDR, &LONG, q, &mut trail)
            }
            PagingMode::Pae => {
                // The four PDPTEs have neither W nor A (Intel SDM "PAE Paging").
                let pdpte_at = (cr3 & 0xffff_ffe0) + ((gva >> 30) & 3) * 8;
                let (pdpte, at, plain) = self.load(pdpte_at, 8, &mut trail)?;
                if pdpte & PTE_P == 0 {
                    return Err(WalkFault::PageFault { present: false });
                }
                trail.step(at, pdpte, plain);
                self.walk(pdpte & PTE_ADDR, &PAE, q, &mut trail)
            }
            PagingMode::LegacyPse => self.walk(cr3 & 0xffff_f000, &LEGACY_PSE, q, &mut trail),
            PagingMode::Legacy => self.walk(cr3 & 0xffff_f000, &LEGACY, q, &mut trail),
        }?;
        self.st.walks.keep(&self.dom.p2m, q, &trail, gpa);
        Ok(gpa)
    }

    fn walk(
        &self,
        mut table: u64,
        mode: &Mode,
        q: &Query,
        trail: &mut Trail,
    ) -> Result<Gpa, WalkFault> {
        let &Query { gva, access, .. } = q;
        let write = access.contains(Access::WRITE);
        let mut user_page = true;
        for (i, level) in mode.levels.iter().enumerate() {
            let index = (gva >> level.shift) & level.mask;
            let at = table + index * mode.entry;
            let (pte, entry_at, plain) = self.load(at, mode.entry, trail)?;
            if pte & PTE_P == 0 {
                return Err(WalkFault::PageFault { present: false });
            }
            user_page &= pte & PTE_U != 0;
            let last = i + 1 == mode.levels.len();
            let leaf = last || (level.superpage && pte & PTE_PS != 0);
            let read_only = pte & PTE_W == 0 && !access.contains(Access::IGNORE_READ_ONLY);
            let not_executable =
                mode.entry == 8 && pte & PTE_NX != 0 && access.contains(Access::NX);
            if write && read_only
                || access.contains(Access::USER) && !user_page
                || access.contains(Access::NO_USER_PAGES) && leaf && user_page
                || access.contains(Access::FETCH) && not_executable
            {
                return Err(WalkFault::PageFault { present: true });
            }
            let want = if leaf && write { PTE_A | PTE_D } else { PTE_A };
            if pte & want != want {
                self.set_bits(at, want)?;
            }
            trail.step(entry_at, pte | want, plain);
            if !leaf {
                table = if mode.entry == 8 {
                    pte & PTE_ADDR
                } else {
                    pte & 0xffff_f000
                };
                continue;
            }
            let size = 1u64 << level.shift;
            let base = if mode.entry == 8 {
                pte & PTE_ADDR & !(size - 1)
            } else if last {
                pte & 0xffff_f000
            } else {
                // PSE-36: bits 13-20 of a 4 MiB entry are address bits 32-39.
                (pte & 0xffc0_0000) | ((pte >> 13) & 0xff) << 32
            };
            return Ok(Gpa::new_truncate(base | gva & (size - 1)));
        }
        Err(WalkFault::PageFault { present: false })
    }

    /// An entry, where in the machine's memory it is, and whether that is ordinary RAM.
    fn load(&self, gpa: u64, size: u64, trail: &mut Trail) -> Result<(u64, Mpa, bool), WalkFault> {
        let a = Gpa::new_truncate(gpa);
        trail.table(&self.dom.p2m, a.frame());
        let page = self
            .dom
            .p2m
            .get_page(a.frame(), Want::Read)
            .map_err(|_| WalkFault::NotRam(a))?;
        let r = if size == 8 {
            self.hv.hw.load_u64(page.mfn(), a.offset())
        } else {
            self.hv.hw.load_u32(page.mfn(), a.offset()).map(u64::from)
        };
        let at = Mpa::new_truncate(page.mfn().addr().get() + a.offset() as u64);
        let plain = page.ty() == P2mType::Ram;
        r.map(|v| (v, at, plain)).map_err(|_| WalkFault::NotRam(a))
    }

    fn set_bits(&self, gpa: u64, bits: u64) -> Result<(), WalkFault> {
        let a = Gpa::new_truncate(gpa);
        let page = self
            .dom
            .p2m
            .get_page(a.frame(), Want::Write)
            .map_err(|_| WalkFault::NotRam(a))?;
        self.hv
            .hw
            .or_u32(page.mfn(), a.offset(), bits as u32)
            .map_err(|_| WalkFault::NotRam(a))?;
        written(self.hv, self.dom, a.frame(), page);
        Ok(())
    }

    /// Copies from guest virtual memory.
    pub fn read_bytes(&self, mut gva: u64, mut buf: &mut [u8]) -> Result<(), WalkFault> {
        while !buf.is_empty() {
            let (gpa, page) = self.reach(gva, Want::Read)?;
            let n = buf.len().min(PAGE_SIZE - gpa.offset());
            let (now, rest) = buf.split_at_mut(n);
            let r = self.hv.hw.read(page.mfn(), gpa.offset(), now);
            r.map_err(|_| WalkFault::NotRam(gpa))?;
            gva = gva.wrapping_add(n as u64);
            buf = rest;
        }
        Ok(())
    }

    /// Copies into guest virtual memory.
    pub fn write_bytes(&self, mut gva: u64, mut buf: &[u8]) -> Result<(), WalkFault> {
        while !buf.is_empty() {
            let (gpa, page) = self.reach(gva, Want::Write)?;
            let n = buf.len().min(PAGE_SIZE - gpa.offset());
            let (now, rest) = buf.split_at(n);
            let r = self.hv.hw.write(page.mfn(), gpa.offset(), now);
            r.map_err(|_| WalkFault::NotRam(gpa))?;
            written(self.hv, self.dom, gpa.frame(), page);
            gva = gva.wrapping_add(n as u64);
            buf = rest;
        }
        Ok(())
    }

    /// Reads one value.
    #[inline]
    pub fn get<T: FromBytes + IntoBytes>(&self, gva: u64) -> Result<T, Errno> {
        let mut v = T::new_zeroed();
        if !self.read_at_once(gva, v.as_mut_bytes(), Access::empty()) {
            self.read_bytes(gva, v.as_mut_bytes())?;
        }
        Ok(v)
    }

    /// Reads one value that is to be [put back](Cx::put_back) changed, if it is known where it is.
    #[inline]
    pub(crate) fn get_to_change<T: FromBytes + IntoBytes>(&self, gva: u64) -> Option<(T, Spot)> {
        let len = size_of::<T>();
        if gva as usize % PAGE_SIZE > PAGE_SIZE - len.min(PAGE_SIZE) {
            return None;
        }
        let mut v = T::new_zeroed();
        let q = self.query(gva, Access::WRITE);
        let walks = &self.st.walks;
        walks
            .read(self.hv.hw, &self.dom.p2m, &q, v.as_mut_bytes())
            .then_some(())?;
        Some((v, walks.spot(&q)?))
    }

    /// Writes a value of [`Cx::get_to_change`] back to where it was read.
    #[inline]
    pub(crate) fn put_back<T: IntoBytes + Immutable>(
        &self,
        gva: u64,
        spot: &Spot,
        v: &T,
    ) -> Result<(), Errno> {
        if !spot.write(self.hv.hw, &self.dom.p2m, v.as_bytes()) {
            // The page is another by now, or has become one whose writes are noticed.
            return self.put(gva, v);
        }
        Ok(())
    }

    /// Reads a number if it is known where it is, in line.
    #[inline(always)]
    pub(crate) fn get_known(&self, gva: u64) -> Option<u32> {
        let mut b = [0; 4];
        self.read_at_once(gva, &mut b, Access::empty())
            .then(|| u32::from_ne_bytes(b))
    }

    /// Reads bytes if it is known where they are and they lie in one page of ordinary RAM; see
    /// `WalkCache::read`.
    #[inline(always)]
    fn read_at_once(&self, gva: u64, buf: &mut [u8], a: Access) -> bool {
        if gva as usize % PAGE_SIZE > PAGE_SIZE - buf.len().min(PAGE_SIZE) {
            return false;
        }
        let q = self.query(gva, a);
        self.st.walks.read(self.hv.hw, &self.dom.p2m, &q, buf)
    }

    /// Calls `f` with the page and offset of so many bytes at a guest virtual address, if it is known
    /// where that leads and they lie in one page of ordinary RAM; see `WalkCache::with`.
    #[inline(always)]
    fn at_once<R>(
        &self,
        gva: u64,
        len: usize,
        a: Access,
        f: impl FnOnce(KnownPage, usize) -> R,
    ) -> Option<R> {
        if gva as usize % PAGE_SIZE > PAGE_SIZE - len.min(PAGE_SIZE) {
            return None;
        }
        let q = self.query(gva, a);
        self.st.walks.with(self.hv.hw, &self.dom.p2m, &q, f)
    }

    /// Writes one value.
    #[inline]
    pub fn put<T: IntoBytes + Immutable>(&self, gva: u64, v: &T) -> Result<(), Errno> {
        let hw = self.hv.hw;
        let written = self.at_once(gva, size_of::<T>(), Access::WRITE, |page, off| {
            page.write(hw, off, v.as_bytes())
        });
        if written != Some(Ok(())) {
            self.write_bytes(gva, v.as_bytes())?;
        }
        Ok(())
    }

    /// Reads element `i` of an array; EFAULT if its address wraps.
    pub fn get_at<T: FromBytes + IntoBytes>(&self, base: u64, i: u64) -> Result<T, Errno> {
        self.get(element(base, i, size_of::<T>())?)
    }

    /// Writes element `i` of an array; EFAULT if its address wraps.
    pub fn put_at<T: IntoBytes + Immutable>(&self, base: u64, i: u64, v: &T) -> Result<(), Errno> {
        self.put(element(base, i, size_of::<T>())?, v)
    }
}

fn element(base: u64, i: u64, size: usize) -> Result<u64, Errno> {
    i.checked_mul(size as u64)
        .and_then(|o| base.checked_add(o))
        .ok_or(Errno::EFAULT)
}

/// One level of a guest page-table walk.
struct Level {
    shift: u32,
    mask: u64,
    superpage: bool,
}

/// A paging mode.
struct Mode {
    entry: u64,
    levels: &'static [Level],
}

const fn level(shift: u32, bits: u32, superpage: bool) -> Level {
    Level {
        shift,
        mask: (1 << bits) - 1,
        superpage,
    }
}

static LONG: Mode = Mode {
    entry: 8,
    levels: &[
        level(39, 9, false),
        level(30, 9, true),
        level(21, 9, true),
        level(12, 9, false),
    ],
};
static PAE: Mode = Mode {
    entry: 8,
    levels: &[level(21, 9, true), level(12, 9, false)],
};
static LEGACY: Mode = Mode {
    entry: 4,
    levels: &[level(22, 10, false), level(12, 10, false)],
};
static LEGACY_PSE: Mode = Mode {
    entry: 4,
    levels: &[level(22, 10, true), level(12, 10, false)],
};

/// Copies out of a domain's RAM by guest physical address, within one page or across several.
pub fn read_gpa(hv: Hv, d: &Domain, mut gpa: Gpa, mut buf: &mut [u8]) -> Result<(), Errno> {
    while !buf.is_empty() {
        let n = buf.len().min(PAGE_SIZE - gpa.offset());
        let (now, rest) = buf.split_at_mut(n);
        let page = d
            .p2m
            .get_page(gpa.frame(), Want::Read)
            .map_err(|_| Errno::EFAULT)?;
        hv.hw
            .read(page.mfn(), gpa.offset(), now)
            .map_err(|_| Errno::EFAULT)?;
        buf = rest;
        if !buf.is_empty() {
            gpa = gpa.checked_add(n as u64).ok_or(Errno::EFAULT)?;
        }
    }
    Ok(())
}

/// Copies into a domain's RAM by guest physical address, within one page or across several.
pub fn write_gpa(hv: Hv, d: &Domain, mut gpa: Gpa, mut buf: &[u8]) -> Result<(), Errno> {
    while !buf.is_empty() {
        let n = buf.len().min(PAGE_SIZE - gpa.offset());
        let (now, rest) = buf.split_at(n);
        let page = d
            .p2m
            .get_page(gpa.frame(), Want::Write)
            .map_err(|_| Errno::EFAULT)?;
        hv.hw
            .write(page.mfn(), gpa.offset(), now)
            .map_err(|_| Errno::EFAULT)?;
        written(hv, d, gpa.frame(), page);
        buf = rest;
        if !buf.is_empty() {
            gpa = gpa.checked_add(n as u64).ok_or(Errno::EFAULT)?;
        }
    }
    Ok(())
}

/// A page was written on the guest's behalf: if writes to it are to be noticed, this is one.
#[inline(always)]
pub(crate) fn written(hv: Hv, d: &Domain, g: Gfn, page: Page) {
    if page.is_logged() {
        drop(page);
        noticed(hv, d, g);
    }
}

#[cold]
fn noticed(hv: Hv, d: &Domain, g: Gfn) {
    if note_write(hv, d, g).is_err() {
        log::warn!("d{}: a write to {g:?} was not noticed", d.id);
    }
}

/// A page of the guest whose writes are to be noticed is, or is to be, written: it counts as dirty
/// from here on and can be written. Nothing happens to others.
pub(crate) fn note_write(hv: Hv, d: &Domain, g: Gfn) -> Result<(), P2mError> {
    let mut c = d.p2m.changes();
    let r = c.retype_one(g, P2mType::LogDirty, P2mType::Ram);
    d.finish(hv, c);
    r.map(|_| ())
}

/// The guest frame of a number from a guest; EINVAL beyond the address space.
pub fn gfn(n: u64) -> Result<Gfn, Errno> {
    Gfn::new(n).ok_or(Errno::EINVAL)
}
