import { Schema } from "effect"

/** A VM's identity: 12 hex digits of which the first is a letter (digits alone are a pid), made at boot, never used again. It is a directory name, and short because socket paths are. */
export const VmId = Schema.String.pipe(Schema.pattern(/^[a-f][0-9a-f]{11}$/), Schema.brand("VmId"))
export type VmId = typeof VmId.Type

/**
 * What a user may call a VM. Path-like names (`team/job-1`) are allowed; what could be mistaken for a path on the host (`..`, a
 * leading `/`), a pid (digits only) or an option is not.
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

/** A directory of the host's that a guest shares, by the name it has there. */
export const Share = Schema.Struct({ tag: Schema.String, path: Schema.String, readOnly: Schema.Boolean })
export type Share = typeof Share.Type

/** How a machine begins: a kernel is loaded, or a saved machine goes on where it was stopped. */
export const Start = Schema.Union(
  Schema.TaggedStruct("Kernel", { kernel: Schema.String, initrd: Schema.String }),
  /** `memory` is mapped copy-on-write and never written. */
  Schema.TaggedStruct("Saved", { state: Schema.String, memory: Schema.String })
)
export type Start = typeof Start.Type

/**
 * One machine, as a VMM backend needs to know it. Plain data: a backend turns it into a command line or API calls and nothing else.
 * All paths are absolute.
 */
export class MachineSpec extends Schema.Class<MachineSpec>("MachineSpec")({
  id: VmId,
  /** Holds everything that belongs to this VM alone. */
  dir: Schema.String,
  start: Start,
  memoryMib: Schema.Int,
  vcpus: Schema.Int,
  disks: Schema.Array(Disk),
  shares: Schema.optionalWith(Schema.Array(Share), { default: () => [] }),
  /** Its network card, if it has one. */
  net: Schema.optional(Schema.Struct({ mac: Schema.String }))
}) {}

/** What a machine is made of beside memory and processors. */
export interface DeviceSet {
  readonly disks: ReadonlyArray<Disk>
  /** It has a network card. */
  readonly network: boolean
  /** It shares directories of the host's. How many is not the machine's business. */
  readonly shares: boolean
}

/** Which accelerator runs guest code: the CPU itself, or QEMU's translator. */
export const Accelerator = Schema.Literal("kvm", "tcg")
export type Accelerator = typeof Accelerator.Type

/** What the VMM and the host make of a machine; a saved one goes on only where all of it is the same. */
export class MachineFingerprint extends Schema.Class<MachineFingerprint>("MachineFingerprint")({
  backend: Schema.String,
  vmmVersion: Schema.String,
  machine: Schema.String,
  accel: Accelerator,
  cpu: Schema.String,
  /** The guest's clock counts in the host's TSC ticks. */
  tscKhz: Schema.Int,
  /** In the order they are plugged in. */
  devices: Schema.Array(Schema.String)
}) {}

/** How a command ended. `code` is 128 + `signal` when a signal ended it, as a shell reports it. */
export class ExitStatus extends Schema.Class<ExitStatus>("ExitStatus")({
  code: Schema.Int,
  signal: Schema.optionalWith(Schema.NullOr(Schema.Int), { default: () => null }),
  /** The guest kernel ended it for want of memory. */
  oomKilled: Schema.optionalWith(Schema.Boolean, { default: () => false })
}) {}
