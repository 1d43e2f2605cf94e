//! Descriptor tables: GDT, TSS and IDT, and the PAT.
//!
//! The IDT is one for all CPUs. #DF, NMI and #MC run on stacks of their own (AMD APM "Interrupt
//! Stack Table"): they can come while the stack is unusable or in the middle of anything.

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::segmentation::SegmentSelector;
use x86_64::structures::gdt::Descriptor;

use crate::percpu::PerCpu;

/// One entry of the IDT (AMD APM "Long-Mode Interrupt-Gate").
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    low: u16,
    selector: u16,
    ist: u8,
    kind: u8,
    mid: u16,
    high: u32,
    zero: u32,
}

#[repr(C, align(16))]
struct Idt([Gate; 256]);

static IDT: Once<Idt> = Once::new();

/// IST index (from 1) of double faults.
const IST_DF: u8 = 1;
/// IST index of NMIs.
const IST_NMI: u8 = 2;
/// IST index of machine checks.
const IST_MC: u8 = 3;

/// Gives this CPU its descriptor tables. It must run on its own page table.
pub fn init() {
    // SAFETY: during start-up of this CPU nothing else refers to its area's descriptor tables; they
    // are not moved or written after this.
    let me: &'static mut PerCpu = unsafe { &mut *(crate::paging::PERCPU_BASE as *mut PerCpu) };
    let mut stacks = me.tss.interrupt_stack_table;
    for (i, slot) in stacks.iter_mut().take(3).enumerate() {
        *slot = VirtAddr::new(crate::percpu::ist_top(i));
    }
    me.tss.interrupt_stack_table = stacks;
    let code = me.gdt.append(Descriptor::kernel_code_segment());
    let data = me.gdt.append(Descriptor::kernel_data_segment());
    // SAFETY: the TSS stays where it is for ever.
    let tss = me
        .gdt
        .append(unsafe { Descriptor::tss_segment_unchecked(&raw const me.tss) });
    // SAFETY: the table holds valid descriptors and lives for ever.
    unsafe {
        me.gdt.load_unsafe();
        CS::set_reg(code);
        SS::set_reg(data);
        DS::set_reg(SegmentSelector::NULL);
        ES::set_reg(SegmentSelector::NULL);
        load_tss(tss);
    }
    let idt = IDT.call_once(|| {
        let mut t = Idt([Gate {
            low: 0,
            selector: 0,
            ist: 0,
            kind: 0,
            mid: 0,
            high: 0,
            zero: 0,
        }; 256]);
        for (vector, gate) in t.0.iter_mut().enumerate() {
            let at = crate::traps::stub_address(vector);
            let ist = match vector {
                8 => IST_DF,
                2 => IST_NMI,
                18 => IST_MC,
                _ => 0,
            };
            *gate = Gate {
                low: at as u16,
                selector: code.0,
                ist,
                kind: 0x8e,
                mid: (at >> 16) as u16,
                high: (at >> 32) as u32,
                zero: 0,
            };
        }
        t
    });
    let pointer = x86_64::structures::DescriptorTablePointer {
        limit: (size_of::<Idt>() - 1) as u16,
        base: VirtAddr::from_ptr(idt),
    };
    // SAFETY: the table lives for ever and its gates lead to the stubs.
    unsafe { x86_64::instructions::tables::lidt(&pointer) };
}

/// Sets the PAT to WB, WC, UC-, UC, and the same again: index 1 (PWT) is write-combining.
pub fn init_pat() {
    const IA32_PAT: u32 = 0x277;
    // SAFETY: no mapping with PWT alone exists before this but frame buffers', for which both
    // types are right.
    unsafe { crate::cpu::wrmsr(IA32_PAT, 0x0007_0106_0007_0106) };
}
