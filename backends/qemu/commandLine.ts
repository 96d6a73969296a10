import type { Accelerator, DeviceSet, MachineSpec } from "../../src/machine/MachineSpec.ts"

/** The full binary, because it has TCG: Debian's `-microvm` build has KVM only. */
export const defaultBinary = "qemu-system-x86_64"

/** The machine type: without firmware tables, legacy timer and interrupt controller, with a clock and a serial port. */
export const machine = "microvm,acpi=off,pit=off,pic=off,rtc=on,isa-serial=on,x-option-roms=off"

/**
 * Keeps the guest's memory out of QEMU's core files, and out of KSM, whose timing would tell other guests what the memory holds. Not part of
 * `machine`, because a guest does not see it: a bundle that was made without it can be restored with it.
 */
const kept = "dump-guest-core=off,mem-merge=off"

/** Turns default devices and user configuration off, and lets a reset end QEMU. */
export const bare = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"] as const

/** Connects the serial port to a descriptor, whose other end the shim holds. */
export const serialConsole = (fd: number) =>
  ["-chardev", `socket,id=console,fd=${fd}`, "-serial", "chardev:console"] as const

/**
 * Descriptors that QEMU inherits from the shim: channel and console (each one end of a socketpair), memory, a saved machine's state, the
 * listener of the network card's other end, and one end of a socketpair with the server of shared directories.
 */
export const channelFd = 3
export const consoleFd = 4
export const memoryFd = 5
export const stateFd = 6
export const netFd = 7
export const shareFd = 8

/**
 * Register state that the CPU has and the guest kernel does not use (MPX, protection keys) or gives to processes on request only (AMX). CRIU
 * reserves room for all of it, by CPUID. The kernel finds that too long, and the processes of a dump go on with AVX registers half zero
 * (measured; arch/x86/kernel/fpu/signal.c, check_xstate_in_sigframe).
 */
const unusedState = "-mpx,-pku,-amx-tile"

/**
 * The CPU model. TCG advertises fast `rep movsb` (ERMS) and emulates it byte by byte. Without ERMS the guest kernel copies in words, and 100 MB of
 * a command's output take 850 ms of CPU instead of 2000 (measured).
 */
export const cpu: Record<Accelerator, string> = {
  kvm: `host,${unusedState}`,
  tcg: `max,-erms,${unusedState}`
}

/**
 * MiB of translated code that TCG keeps; when they are full, TCG drops all of it. QEMU's default is up to 1 GiB, of which a busy guest fills
 * 854 MiB in half an hour. A debian guest has used less than 128 MiB after booting and starting Python. In a minute of starting one program after
 * the other it fills 128 MiB twice and 64 MiB six times, with 159 and 88 MiB of QEMU's own memory instead of 278 (measured). The guest does not
 * see the value, so it is not part of the fingerprint.
 */
const translated = 128

/**
 * The accelerator's options. TCG's default is a thread for each vCPU. QEMU 7.2 then misses that one vCPU writes code while another translates
 * it, because it looks for code in a page only once that page was translated; and a kernel keeps patching its branches. One boot in 80 with two
 * vCPUs on a busy host hung, or panicked on a breakpoint that was gone (measured). In a single thread the vCPUs take turns.
 */
const accelerator = (accel: Accelerator, vcpus: number) =>
  accel === "tcg" ? `tcg,tb-size=${translated}${vcpus > 1 ? ",thread=single" : ""}` : accel

/** The names of the virtio-serial ports that the guest's agent opens (docs/protocol.md §1). */
const channelName = "machinen.channel"
const shareName = "machinen.share"

/** Escapes a value in QEMU's option syntax, where a literal comma is doubled. */
const escape = (value: string) => value.replaceAll(",", ",,")

/**
 * The guest kernel's command line. The second group is for TCG only: without it the kernel spends some 400 ms of its boot (measured) on
 * calibrating timers against emulated hardware and on patching code that TCG has translated already.
 */
export const kernelArguments = (accel: Accelerator, tscKhz: number): string =>
  [
    "console=ttyS0",
    "reboot=t", // reset by a triple fault, which ends QEMU (-no-reboot): without ACPI this is the power-off
    "panic=-1",
    "quiet",
    "acpi=off",
    "noreplace-smp",
    "dummy.numdummies=0", // without a network device dummy0, which the driver makes by default
    "no_timer_check",
    // Mounts wait for RCU grace periods, which without this last whole jiffies: 25 ms of every boot (measured).
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
 * The guest's memory, which the shim opens: a shared memfd, so that the shim can copy it for a snapshot; or a bundle's memory file, mapped
 * privately, so that any number of machines can start from it. Not a file of the VM's own: on ext4 that costs 300 ms of page faults in a boot
 * (measured), and disk writes for as long as the VM runs.
 */
const memory = ({ memoryMib, start }: MachineSpec) =>
  `memory-backend-file,id=mem,size=${memoryMib}M,mem-path=/proc/self/fd/${memoryFd},share=${onOff(start._tag === "Kernel")}`

/**
 * The kernel to load, or the state to continue from. The state was written by `xen-save-devices-state` (QMP reference): all devices, no memory,
 * and without the configuration section at the beginning of a migration stream.
 */
const begin = ({ start }: MachineSpec, accel: Accelerator, tscKhz: number): ReadonlyArray<string> =>
  start._tag === "Kernel"
    ? ["-kernel", start.kernel, "-initrd", start.initrd, "-append", kernelArguments(accel, tscKhz)]
    : [
        ...["-global", "migration.send-configuration=off"],
        // QEMU would announce the guest's card to network switches; there are none behind it
        ...["-global", "migration.announce-rounds=0"],
        ...["-incoming", `fd:${stateFd}`]
      ]

/** What a command line needs beside the machine. `tscKhz`: rate of the host's TSC, 0 under KVM. */
export interface CommandLineOptions {
  readonly binary: string
  readonly accel: Accelerator
  readonly tscKhz: number
  readonly controlPath: string
}

/**
 * QEMU's command line for a machine: microvm without firmware tables, PVH kernel, guest memory in a memfd, no default devices, QEMU confined by
 * its seccomp sandbox. No entropy device is needed: both CPU models have RDRAND, which seeds the guest before its first process.
 */
export const commandLine = (
  spec: MachineSpec,
  options: CommandLineOptions
): readonly [string, ...ReadonlyArray<string>] => {
  const { accel, binary, controlPath, tscKhz } = options
  return [
    binary,
    ...["-M", `${machine},memory-backend=mem,${kept}`],
    ...["-accel", accelerator(accel, spec.vcpus), "-cpu", cpu[accel]],
    ...["-m", `${spec.memoryMib}M`, "-smp", String(spec.vcpus), "-object", memory(spec)],
    ...bare,
    ...["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    ...["-global", "virtio-mmio.force-legacy=false"],
    ...begin(spec, accel, tscKhz),
    ...["-chardev", `socket,id=qmp,path=${escape(controlPath)},server=on,wait=off`, "-mon", "chardev=qmp,mode=control"],
    ...serialConsole(consoleFd),
    ...["-chardev", `socket,id=channel,fd=${channelFd}`],
    ...spec.disks.flatMap(({ id, path, readOnly }) => [
      "-blockdev",
      `driver=file,node-name=${id}-file,filename=${escape(path)},read-only=${onOff(readOnly)},discard=unmap,locking=off`,
      "-blockdev",
      `driver=raw,node-name=${id},file=${id}-file,read-only=${onOff(readOnly)},discard=unmap`
    ]),
    // a listener, so that gvproxy can end and another one can connect
    ...(spec.net === undefined
      ? []
      : [
          ...["-netdev", `stream,id=net,server=on,addr.type=fd,addr.str=${netFd}`],
          ...["-global", `virtio-net-device.mac=${spec.net.mac}`]
        ]),
    ...(spec.shares.length === 0 ? [] : ["-chardev", `socket,id=share,fd=${shareFd}`]),
    ...devices({
      disks: spec.disks,
      network: spec.net !== undefined,
      shares: spec.shares.length > 0
    }).flatMap((device) => ["-device", device])
  ]
}

/** The devices of a machine, in the order in which they are plugged in. A saved machine needs the same ones in the same order. */
export const devices = ({ disks, network, shares }: DeviceSet): ReadonlyArray<string> => [
  "virtio-serial-device",
  `virtserialport,chardev=channel,name=${channelName}`,
  // one port for all shares: the messages name the files
  ...(shares ? [`virtserialport,chardev=share,name=${shareName}`] : []),
  // a full disk of the host is an I/O error in the guest; by default QEMU would stop the machine, and nothing would start it again
  ...disks.map(({ id }) => `virtio-blk-device,drive=${id},serial=${id},werror=report,rerror=report`),
  // no announcements by the guest either; with the global rounds at 0 (`begin`), QEMU 7.2 would free their timer and crash at the guest's reset
  ...(network ? ["virtio-net-device,netdev=net,guest_announce=off"] : [])
]

const onOff = (value: boolean) => (value ? "on" : "off")
