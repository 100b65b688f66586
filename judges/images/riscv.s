# M-mode on QEMU's `virt`: enters a guest in VS-mode for each record, and writes down how it came out. `layout.rs` has the
# records and the parameters. Then everything that may have changed goes to the UART, byte by byte.

        .option norelax
        .option norvc
        .text
start:
        lla     s0, parameters
        ld      s1, 0(s0)               # records
        li      t0, -1
        csrw    pmpaddr0, t0
        li      t0, 0x1f
        csrw    pmpcfg0, t0             # the guest may reach all memory, as far as PMP goes
        ld      t0, 8(s0)
        csrw    0x680, t0               # hgatp
        ld      t0, 16(s0)
        csrw    0x30a, t0               # menvcfg
        lla     t0, trap
        csrw    mtvec, t0
        lla     s2, records
next:
        beqz    s1, over
        .word   0x62000073              # hfence.gvma
        ld      t0, 8(s2)
        slli    t0, t0, 4
        ld      t1, 24(s0)
        add     t0, t0, t1
        csrw    mepc, t0
        li      t0, 0x8000001800        # MPV, MPP
        csrc    mstatus, t0
        li      t0, 0x8000000800        # VS
        csrs    mstatus, t0
        ld      a0, 0(s2)
        ld      a1, 24(s2)
        mret

        .balign 4
trap:
        csrr    t0, mcause
        sd      t0, 32(s2)
        csrr    t0, 0x34b               # mtval2
        sd      t0, 40(s2)
        csrr    t0, mtval
        sd      t0, 48(s2)
        sd      a1, 56(s2)
        ld      t0, 16(s2)
        ld      t1, 72(s2)
        ld      t2, 0(t0)
        sd      t2, 64(s2)
        sd      t1, 0(t0)
        addi    s2, s2, 80
        addi    s1, s1, -1
        j       next

over:
        li      s3, 0x10000000          # 16550
        ld      a0, 32(s0)
        ld      a1, 40(s0)
        call    send
        ld      a0, 48(s0)
        ld      a1, 56(s0)
        call    send
        li      t0, 0x100000            # the machine's switch
        li      t1, 0x5555
        sw      t1, 0(t0)
        j       .

# From a0, a1 bytes.
send:
        beqz    a1, 2f
        lbu     t0, 0(a0)
1:      lbu     t1, 5(s3)
        andi    t1, t1, 0x20
        beqz    t1, 1b
        sb      t0, 0(s3)
        addi    a0, a0, 1
        addi    a1, a1, -1
        j       send
2:      ret

        .org    0x4000                  # the guest: 16 bytes for each kind of access
        ld      a1, 0(a0)
        ecall
        .org    0x4010
        sd      a1, 0(a0)
        ecall
        .org    0x4020
        jalr    a0
        ecall

        .org    0x5000
parameters:
        .org    0x10000
records:
