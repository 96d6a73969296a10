import { createHash } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Option, Schema } from "effect"
import { ProvisionError } from "../errors.ts"
import { given } from "../platform/given.ts"
import { ImageConfig } from "./ImageConfig.ts"

const Digest = Schema.String.pipe(Schema.pattern(/^sha256:[0-9a-f]{64}$/))
const Descriptor = Schema.Struct({
  mediaType: Schema.String,
  digest: Digest,
  size: Schema.Int.pipe(Schema.nonNegative()),
  annotations: Schema.optional(Schema.Record({ key: Schema.String, value: Schema.String }))
})
export type Descriptor = typeof Descriptor.Type
/** umoci writes null for an empty list. */
const Index = Schema.parseJson(Schema.Struct({ manifests: Schema.NullOr(Schema.Array(Descriptor)) }))
export const Manifest = Schema.parseJson(Schema.Struct({ config: Descriptor, layers: Schema.Array(Descriptor) }))

/** An optional list of an image's configuration: null, absent and empty all mean none. */
const words = Schema.optional(Schema.NullOr(Schema.Array(Schema.String)))
const word = Schema.optional(Schema.NullOr(Schema.String))
const Config = Schema.parseJson(
  Schema.Struct({
    architecture: word,
    os: word,
    config: Schema.optional(
      Schema.NullOr(
        Schema.Struct({
          Entrypoint: words,
          Cmd: words,
          Env: words,
          WorkingDir: word,
          User: word,
          ExposedPorts: Schema.optional(Schema.NullOr(Schema.Record({ key: Schema.String, value: Schema.Unknown })))
        })
      )
    )
  })
)

export const manifestType = "application/vnd.oci.image.manifest.v1+json"
const configType = "application/vnd.oci.image.config.v1+json"
export const plainLayer = "application/vnd.oci.image.layer.v1.tar"
export const zstd = "zstd -dcq"
/** The media types of layers, each with the command that unpacks its tar stream. */
const layerTypes = new Map(
  [plainLayer, "application/vnd.oci.image.layer.nondistributable.v1.tar"].flatMap((type) => [
    [type, "cat"],
    [`${type}+gzip`, "gzip -dc"],
    [`${type}+zstd`, zstd]
  ])
)

export const refName = "org.opencontainers.image.ref.name"
const maxDocument = 4 * 1024 * 1024

/** An image in a layout, whose manifest and configuration have been checked. */
export interface OciImage {
  /** The manifest's sha256, which is the image's id. */
  readonly id: string
  readonly layout: string
  readonly tag: string
  readonly config: ImageConfig
  /** The blob of the image's configuration. */
  readonly configBlob: Blob
  readonly layers: ReadonlyArray<Layer>
}

export interface Blob {
  readonly file: string
  readonly descriptor: Descriptor
}

export interface Layer extends Blob {
  /** The command that unpacks the layer to a tar stream. */
  readonly unpack: string
}

/** Path of a blob in a layout. */
export const blobOf = (layout: string, digest: string) =>
  path.join(layout, "blobs", "sha256", digest.slice("sha256:".length))

export const readIndex = Effect.fnUntraced(function* (reference: string, layout: string) {
  const text = yield* readDocument(reference, path.join(layout, "index.json"))
  return yield* Effect.mapError(Schema.decode(Index)(text), (cause) =>
    invalid(reference, "its index.json makes no sense", cause)
  )
})

export const tagged = (
  reference: string,
  { manifests }: typeof Index.Type,
  tag: string | undefined
): Effect.Effect<Descriptor, ProvisionError> => {
  const all = manifests ?? []
  const found = tag === undefined ? all : all.filter(({ annotations }) => annotations?.[refName] === tag)
  const [only] = found
  if (only !== undefined && found.length === 1) return Effect.succeed(only)
  const tags = all.flatMap(({ annotations }) => annotations?.[refName] ?? [])
  return new ProvisionError({
    code: "IMAGE_NOT_FOUND",
    message: `${reference} means ${found.length === 0 ? "no image" : "more than one image"}`,
    hint:
      tags.length === 0
        ? "has anything been put into the layout?"
        : `add one of these to it: ${tags
            .slice(0, 10)
            .map((t) => `:${t}`)
            .join(" ")}`
  })
}

/** Reads and checks manifest and configuration of an image in a layout. Fails with IMAGE_INVALID. */
export const readImage = Effect.fnUntraced(function* (
  reference: string,
  layout: string,
  tag: string,
  descriptor: Descriptor
) {
  const blob = (digest: string) => blobOf(layout, digest)
  const verified = Effect.fnUntraced(function* ({ digest }: Descriptor) {
    const text = yield* readDocument(reference, blob(digest))
    if (`sha256:${createHash("sha256").update(text).digest("hex")}` === digest) return text
    return yield* invalid(reference, `the file of ${digest} holds something else`)
  })
  const unknownType = (mediaType: string) =>
    invalid(reference, `it has a part of the unknown type ${JSON.stringify(mediaType.slice(0, 100))}`)

  if (descriptor.mediaType !== manifestType) return yield* unknownType(descriptor.mediaType)
  const manifest = yield* Effect.flatMap(verified(descriptor), Schema.decode(Manifest)).pipe(
    asInvalid(reference, "its manifest")
  )
  if (manifest.config.mediaType !== configType) return yield* unknownType(manifest.config.mediaType)
  const layers = yield* Effect.forEach(manifest.layers, (descriptor) => {
    const unpack = layerTypes.get(descriptor.mediaType)
    return unpack === undefined
      ? unknownType(descriptor.mediaType)
      : Effect.succeed({ file: blob(descriptor.digest), descriptor, unpack })
  })
  const { architecture, config, os } = yield* Effect.flatMap(verified(manifest.config), Schema.decode(Config)).pipe(
    asInvalid(reference, "its configuration")
  )
  if (![undefined, null, "", "amd64"].includes(architecture) || ![undefined, null, "", "linux"].includes(os)) {
    return yield* invalid(
      reference,
      `it is for ${os ?? "any system"} on ${architecture ?? "any CPU"}, guests are Linux on amd64`
    )
  }
  const image: OciImage = {
    id: descriptor.digest.slice("sha256:".length),
    layout,
    tag,
    config: yield* toImageConfig(reference, config ?? {}),
    configBlob: { file: blob(manifest.config.digest), descriptor: manifest.config },
    layers
  }
  return image
})

type Runtime = NonNullable<NonNullable<(typeof Config.Type)["config"]>>

const toImageConfig = (reference: string, { Cmd, Entrypoint, Env, ExposedPorts, User, WorkingDir }: Runtime) => {
  const env = Object.fromEntries(
    (Env ?? []).map((pair) => {
      const at = pair.indexOf("=")
      return at === -1 ? [pair, ""] : [pair.slice(0, at), pair.slice(at + 1)]
    })
  )
  const command = (words: ReadonlyArray<string> | null | undefined) =>
    words == null || words.length === 0 ? undefined : words
  const fields = {
    entrypoint: command(Entrypoint),
    cmd: command(Cmd),
    env: Object.keys(env).length === 0 ? undefined : env,
    // as in docker, a relative directory is relative to the root
    cwd: WorkingDir == null || WorkingDir === "" ? undefined : path.posix.resolve("/", WorkingDir),
    user: User == null || User === "" ? undefined : User,
    exposedPorts: ExposedPorts == null ? undefined : Object.keys(ExposedPorts)
  }
  return Schema.decodeUnknown(ImageConfig)(given(fields)).pipe(asInvalid(reference, "its configuration"))
}

export const readDocument = Effect.fnUntraced(function* (reference: string, file: string) {
  const fs = yield* FileSystem.FileSystem
  const bytes = yield* Effect.scoped(
    Effect.gen(function* () {
      const handle = yield* fs.open(file, { flag: "r" })
      const { size } = yield* handle.stat
      if (Number(size) > maxDocument) return Option.none()
      return Option.some(Option.getOrElse(yield* handle.readAlloc(maxDocument), () => new Uint8Array()))
    })
  ).pipe(Effect.mapError((cause) => unreadable(reference, file, cause)))
  if (Option.isNone(bytes)) return yield* invalid(reference, `${path.basename(file)} is too large for what it is to be`)
  return Buffer.from(bytes.value).toString()
})

const asInvalid =
  (reference: string, what: string) =>
  <A, E extends Error, R>(effect: Effect.Effect<A, E | ProvisionError, R>) =>
    Effect.mapError(effect, (e) => (e instanceof ProvisionError ? e : invalid(reference, `${what} makes no sense`, e)))

export const invalid = (reference: string, why: string, cause?: unknown) =>
  new ProvisionError({
    code: "IMAGE_INVALID",
    message: `${reference} is no image that can be used: ${why}${cause instanceof Error ? `: ${firstLine(cause.message)}` : ""}`,
    hint: "fetch or build it again; `skopeo inspect` shows what it says about itself",
    cause
  })

const firstLine = (text: string) => text.split("\n", 1)[0]?.slice(0, 300) ?? ""

export const unreadable = (reference: string, file: string, cause: unknown) =>
  new ProvisionError({
    code: "IMAGE_NOT_FOUND",
    message: `there is no image ${reference}: ${file} cannot be read`,
    hint: "docker://NAME:TAG, docker-archive:FILE or oci:DIR:TAG",
    cause
  })
