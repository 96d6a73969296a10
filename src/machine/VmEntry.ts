import { Schema } from "effect"
import { ProcessIdentity } from "../platform/ProcessIdentity.ts"
import { Accelerator, Disk, VmId, VmName } from "./MachineSpec.ts"
import { LiveMount, Mount } from "./mountOptions.ts"
import { NetworkMode, PortForward } from "./Network.ts"

/**
 * The registry's record of one VM: `<vms>/<id>/entry.json`. The starter writes it when it claims the id (`booting`). From then on the shim
 * writes it: it adds itself and the VMM, and removes the entry when the VM has ended.
 */
export class VmEntry extends Schema.Class<VmEntry>("VmEntry")({
  version: Schema.Literal(1),
  id: VmId,
  name: Schema.optional(VmName),
  state: Schema.Literal("booting", "running"),
  bootId: Schema.String,
  /** The process that starts the VM. Until there is a shim, the entry counts while this process is alive. */
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
  /** Kernel and disks of the machine, which a snapshot needs beside memory. Entries of older versions have neither. */
  kernel: Schema.optional(Schema.String),
  disks: Schema.optional(Schema.Array(Disk)),
  /** The network mode. Entries of older versions have none, and their VMs no network card. */
  network: Schema.optionalWith(NetworkMode, { default: () => "none" }),
  portForward: Schema.optional(Schema.Array(PortForward)),
  /** The copy of a host directory, which is on two of the disks. */
  mount: Schema.optional(Mount),
  /** Directories and files of the host that the VM shares. */
  liveMounts: Schema.optional(Schema.Array(LiveMount)),
  /** Why the guest has lost what it shared: its server has ended. The shim says so. */
  liveMountsLost: Schema.optional(Schema.String),
  /** The bundle that the VM was restored from, or the id of the VM that it was forked from. */
  forkedFrom: Schema.optional(Schema.String),
  /** The VM started from a template: its own console log has no kernel messages of the boot. */
  prepared: Schema.optional(Schema.Boolean),
  /** The VM's processes were restored lazily: their memory is read when it is touched. */
  lazy: Schema.optional(Schema.Boolean),
  /** Unix milliseconds. */
  createdAt: Schema.Number,
  vsockPath: Schema.String,
  controlPath: Schema.String,
  /** The VMM's own control socket, whose protocol the backend knows. */
  vmmControlPath: Schema.optional(Schema.String)
}) {
  /** The name for messages: the VM's name, else its id. */
  get label(): string {
    return this.name ?? this.id
  }
}
