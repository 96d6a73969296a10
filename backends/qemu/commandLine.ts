import type { Accelerator, MachineSpec } from "../../src/domain/Vm.ts"

/** The full binary, for it has TCG; Debian's `-microvm` build has KVM only. */
export const defaultBinary = "qemu-system-x86_64"

/** The machine: no firmware tables, no legacy timer or interrupt controller; a clock and a serial port (lab/qemu.md §2). */
export const machine = "microvm,acpi=off,pit=off,pic=off,rtc=on,isa-serial=on,x-option-roms=off"

/** Nothing that is not asked for, and a reset ends QEMU. */
export const bare = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"] as const

/** The serial port's other end is the shim's. */
export const serialConsole = (fd: number) =>
  ["-chardev", `socket,id=console,fd=${fd}`, "-serial", "chardev:console"] as const

/** Descriptors QEMU inherits from the shim: the guest channel and the console, each one end of a socketpair. */
export const channelFd = 3
export const consoleFd = 4

/**
 * TCG advertises fast `rep movsb` and emulates it byte by byte: without ERMS the guest kernel copies in words, and a command's output
 * costs 850 instead of 2000 ms of CPU for 100 MB (measured).
 */
const cpu: Record<Accelerator, string> = { kvm: "host", tcg: "max,-erms" }

/** The port the guest's agent looks for (docs/protocol.md §1). */
const channelName = "machinen.channel"

/** In QEMU's option syntax a comma separates; a literal one is doubled. */
const escape = (value: string) => value.replaceAll(",", ",,")

/**
 * What the guest kernel is told. The second group is for TCG only and measured in lab/kernel.md §4: without it the kernel spends some
 * 400 ms of its boot calibrating timers against emulated hardware and patching code that TCG has translated already.
 */
export const kernelArguments = (accel: Accelerator, tscKhz: number): string =>
  [
    "console=ttyS0",
    "reboot=t", // a triple fault ends QEMU (-no-reboot): without ACPI that is the power-off
    "panic=-1",
    "quiet",
    "acpi=off",
    "noreplace-smp",
    "no_timer_check",
    // Mounting waits for RCU grace periods, which otherwise last jiffies: 25 ms of every boot (measured).
    "rcupdate.rcu_expedited=1",
    ...(accel === "tcg"
      ? [
          "no_init_poison",
          `tsc_early_khz=${tscKhz}`,
          "tsc=reliable",
          `lpj=${tscKhz * 10}`, // tsc_khz * 1000 / HZ with HZ = 100
          "lapic_timer_khz=1000000" // QEMU's APIC timer runs at 1 GHz
        ]
      : [])
  ].join(" ")

/**
 * Guest memory in a memfd: shared memory with a name below /proc/<pid>/fd, so that a snapshot can take it, but in no file system. The same
 * in a file on ext4 costs 300 ms of a boot in page faults (measured), and disk writes for as long as the VM runs.
 */
const memory = ({ memoryMib }: MachineSpec) => `memory-backend-memfd,id=mem,size=${memoryMib}M,share=on`

export interface CommandLineOptions {
  readonly binary: string
  readonly accel: Accelerator
  readonly tscKhz: number
  readonly controlPath: string
}

/**
 * QEMU's command line for a machine (measured in lab/qemu.md §2): microvm without firmware tables, PVH kernel, guest memory in a memfd,
 * nothing by default, QEMU itself confined by its seccomp sandbox. No entropy device: both CPU models have RDRAND, which seeds the guest
 * before its first process.
 */
export const commandLine = (
  spec: MachineSpec,
  options: CommandLineOptions
): readonly [string, ...ReadonlyArray<string>] => {
  const { accel, binary, controlPath, tscKhz } = options
  return [
    binary,
    ...["-M", `${machine},memory-backend=mem`],
    ...["-accel", accel, "-cpu", cpu[accel]],
    ...["-m", `${spec.memoryMib}M`, "-smp", String(spec.vcpus), "-object", memory(spec)],
    ...bare,
    ...["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    ...["-global", "virtio-mmio.force-legacy=false"],
    ...["-kernel", spec.kernel, "-initrd", spec.initrd, "-append", kernelArguments(accel, tscKhz)],
    ...["-chardev", `socket,id=qmp,path=${escape(controlPath)},server=on,wait=off`, "-mon", "chardev=qmp,mode=control"],
    ...serialConsole(consoleFd),
    ...["-device", "virtio-serial-device", "-chardev", `socket,id=channel,fd=${channelFd}`],
    ...["-device", `virtserialport,chardev=channel,name=${channelName}`],
    ...spec.disks.flatMap(({ id, path, readOnly }) => [
      "-blockdev",
      `driver=file,node-name=${id}-file,filename=${escape(path)},read-only=${onOff(readOnly)},discard=unmap,locking=off`,
      "-blockdev",
      `driver=raw,node-name=${id},file=${id}-file,read-only=${onOff(readOnly)},discard=unmap`,
      "-device",
      // a host without space is an I/O error in the guest; QEMU would stop the machine, and nobody would start it again
      `virtio-blk-device,drive=${id},serial=${id},werror=report,rerror=report`
    ])
  ]
}

const onOff = (value: boolean) => (value ? "on" : "off")
