// EL2 on QEMU's `virt`: enters a guest at EL1 for each record, and writes down how it came out. `layout.rs` has the records
// and the parameters. Then everything that may have changed goes to the UART, byte by byte.

        .text
start:
        adr     x19, parameters
        ldr     x20, [x19]              // records
        ldr     x0, [x19, 8]
        msr     vttbr_el2, x0
        ldr     x0, [x19, 16]
        msr     vtcr_el2, x0
        mov     x0, 1                   // VM
        movk    x0, 0x8000, lsl 16      // RW
        msr     hcr_el2, x0
        movz    x0, 0x0800
        movk    x0, 0x30d0, lsl 16
        msr     sctlr_el1, x0           // no stage 1
        adr     x0, vectors
        msr     vbar_el2, x0
        adr     x21, records
next:
        cbz     x20, over
        tlbi    vmalls12e1
        dsb     ish
        isb
        ldr     x2, [x21, 8]
        ldr     x0, [x19, 24]
        add     x0, x0, x2, lsl 4
        msr     elr_el2, x0
        mov     x0, 0x3c5               // EL1h, nothing interrupts
        msr     spsr_el2, x0
        ldr     x0, [x21]
        ldr     x1, [x21, 24]
        eret

        .org    0x800
vectors:
        .org    0xc00                   // from EL1: a call, or an abort
        mrs     x3, esr_el2
        mrs     x4, hpfar_el2
        mrs     x5, far_el2
        stp     x3, x4, [x21, 32]
        stp     x5, x1, [x21, 48]
        ldr     x6, [x21, 16]
        ldr     x7, [x21, 72]
        ldr     x8, [x6]
        str     x8, [x21, 64]
        str     x7, [x6]
        add     x21, x21, 80
        sub     x20, x20, 1
        b       next

        .org    0x1000
over:
        movz    x9, 0x0900, lsl 16      // PL011
        ldp     x10, x11, [x19, 32]
        bl      send
        ldp     x10, x11, [x19, 48]
        bl      send
        movz    x0, 0x8400, lsl 16      // PSCI SYSTEM_OFF
        movk    x0, 8
        smc     0
        b       .

// From x10, x11 bytes.
send:
        cbz     x11, 2f
        ldrb    w0, [x10], 1
1:      ldr     w1, [x9, 0x18]
        tbnz    w1, 5, 1b
        str     w0, [x9]
        sub     x11, x11, 1
        b       send
2:      ret

        .org    0x4000                  // the guest: 16 bytes for each kind of access
        ldr     x1, [x0]
        hvc     0
        .org    0x4010
        str     x1, [x0]
        hvc     0
        .org    0x4020
        blr     x0
        hvc     0

        .org    0x5000
parameters:
        .org    0x10000
records:
