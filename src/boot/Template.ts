import { createHash } from "node:crypto"
import { Schema } from "effect"
import { MachineFingerprint } from "../machine/MachineSpec.ts"
import { guestNetwork, NetworkMode } from "../machine/Network.ts"
import { FileState } from "../platform/fileState.ts"

/** Everything that decides what a machine is that has booted and run nothing. Two boots of one shape can begin as one template. */
export class TemplateShape extends Schema.Class<TemplateShape>("TemplateShape")({
  /** What is done to a template before it is taken; another number makes new ones. */
  recipe: Schema.Literal(1),
  /** By content: the paths of assets. */
  kernel: Schema.String,
  init: Schema.String,
  /** What the kernel is told, but for what was measured on this host. */
  kernelArguments: Schema.String,
  /** The read-only image below the root. */
  base: FileState,
  rootDiskSizeBytes: Schema.Int,
  memoryMib: Schema.Int,
  vcpus: Schema.Int,
  network: NetworkMode,
  /** Without its clock rate, which is measured anew on each boot of the host and compared instead. */
  machine: Schema.Struct(MachineFingerprint.fields).omit("tscKhz")
}) {
  /** The name of its template. */
  get key(): string {
    const network = this.network === "nat" ? guestNetwork : null
    return createHash("sha256")
      .update(JSON.stringify([encode(this), network]))
      .digest("hex")
      .slice(0, 32)
  }
}
const encode = Schema.encodeSync(TemplateShape)

/** What lies beside a template's bundle: what it is a template of, and its files as they were when it was made. */
export class TemplateRecord extends Schema.Class<TemplateRecord>("TemplateRecord")({
  shape: TemplateShape,
  files: Schema.Array(FileState)
}) {}
