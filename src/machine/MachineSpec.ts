import { Schema } from "effect"

/**
 * A VM's id: 12 hex digits, made at boot and never used again. The first one is a letter, because digits alone are a pid. The id is a directory
 * name, and short because socket paths are limited to 107 bytes.
 */
export const VmId = Schema.String.pipe(Schema.pattern(/^[a-f][0-9a-f]{11}$/), Schema.brand("VmId"))
export type VmId = typeof VmId.Type

/**
 * A VM's name. Path-like names (`team/job-1`) are allowed. Names that could be mistaken for a path of the host (`..`, a leading `/`), for a pid
 * (digits only) or for an option are not.
 */
export const VmName = Schema.String.pipe(
  Schema.filter((name) =>
    name.length > 0 &&
    name.length <= 128 &&
    /^[A-Za-z0-9_][A-Za-z0-9_.~/-]*$/.test(name) &&
    !/^[0-9]+$/.test(name) &&
    name.split("/").every((part) => part !== "" && part !== "." && part !== "..")
      ? undefined
      : "a name is 1 to 128 characters of letters, digits and _ . ~ - /, starts with a letter, digit or _, is not digits only, and has no empty, `.` or `..` part"
  ),
  Schema.brand("VmName")
)
export type VmName = typeof VmName.Type

/** A block device. The guest finds it by `id`, which becomes its virtio serial (at most 20 bytes, virtio spec 5.2.6.1). */
export const Disk = Schema.Struct({
  id: Schema.Literal("root", "upper", "scratch", "mountlower", "mountupper"),
  path: Schema.String,
  readOnly: Schema.Boolean
})
export type Disk = typeof Disk.Type

/** A numeric owner of files: a uid or a gid. The highest number means "none" to the kernel. */
export const OwnerId = Schema.Int.pipe(Schema.between(0, 2 ** 32 - 2))

/** A directory or file of the host that the guest shares; the guest knows it by `tag`. */
export const Share = Schema.Struct({
  tag: Schema.String,
  path: Schema.String,
  readOnly: Schema.Boolean,
  /** Which user of the guest the files' owner is. */
  uid: Schema.optionalWith(OwnerId, { exact: true }),
  gid: Schema.optionalWith(OwnerId, { exact: true })
})
export type Share = typeof Share.Type

/** How a machine starts: with a kernel, or as a saved machine that continues where it was stopped. */
export const Start = Schema.Union(
  Schema.TaggedStruct("Kernel", { kernel: Schema.String, initrd: Schema.String }),
  /** `memory` is mapped copy-on-write and never written. `shares`: what the server of shared directories has saved. */
  Schema.TaggedStruct("Saved", { state: Schema.String, memory: Schema.String, shares: Schema.optional(Schema.String) })
)
export type Start = typeof Start.Type

/**
 * One machine, as a VMM backend needs to know it. Plain data: a backend turns it into a command line or API calls and nothing else.
 * All paths are absolute.
 */
export class MachineSpec extends Schema.Class<MachineSpec>("MachineSpec")({
  id: VmId,
  /** The VM's own directory, which exists. */
  dir: Schema.String,
  start: Start,
  memoryMib: Schema.Int,
  vcpus: Schema.Int,
  disks: Schema.Array(Disk),
  shares: Schema.optionalWith(Schema.Array(Share), { default: () => [] }),
  /** The network card; absent: the machine has none. */
  net: Schema.optional(Schema.Struct({ mac: Schema.String }))
}) {}

/** The devices of a machine, as far as they differ between machines. */
export interface DeviceSet {
  readonly disks: ReadonlyArray<Disk>
  /** Whether the machine has a network card. */
  readonly network: boolean
  /** Whether the machine shares host directories. All shares are on one port. */
  readonly shares: boolean
}

/** What runs guest code: the CPU itself (KVM), or QEMU's translator (TCG). */
export const Accelerator = Schema.Literal("kvm", "tcg")
export type Accelerator = typeof Accelerator.Type

/** Identifies VMM, host and devices of a machine. A saved machine is restored only where all of them match. */
export class MachineFingerprint extends Schema.Class<MachineFingerprint>("MachineFingerprint")({
  backend: Schema.String,
  vmmVersion: Schema.String,
  machine: Schema.String,
  accel: Accelerator,
  cpu: Schema.String,
  /** Rate of the host's TSC, in whose ticks the guest's clock counts. */
  tscKhz: Schema.Int,
  /** Names of the devices, in the order in which they are plugged in. */
  devices: Schema.Array(Schema.String)
}) {}

/** How a command ended. `code` is 128 + `signal` when a signal ended the command, as a shell reports it. */
export class ExitStatus extends Schema.Class<ExitStatus>("ExitStatus")({
  code: Schema.Int,
  signal: Schema.optionalWith(Schema.NullOr(Schema.Int), { default: () => null }),
  /** The command got SIGKILL, and the guest kernel killed a process for want of memory while it ran. */
  oomKilled: Schema.optionalWith(Schema.Boolean, { default: () => false })
}) {}
