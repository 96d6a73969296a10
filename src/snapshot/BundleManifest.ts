import { Schema } from "effect"
import { Disk, MachineFingerprint, VmId, VmName } from "../machine/MachineSpec.ts"
import { LiveMount, Mount } from "../machine/mountOptions.ts"
import { NetworkMode } from "../machine/Network.ts"

/** How a VM is captured: `vmstate`, the whole machine; `criu`, the process tree in its guest. */
export const EngineName = Schema.Literal("vmstate", "criu")
export type EngineName = typeof EngineName.Type

/** The version of the channel to a guest's agent (docs/protocol.md §1), which goes on as it was in a bundle of the engine `vmstate`. */
export const channelVersion = 3

/** A file's name in the bundle's directory; never a path. */
const BlobName = Schema.String.pipe(Schema.pattern(/^[a-z][a-z.-]*$/))

/** One file of a bundle. */
export const Blob = Schema.Struct({
  name: BlobName,
  sizeBytes: Schema.Number,
  /** Without holes and zeros. */
  dataBytes: Schema.Number,
  /** Over the data (docs/protocol.md §5, digest). */
  sha256: Schema.String,
  /** Over the ends and the middle of the file, for a look that costs nothing (src/platform/probeHash.ts). */
  probe: Schema.String
})
export type Blob = typeof Blob.Type

/** A disk of the machine: a file of the bundle, or a read-only image that is expected on the host, known by its hash. */
export const BundleDisk = Schema.Struct({
  id: Disk.fields.id,
  source: Schema.Union(
    Schema.TaggedStruct("Blob", { name: BlobName, readOnly: Schema.optional(Schema.Boolean) }),
    Schema.TaggedStruct("Image", { path: Schema.String, sha256: Schema.String })
  )
})
export type BundleDisk = typeof BundleDisk.Type

/** `meta.json` of a snapshot bundle; a directory without it is none. Written last. */
export class BundleManifest extends Schema.Class<BundleManifest>("BundleManifest")({
  format: Schema.Literal(1),
  engine: EngineName,
  /** Unix milliseconds. */
  snappedAt: Schema.Number,
  sourceId: VmId,
  sourceName: Schema.optional(VmName),
  /** What the source was booted from, as its user called it. */
  sourceImage: Schema.String,
  command: Schema.optional(Schema.Array(Schema.String)),
  machine: MachineFingerprint,
  kernelSha256: Schema.String,
  /** What the agent in it speaks. A bundle of an older version has no word of it. */
  channel: Schema.optionalWith(Schema.Int, { default: () => 1 }),
  memoryMib: Schema.Int.pipe(Schema.positive()),
  vcpus: Schema.Int.pipe(Schema.positive()),
  /** A bundle of an older version has no word of it. */
  network: Schema.optionalWith(NetworkMode, { default: () => "none" }),
  disks: Schema.Array(BundleDisk),
  /** The copy of a host directory among the disks. */
  mount: Schema.optional(Mount),
  /** Directories of the host's that it shares; nothing of what is in them. */
  liveMounts: Schema.optional(Schema.Array(LiveMount)),
  blobs: Schema.Array(Blob)
}) {}
