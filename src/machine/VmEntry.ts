import { Schema } from "effect"
import { ProcessIdentity } from "../platform/ProcessIdentity.ts"
import { Accelerator, Disk, VmId, VmName } from "./MachineSpec.ts"
import { LiveMount, Mount } from "./mountOptions.ts"
import { NetworkMode, PortForward } from "./Network.ts"

/**
 * The registry's record of one VM: `<vms>/<id>/entry.json`. Written by the starter when it claims the id (`booting`), from then on by
 * the shim, which adds itself and the VMM and removes the entry when the VM is gone.
 */
export class VmEntry extends Schema.Class<VmEntry>("VmEntry")({
  version: Schema.Literal(1),
  id: VmId,
  name: Schema.optional(VmName),
  state: Schema.Literal("booting", "running"),
  bootId: Schema.String,
  /** The process that boots the VM; it answers for the entry until there is a shim. */
  owner: ProcessIdentity,
  shim: Schema.optional(ProcessIdentity),
  vmm: Schema.optional(ProcessIdentity),
  detached: Schema.Boolean,
  backend: Schema.String,
  accel: Accelerator,
  image: Schema.String,
  command: Schema.optional(Schema.Array(Schema.String)),
  memoryMib: Schema.Int,
  vcpus: Schema.Int,
  /** The kernel it was booted with, and its disks: what a snapshot is made of beside memory. */
  kernel: Schema.optional(Schema.String),
  disks: Schema.optional(Schema.Array(Disk)),
  /** How it is connected; an entry of an older version has no word of it, and its VM no card. */
  network: Schema.optionalWith(NetworkMode, { default: () => "none" }),
  portForward: Schema.optional(Schema.Array(PortForward)),
  /** The copy of a host directory among them. */
  mount: Schema.optional(Mount),
  /** Directories of the host's that it shares. */
  liveMounts: Schema.optional(Schema.Array(LiveMount)),
  /** The bundle it was restored from, or the id of the VM it was forked from. */
  forkedFrom: Schema.optional(Schema.String),
  /** It began as a template, not with a kernel: what its kernel printed at boot is on no console log of its own. */
  prepared: Schema.optional(Schema.Boolean),
  /** Its processes were restored without their memory, which comes as it is touched. */
  lazy: Schema.optional(Schema.Boolean),
  /** Unix milliseconds. */
  createdAt: Schema.Number,
  vsockPath: Schema.String,
  controlPath: Schema.String,
  /** The VMM's own control socket; what is spoken on it is the backend's business. */
  vmmControlPath: Schema.optional(Schema.String)
}) {
  /** What a user calls it. */
  get label(): string {
    return this.name ?? this.id
  }
}
