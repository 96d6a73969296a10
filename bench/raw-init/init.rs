//! The smallest useful init: one line on the console, then a reset. What a guest costs before anything of ours runs in it.
//! Built by `bench/rawQemu.ts` without a C library, so that no start-up code is measured along.
#![no_std]
#![no_main]

use core::arch::asm;

const MARKER: &[u8] = b"raw-init: up\n";

const WRITE: usize = 1;
const IOCTL: usize = 16;
const REBOOT: usize = 169;

/// With argument 1: wait until the terminal has sent everything (tcdrain).
const TCSBRK: usize = 0x5409;
const REBOOT_MAGIC: (usize, usize) = (0xfee1_dead, 0x2812_1969);
const REBOOT_RESTART: usize = 0x0123_4567;

#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    syscall(WRITE, 1, MARKER.as_ptr() as usize, MARKER.len());
    syscall(IOCTL, 1, TCSBRK, 1);
    syscall(REBOOT, REBOOT_MAGIC.0, REBOOT_MAGIC.1, REBOOT_RESTART);
    loop {
        core::hint::spin_loop();
    }
}

fn syscall(number: usize, a: usize, b: usize, c: usize) {
    // SAFETY: the three calls made above read `MARKER`, which is static, and write no memory of this process.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number => _,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
