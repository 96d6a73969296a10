import * as path from "node:path"
import type { Accelerator, DeviceSet, MachineSpec } from "../../src/machine/MachineSpec.ts"

/** The full binary, for it has TCG; Debian's `-microvm` build has KVM only. */
export const defaultBinary = "qemu-system-x86_64"

/** The machine: no firmware tables, no legacy timer or interrupt controller; a clock and a serial port. */
export const machine = "microvm,acpi=off,pit=off,pic=off,rtc=on,isa-serial=on,x-option-roms=off"

/**
 * Nothing of the guest's memory gets into a core file of QEMU's, and none of it is shared with other guests by KSM, whose timing tells
 * them what it holds. Not part of `machine`: a guest does not see it, and a bundle made without it may be restored with it.
 */
const kept = "dump-guest-core=off,mem-merge=off"

/** Nothing that is not asked for, and a reset ends QEMU. */
export const bare = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"] as const

/** The serial port's other end is the shim's. */
export const serialConsole = (fd: number) =>
  ["-chardev", `socket,id=console,fd=${fd}`, "-serial", "chardev:console"] as const

/**
 * Descriptors QEMU inherits from the shim: channel and console, each one end of a socketpair; memory; a saved machine's state; the
 * listener of the network card's other end.
 */
export const channelFd = 3
export const consoleFd = 4
export const memoryFd = 5
export const stateFd = 6
export const netFd = 7

/**
 * Register state the CPU has and the guest kernel does not use (MPX, protection keys) or only gives to who asks (AMX). CRIU reserves room
 * for all of it, by CPUID; the kernel finds that too long and lets the processes of a dump go on with AVX registers half zero (measured:
 * fpu/signal.c, check_xstate_in_sigframe).
 */
const unusedState = "-mpx,-pku,-amx-tile"

/**
 * TCG advertises fast `rep movsb` and emulates it byte by byte: without ERMS the guest kernel copies in words, and a command's output
 * costs 850 instead of 2000 ms of CPU for 100 MB (measured).
 */
export const cpu: Record<Accelerator, string> = {
  kvm: `host,${unusedState}`,
  tcg: `max,-erms,${unusedState}`
}

/**
 * MiB of translated code TCG keeps; when they are full it throws all of it away and begins anew. QEMU's own choice is up to 1 GiB, which a
 * busy guest fills in half an hour (854 MiB). A debian guest has used less than 128 MiB after booting and starting Python, and in a minute
 * of starting one program after the other fills that twice, 64 MiB six times, with 159 and 88 MiB of QEMU's own memory at its end instead of
 * 278 (measured). Not seen by the guest, so not part of the fingerprint.
 */
const translated = 128

/**
 * TCG would give each vCPU a thread. A vCPU that writes code while another translates it is then not noticed by QEMU 7.2 (it looks for
 * code in a page only once that was translated), and a kernel does so for as long as it runs: it patches its branches. One boot in 80 with
 * two vCPUs on a busy host came to a halt or panicked on a breakpoint that was gone (measured). In one thread they take turns.
 */
const accelerator = (accel: Accelerator, vcpus: number) =>
  accel === "tcg" ? `tcg,tb-size=${translated}${vcpus > 1 ? ",thread=single" : ""}` : accel

/** The port the guest's agent looks for (docs/protocol.md §1). */
const channelName = "machinen.channel"

/** What the guest's agent mounts (guest/src/system/shares.rs), and where its VMM finds it. */
const sharesTag = "machinen-shares"
export const sharesPath = (dir: string) => path.join(dir, "shares")

/** In QEMU's option syntax a comma separates; a literal one is doubled. */
const escape = (value: string) => value.replaceAll(",", ",,")

/**
 * What the guest kernel is told. The second group is for TCG only: without it the kernel spends some 400 ms of its boot (measured)
 * calibrating timers against emulated hardware and patching code that TCG has translated already.
 */
export const kernelArguments = (accel: Accelerator, tscKhz: number): string =>
  [
    "console=ttyS0",
    "reboot=t", // a triple fault ends QEMU (-no-reboot): without ACPI that is the power-off
    "panic=-1",
    "quiet",
    "acpi=off",
    "noreplace-smp",
    "dummy.numdummies=0", // the driver would give every guest a card dummy0; `ip link add` makes one where it is wanted
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
 * Guest memory is the shim's: a memfd, shared, so that the shim can copy it for a snapshot; or a bundle's memory file, mapped privately, so
 * that any number of machines can begin as it. Not a file of the VM's own: on ext4 that costs 300 ms of a boot in page faults
 * (measured), and disk writes for as long as the VM runs.
 */
const memory = ({ memoryMib, start }: MachineSpec) =>
  `memory-backend-file,id=mem,size=${memoryMib}M,mem-path=/proc/self/fd/${memoryFd},share=${onOff(start._tag === "Kernel")}`

/**
 * A kernel to load, or a state to go on from. The state is what `xen-save-devices-state` wrote (QMP reference): all devices, no memory, and
 * without the configuration section that a migration stream begins with.
 */
const begin = ({ start }: MachineSpec, accel: Accelerator, tscKhz: number): ReadonlyArray<string> =>
  start._tag === "Kernel"
    ? ["-kernel", start.kernel, "-initrd", start.initrd, "-append", kernelArguments(accel, tscKhz)]
    : [
        ...["-global", "migration.send-configuration=off"],
        // what QEMU would send from the guest's card in its name is for switches that remember another port
        ...["-global", "migration.announce-rounds=0"],
        ...["-incoming", `fd:${stateFd}`]
      ]

export interface CommandLineOptions {
  readonly binary: string
  readonly accel: Accelerator
  readonly tscKhz: number
  readonly controlPath: string
}

/**
 * QEMU's command line for a machine: microvm without firmware tables, PVH kernel, guest memory in a memfd,
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
    // a listener, so that who serves the card can end and another come
    ...(spec.net === undefined
      ? []
      : [
          ...["-netdev", `stream,id=net,server=on,addr.type=fd,addr.str=${netFd}`],
          ...["-global", `virtio-net-device.mac=${spec.net.mac}`]
        ]),
    ...(spec.shares.length === 0
      ? []
      : // whose files they are and what kind they are stays as it is; `remap`: they may lie on several file systems
        ["-fsdev", `local,id=shares,path=${escape(sharesPath(spec.dir))},security_model=passthrough,multidevs=remap`]),
    ...devices({
      disks: spec.disks,
      network: spec.net !== undefined,
      shares: spec.shares.length > 0
    }).flatMap((device) => ["-device", device])
  ]
}

/** What is plugged into the machine, in this order; a saved machine goes on only with the same in the same order. */
export const devices = ({ disks, network, shares }: DeviceSet): ReadonlyArray<string> => [
  "virtio-serial-device",
  `virtserialport,chardev=channel,name=${channelName}`,
  // a host without space is an I/O error in the guest; QEMU would stop the machine, and nobody would start it again
  ...disks.map(({ id }) => `virtio-blk-device,drive=${id},serial=${id},werror=report,rerror=report`),
  // nobody is told that it has moved; and where such telling is put off for all (`begin`), QEMU 7.2 frees its timer and dies of it at the
  // guest's reset
  ...(network ? ["virtio-net-device,netdev=net,guest_announce=off"] : []),
  // one for all of them: microvm has eight places for devices
  ...(shares ? [`virtio-9p-device,fsdev=shares,mount_tag=${sharesTag}`] : [])
]

const onOff = (value: boolean) => (value ? "on" : "off")
