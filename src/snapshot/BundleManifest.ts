import { Schema } from "effect"
import { Disk, MachineFingerprint, VmId, VmName } from "../machine/MachineSpec.ts"
import { LiveMount, Mount } from "../machine/mountOptions.ts"
import { NetworkMode } from "../machine/Network.ts"

/** How a VM is saved: `vmstate` saves the whole machine, `criu` the processes in its guest. */
export const EngineName = Schema.Literal("vmstate", "criu")
export type EngineName = typeof EngineName.Type

/** The version of the channel to a guest's agent (docs/protocol.md §1). The agent in a `vmstate` bundle goes on with the version it had. */
export const channelVersion = 3

/** The name of a file in the bundle's directory; never a path. */
const BlobName = Schema.String.pipe(Schema.pattern(/^[a-z][a-z.-]*$/))

/** One file of a bundle. */
const Blob = Schema.Struct({
  name: BlobName,
  sizeBytes: Schema.Number,
  /** Bytes of the blocks of 4096 that are not all zero. */
  dataBytes: Schema.Number,
  /** Hash over those blocks (docs/protocol.md §5.6, digest). */
  sha256: Schema.String,
  /** Hash over the first, middle and last MiB of the file, which a restore compares (src/platform/probeHash.ts). */
  probe: Schema.String
})
export type Blob = typeof Blob.Type

/** A disk of the machine: a file of the bundle, or a read-only image on the host, identified by its hash. */
export const BundleDisk = Schema.Struct({
  id: Disk.fields.id,
  source: Schema.Union(
    Schema.TaggedStruct("Blob", { name: BlobName, readOnly: Schema.optional(Schema.Boolean) }),
    Schema.TaggedStruct("Image", { path: Schema.String, sha256: Schema.String })
  )
})
export type BundleDisk = typeof BundleDisk.Type

/** `meta.json` of a snapshot bundle, written last: a directory without it is no bundle. */
export class BundleManifest extends Schema.Class<BundleManifest>("BundleManifest")({
  format: Schema.Literal(1),
  engine: EngineName,
  /** Unix milliseconds. */
  snappedAt: Schema.Number,
  sourceId: VmId,
  sourceName: Schema.optional(VmName),
  /** The image that the source was booted from, by the user's own name for it. */
  sourceImage: Schema.String,
  command: Schema.optional(Schema.Array(Schema.String)),
  machine: MachineFingerprint,
  kernelSha256: Schema.String,
  /** The channel version of the agent in the bundle. Bundles of older versions lack it. */
  channel: Schema.optionalWith(Schema.Int, { default: () => 1 }),
  memoryMib: Schema.Int.pipe(Schema.positive()),
  vcpus: Schema.Int.pipe(Schema.positive()),
  /** Bundles of older versions lack it, and their machines have no network card. */
  network: Schema.optionalWith(NetworkMode, { default: () => "none" }),
  disks: Schema.Array(BundleDisk),
  /** The copy of a host directory, which is on two of the disks. */
  mount: Schema.optional(Mount),
  /** Host directories that the VM shares. Their content is not part of the bundle. */
  liveMounts: Schema.optional(Schema.Array(LiveMount)),
  blobs: Schema.Array(Blob)
}) {}
