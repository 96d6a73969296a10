import { createHash } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import { ProvisionError } from "../errors.ts"
import { cacheUnwritable, explained, type Tool } from "../host/hostTools.ts"
import { sha256File } from "../platform/sha256File.ts"
import type { ToolFailed } from "../platform/tool.ts"
import { blobOf, invalid, type Layer, manifestType, type OciImage, plainLayer, refName, zstd } from "./ociLayout.ts"

/**
 * Applies the layers to `tree`, which is made. `work` is an empty directory for temporary files. Fails with ROOTFS_IMG_TOO_LARGE when the layers
 * hold more than `limitBytes`.
 */
export const unpack = Effect.fn("ociUnpack.unpack")(function* (
  original: OciImage,
  tree: string,
  work: string,
  limitBytes: number,
  tool: Tool
) {
  const name = original.id.slice(0, 12)
  const tooLarge = new ProvisionError({
    code: "ROOTFS_IMG_TOO_LARGE",
    message: `the layers of ${name} hold more than ${Math.ceil(limitBytes / 1024 ** 2)} MiB`,
    hint: "if it is to be that large, raise MACHINEN_IMAGE_LIMIT_MIB"
  })
  const notApplied = (failed: ToolFailed) => invalid(name, "its layers cannot be applied", failed)
  const { layers, layout, tag } = original.layers.some(({ unpack }) => unpack === zstd)
    ? yield* withoutZstd(original, work, limitBytes, tooLarge, tool)
    : original
  const apply = tool([
    "umoci",
    "raw",
    "unpack",
    ...(process.getuid?.() === 0 ? [] : ["--rootless"]),
    ...["--image", `${layout}:${tag}`, tree]
  ])
  // a layer may be a decompression bomb: counting runs beside the unpacking, is faster because it writes nothing, and ends it
  const count = Effect.reduce(layers, 0, (sum, { file, unpack }) =>
    tool([
      "sh",
      "-c",
      `${unpack} <"$1" 2>/dev/null | head -c "$2" | wc -c`,
      "sh",
      file,
      String(limitBytes - sum + 1)
    ]).pipe(
      Effect.map((bytes) => sum + Number(bytes)),
      Effect.filterOrFail(
        (total) => total <= limitBytes,
        () => tooLarge
      )
    )
  )
  yield* Effect.all([apply, count], { concurrency: 2 }).pipe(explained(path.dirname(tree), notApplied))
})

/** The image's tag in the layout of unpacked layers. */
const unpackedTag = "unpacked"

/** The shell's exit code for a program that wrote more than `ulimit -f` allows: 128 + SIGXFSZ. */
const fileTooLarge = 128 + 25

/**
 * Copies the image into a layout at `work` whose zstd layers are unpacked, because umoci does not know zstd. A packed layer is checked here
 * against its digest. umoci checks the unpacked layer against the configuration, as any other layer.
 */
const withoutZstd = Effect.fnUntraced(function* (
  image: OciImage,
  work: string,
  limitBytes: number,
  tooLarge: ProvisionError,
  tool: Tool
) {
  const fs = yield* FileSystem.FileSystem
  const name = image.id.slice(0, 12)
  const written = Effect.mapError(cacheUnwritable(work))
  const blobs = path.join(work, "blobs", "sha256")
  yield* written(fs.makeDirectory(blobs, { recursive: true }))
  const put = (file: string, digest: string) => Effect.orElse(fs.symlink(file, blobOf(work, digest)), () => Effect.void)

  let left = limitBytes
  const layers: Array<Layer> = []
  for (const layer of image.layers) {
    if (layer.unpack !== zstd) {
      yield* put(layer.file, layer.descriptor.digest)
      layers.push(layer)
      continue
    }
    if (`sha256:${yield* written(sha256File(fs, layer.file))}` !== layer.descriptor.digest) {
      return yield* invalid(name, `the file of ${layer.descriptor.digest} holds something else`)
    }
    const draft = path.join(work, "layer")
    // `ulimit -f` counts in blocks of 512 bytes; the shell turns the signal into an exit code
    yield* tool(
      [
        "sh",
        "-c",
        'ulimit -f "$1"; zstd -dcq <"$2" >"$3"; exit $?',
        "sh",
        String(Math.floor(left / 512)),
        layer.file,
        draft
      ],
      "zstd"
    ).pipe(
      Effect.catchTag("ToolFailed", (failed) => Effect.fail(failed.code === fileTooLarge ? tooLarge : failed)),
      explained(work, (failed) => invalid(name, "a layer cannot be unpacked", failed))
    )
    const size = Number((yield* written(fs.stat(draft))).size)
    const digest = `sha256:${yield* written(sha256File(fs, draft))}`
    yield* written(fs.rename(draft, blobOf(work, digest)))
    left -= size
    layers.push({ file: blobOf(work, digest), descriptor: { mediaType: plainLayer, digest, size }, unpack: "cat" })
  }

  yield* put(image.configBlob.file, image.configBlob.descriptor.digest)
  const manifest = JSON.stringify({
    schemaVersion: 2,
    mediaType: manifestType,
    config: image.configBlob.descriptor,
    layers: layers.map(({ descriptor }) => descriptor)
  })
  const digest = `sha256:${createHash("sha256").update(manifest).digest("hex")}`
  const entry = { mediaType: manifestType, digest, size: manifest.length, annotations: { [refName]: unpackedTag } }
  for (const [file, text] of [
    [blobOf(work, digest), manifest],
    [path.join(work, "index.json"), JSON.stringify({ schemaVersion: 2, manifests: [entry] })],
    [path.join(work, "oci-layout"), JSON.stringify({ imageLayoutVersion: "1.0.0" })]
  ] as const) {
    yield* written(fs.writeFileString(file, text))
  }
  return { ...image, layout: work, tag: unpackedTag, layers }
})
