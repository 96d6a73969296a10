import { createHash } from "node:crypto"
import { Schema } from "effect"
import { MachineFingerprint } from "../machine/MachineSpec.ts"
import { guestNetwork, NetworkMode } from "../machine/Network.ts"
import { FileState } from "../platform/fileState.ts"

/** Everything that decides the state of a machine that has booted and run nothing. Boots of equal shape can start from one template. */
export class TemplateShape extends Schema.Class<TemplateShape>("TemplateShape")({
  /** Version of the steps that make a template: another number makes new templates. */
  recipe: Schema.Literal(1),
  /** Paths of assets, which hold the hash of their inputs. */
  kernel: Schema.String,
  init: Schema.String,
  /** The kernel's command line, without values that are measured on the host. */
  kernelArguments: Schema.String,
  /** State of the read-only image below the root. */
  base: FileState,
  rootDiskSizeBytes: Schema.Int,
  memoryMib: Schema.Int,
  vcpus: Schema.Int,
  network: NetworkMode,
  /** Without the clock rate, which is measured anew at each boot of the host, and compared with a tolerance instead. */
  machine: Schema.Struct(MachineFingerprint.fields).omit("tscKhz")
}) {
  /** The directory name of the template. */
  get key(): string {
    const network = this.network === "nat" ? guestNetwork : null
    return createHash("sha256")
      .update(JSON.stringify([encode(this), network]))
      .digest("hex")
      .slice(0, 32)
  }
}
const encode = Schema.encodeSync(TemplateShape)

/** The record beside a template's bundle: the template's shape, and the state of its files when it was made. */
export class TemplateRecord extends Schema.Class<TemplateRecord>("TemplateRecord")({
  shape: TemplateShape,
  files: Schema.Array(FileState)
}) {}
