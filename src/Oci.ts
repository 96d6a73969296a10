import { createHash } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Option, Schema } from "effect"
import { ProvisionError } from "./domain/errors.ts"
import { ImageConfig } from "./domain/ImageConfig.ts"
import * as HostLock from "./platform/HostLock.ts"

/**
 * Container images: `docker://registry/name:tag`, `docker-archive:FILE`, `oci:DIR[:TAG]`. skopeo brings them, umoci applies their layers; what they
 * say about themselves is read and checked here. All that is brought lies in one OCI layout, where a layer is kept once, by its digest.
 */
const schemes = ["docker://", "docker-archive:", "oci:"] as const
export const isReference = (image: string): boolean => schemes.some((scheme) => image.startsWith(scheme))

const digestPattern = /^sha256:[0-9a-f]{64}$/
const Digest = Schema.String.pipe(Schema.pattern(digestPattern))
const Descriptor = Schema.Struct({
  mediaType: Schema.String,
  digest: Digest,
  size: Schema.Int.pipe(Schema.nonNegative()),
  annotations: Schema.optional(Schema.Record({ key: Schema.String, value: Schema.String }))
})
type Descriptor = typeof Descriptor.Type
/** umoci writes null for an empty list. */
const Index = Schema.parseJson(Schema.Struct({ manifests: Schema.NullOr(Schema.Array(Descriptor)) }))
const Manifest = Schema.parseJson(Schema.Struct({ config: Descriptor, layers: Schema.Array(Descriptor) }))

/** Containers' own word for "nothing" is null, absent or empty. */
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

const manifestType = "application/vnd.oci.image.manifest.v1+json"
const configType = "application/vnd.oci.image.config.v1+json"
const layerTypes = new Map([
  ["application/vnd.oci.image.layer.v1.tar", "cat"],
  ["application/vnd.oci.image.layer.v1.tar+gzip", "gzip -dc"],
  ["application/vnd.oci.image.layer.nondistributable.v1.tar", "cat"],
  ["application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "gzip -dc"]
])

const refName = "org.opencontainers.image.ref.name"
const maxDocument = 4 * 1024 * 1024

/** An image in a layout, whose manifest and configuration are sound. */
export interface OciImage {
  /** The manifest's sha256: what the image is known by. */
  readonly id: string
  readonly layout: string
  readonly tag: string
  readonly config: ImageConfig
  /** The layers, each with the command that unpacks it. */
  readonly layers: ReadonlyArray<{ readonly file: string; readonly unpack: string }>
}

type Tool = (argv: readonly [string, ...ReadonlyArray<string>]) => Effect.Effect<string, ProvisionError>

/**
 * Finds the image a reference means and uses it; brings it into `own`, the layout of this host, unless it lies in one. While it is used nobody
 * collects its layers.
 */
export const withImage = Effect.fn("Oci.withImage")(function* <A, E, R>(
  reference: string,
  own: string,
  tool: Tool,
  use: (image: OciImage) => Effect.Effect<A, E, R>
) {
  const local = /^oci:(.+?)(?::([A-Za-z0-9._-]+))?$/.exec(reference)
  if (local !== null) {
    const [, dir = "", tag] = local
    const layout = path.resolve(dir)
    const found = yield* tagged(reference, yield* readIndex(reference, layout), tag)
    // an index of images for several machines has to be chosen from, which skopeo does
    if (found.mediaType === manifestType && found.annotations?.[refName] !== undefined) {
      return yield* Effect.flatMap(read(reference, layout, found.annotations[refName], found), use)
    }
  }
  const tag = `m-${createHash("sha256").update(reference).digest("hex").slice(0, 24)}`
  return yield* HostLock.withLock(`${own}.lock`, (cause) => unreadable(reference, own, cause))(
    Effect.gen(function* () {
      yield* bring(reference, own, tag, tool)
      const index = yield* readIndex(reference, own)
      return yield* Effect.flatMap(read(reference, own, tag, yield* tagged(reference, index, tag)), use)
    })
  )
})

const bring = Effect.fnUntraced(function* (reference: string, own: string, tag: string, tool: Tool) {
  const fs = yield* FileSystem.FileSystem
  yield* Effect.mapError(fs.makeDirectory(own, { recursive: true }), (cause) => unreadable(reference, own, cause))
  const hasPolicy = yield* Effect.orElseSucceed(fs.exists("/etc/containers/policy.json"), () => false)
  const host = /^docker:\/\/(\[::1\]|[^/:]+)/.exec(reference)?.[1] ?? ""
  // as docker does: a registry on this very host need not have a certificate
  const loopback = host === "localhost" || host === "[::1]" || /^127\.[0-9.]+$/.test(host)
  // skopeo would leave what had the tag before in the layout, without a tag and so for ever; its layers stay for this one
  if (yield* Effect.orElseSucceed(fs.exists(path.join(own, "index.json")), () => false)) {
    const { manifests } = yield* readIndex(reference, own)
    if (manifests?.some(({ annotations }) => annotations?.[refName] === tag) === true) {
      yield* tool(["umoci", "rm", "--image", `${own}:${tag}`])
    }
  }
  yield* tool([
    "skopeo",
    ...(hasPolicy ? [] : ["--insecure-policy"]),
    ...["--override-os", "linux", "copy", "--quiet"],
    ...(loopback ? ["--src-tls-verify=false"] : []),
    reference,
    `oci:${own}:${tag}`
  ]).pipe(
    Effect.mapError((cause) => (cause.code === "PROVISION_INSTALL_HOOK_FAILED" ? notBrought(reference, cause) : cause))
  )
})

/** Applies the layers to `tree`, which is made; what they hold in all is counted at the same time. */
export const unpack = Effect.fn("Oci.unpack")(function* (
  { id, layers, layout, tag }: OciImage,
  tree: string,
  limitBytes: number,
  tool: Tool
) {
  const apply = tool([
    "umoci",
    "raw",
    "unpack",
    ...(process.getuid?.() === 0 ? [] : ["--rootless"]),
    ...["--image", `${layout}:${tag}`, tree]
  ])
  // a layer may be a bomb: a program that only counts is ahead of one that writes, and ends it
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
        () =>
          new ProvisionError({
            code: "ROOTFS_IMG_TOO_LARGE",
            message: `the layers of ${id.slice(0, 12)} hold more than ${Math.ceil(limitBytes / 1024 ** 2)} MiB`,
            hint: "if it is to be that large, raise MACHINEN_IMAGE_LIMIT_MIB"
          })
      )
    )
  )
  yield* Effect.all([apply, count], { concurrency: 2 }).pipe(
    Effect.mapError((cause) =>
      cause.code === "PROVISION_INSTALL_HOOK_FAILED"
        ? invalid(id.slice(0, 12), "its layers cannot be applied", cause)
        : cause
    )
  )
})

/** Forgets the images in this host's layout that are not kept, and removes the layers that no image has any more. */
export const collect = Effect.fn("Oci.collect")(function* (own: string, keep: ReadonlySet<string>, tool: Tool) {
  const fs = yield* FileSystem.FileSystem
  yield* HostLock.withLock(`${own}.lock`, (cause) => unreadable(own, own, cause))(
    Effect.gen(function* () {
      if (!(yield* Effect.orElseSucceed(fs.exists(path.join(own, "index.json")), () => false))) return
      const manifests = (yield* readIndex(own, own)).manifests ?? []
      for (const { annotations, digest } of manifests) {
        const tag = annotations?.[refName]
        if (tag !== undefined && !keep.has(digest.slice("sha256:".length))) {
          yield* tool(["umoci", "rm", "--image", `${own}:${tag}`])
        }
      }
      yield* tool(["umoci", "gc", "--layout", own])
      // what a skopeo that was killed was writing; none is at work while we hold the lock
      for (const file of yield* Effect.orElseSucceed(fs.readDirectory(own), () => [])) {
        if (file.startsWith("oci-put-blob")) yield* Effect.ignore(fs.remove(path.join(own, file), { force: true }))
      }
    })
  )
})

const readIndex = Effect.fnUntraced(function* (reference: string, layout: string) {
  const text = yield* readDocument(reference, path.join(layout, "index.json"))
  return yield* Effect.mapError(Schema.decode(Index)(text), (cause) =>
    invalid(reference, "its index.json makes no sense", cause)
  )
})

const tagged = (
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

const read = Effect.fnUntraced(function* (reference: string, layout: string, tag: string, descriptor: Descriptor) {
  const blob = (digest: string) => path.join(layout, "blobs", "sha256", digest.slice("sha256:".length))
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
  const layers = yield* Effect.forEach(manifest.layers, ({ digest, mediaType }) => {
    const unpack = layerTypes.get(mediaType)
    return unpack === undefined ? unknownType(mediaType) : Effect.succeed({ file: blob(digest), unpack })
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
    // docker takes a relative one from the root
    cwd: WorkingDir == null || WorkingDir === "" ? undefined : path.posix.resolve("/", WorkingDir),
    user: User == null || User === "" ? undefined : User,
    exposedPorts: ExposedPorts == null ? undefined : Object.keys(ExposedPorts)
  }
  const given = Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined))
  return Schema.decodeUnknown(ImageConfig)(given).pipe(asInvalid(reference, "its configuration"))
}

const readDocument = Effect.fnUntraced(function* (reference: string, file: string) {
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

const invalid = (reference: string, why: string, cause?: unknown) =>
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

const notBrought = (reference: string, cause: ProvisionError) =>
  new ProvisionError({
    code: "IMAGE_PULL_FAILED",
    message: `${reference} could not be fetched: ${cause.message}`,
    hint: "is the name right, and can the registry be reached? `skopeo login` is for registries that ask who you are",
    cause
  })
