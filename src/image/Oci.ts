import { createHash } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Option, Schema } from "effect"
import { ProvisionError } from "../errors.ts"
import { cacheUnwritable, explained } from "../host/hostTools.ts"
import { given } from "../platform/given.ts"
import * as HostLock from "../platform/HostLock.ts"
import * as processes from "../platform/processes.ts"
import { sha256File } from "../platform/sha256File.ts"
import type { ToolError, ToolFailed } from "../platform/tool.ts"
import { ImageConfig } from "./ImageConfig.ts"

/**
 * Container images: `docker://registry/name:tag`, `docker-archive:FILE`, `oci:DIR[:TAG]`. skopeo fetches them, umoci applies their layers;
 * manifest and configuration are read and checked here.
 *
 * The pool is a directory that holds the layers of the images in the store, each once by its digest, so that another image with the same layers
 * need not fetch them. Every pull has a layout of its own that begins with hard links to all of the pool. So pulls do not wait for each other,
 * and a layer that is removed from the pool meanwhile stays in the layouts that use it.
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

const manifestType = "application/vnd.oci.image.manifest.v1+json"
const configType = "application/vnd.oci.image.config.v1+json"
const plainLayer = "application/vnd.oci.image.layer.v1.tar"
const zstd = "zstd -dcq"
/** The media types of layers, each with the command that unpacks its tar stream. */
const layerTypes = new Map(
  [plainLayer, "application/vnd.oci.image.layer.nondistributable.v1.tar"].flatMap((type) => [
    [type, "cat"],
    [`${type}+gzip`, "gzip -dc"],
    [`${type}+zstd`, zstd]
  ])
)

const refName = "org.opencontainers.image.ref.name"
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

interface Blob {
  readonly file: string
  readonly descriptor: Descriptor
}

interface Layer extends Blob {
  /** The command that unpacks the layer to a tar stream. */
  readonly unpack: string
}

/** Runs a host program and returns its stdout. `name` is the program's name in errors, when another program starts it. */
export type Tool = (
  argv: readonly [string, ...ReadonlyArray<string>],
  name?: string
) => Effect.Effect<string, ToolError>

/** Time limit of a pull: a server that sends nothing must not hold up other processes that wait for the same image. */
const pullLimit = "1 hour"

/**
 * Runs `use` with the image of a reference, which is fetched first unless it is in a layout on this host. Pulls of one reference run one after
 * the other, so that the second finds what the first has fetched. Fails with IMAGE_PULL_FAILED, IMAGE_INVALID, IMAGE_NOT_FOUND or ROOTFS_IMG_*.
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
    // of an index of images for several architectures skopeo chooses one
    if (found.mediaType === manifestType && found.annotations?.[refName] !== undefined) {
      return yield* Effect.flatMap(read(reference, layout, found.annotations[refName], found), use)
    }
  }
  const key = createHash("sha256").update(reference).digest("hex").slice(0, 24)
  return yield* HostLock.withLock(
    HostLock.fileFor(path.join(pullsOf(own), key)),
    cacheUnwritable(own)
  )(
    Effect.scoped(
      Effect.gen(function* () {
        const layout = yield* pullLayout(own, key)
        yield* bring(reference, layout, tool)
        const index = yield* readIndex(reference, layout)
        const image = yield* read(reference, layout, pulledTag, yield* tagged(reference, index, pulledTag))
        const used = yield* use(image)
        yield* keepBlobs(image, own)
        return used
      })
    )
  )
})

const pulledTag = "pulled"
const poolOf = (own: string) => path.join(own, "blobs", "sha256")
const pullsOf = (own: string) => path.join(own, "pulls")
const blobOf = (layout: string, digest: string) => path.join(layout, "blobs", "sha256", digest.slice("sha256:".length))

/** Makes a layout that has every layer of the pool; the scope removes it. Its name holds the process, for the case that this one is killed. */
const pullLayout = Effect.fnUntraced(function* (own: string, key: string) {
  const fs = yield* FileSystem.FileSystem
  const me = yield* processes.self
  const boot = (yield* processes.bootId).slice(0, 8)
  const layout = path.join(pullsOf(own), `${key}-${me.pid}-${me.startTime}-${boot}`)
  const blobs = path.join(layout, "blobs", "sha256")
  yield* removeDeadPulls(own)
  return yield* Effect.acquireRelease(
    Effect.gen(function* () {
      yield* fs.makeDirectory(blobs, { recursive: true, mode: 0o700 })
      for (const name of yield* Effect.orElseSucceed(fs.readDirectory(poolOf(own)), () => [])) {
        // a layer that is removed from the pool at this moment is fetched again
        yield* Effect.ignore(fs.link(path.join(poolOf(own), name), path.join(blobs, name)))
      }
      return layout
    }).pipe(Effect.mapError(cacheUnwritable(own))),
    () => Effect.ignore(fs.remove(layout, { recursive: true, force: true }))
  )
})

/** Removes the layouts of killed processes. */
const removeDeadPulls = Effect.fnUntraced(function* (own: string) {
  const fs = yield* FileSystem.FileSystem
  const boot = (yield* processes.bootId).slice(0, 8)
  for (const name of yield* Effect.orElseSucceed(fs.readDirectory(pullsOf(own)), () => [])) {
    const [, pid, startTime, madeIn] = name.split("-")
    const isAlive = yield* processes.isAlive({ pid: Number(pid), startTime: Number(startTime) })
    if (madeIn === boot && isAlive) continue
    yield* Effect.ignore(fs.remove(path.join(pullsOf(own), name), { recursive: true, force: true }))
  }
})

/** Adds the blobs of a built image to the pool: the build has checked their digests. */
const keepBlobs = Effect.fnUntraced(function* ({ configBlob, id, layers, layout }: OciImage, own: string) {
  const fs = yield* FileSystem.FileSystem
  yield* Effect.ignore(fs.makeDirectory(poolOf(own), { recursive: true, mode: 0o700 }))
  for (const file of [blobOf(layout, `sha256:${id}`), configBlob.file, ...layers.map(({ file }) => file)]) {
    yield* Effect.ignore(fs.link(file, path.join(poolOf(own), path.basename(file))))
  }
})

const bring = Effect.fnUntraced(function* (reference: string, layout: string, tool: Tool) {
  const fs = yield* FileSystem.FileSystem
  const hasPolicy = yield* Effect.orElseSucceed(fs.exists("/etc/containers/policy.json"), () => false)
  const host = /^docker:\/\/(\[::1\]|[^/:]+)/.exec(reference)?.[1] ?? ""
  // as in docker, a registry on the loopback interface needs no certificate
  const loopback = host === "localhost" || host === "[::1]" || /^127\.[0-9.]+$/.test(host)
  const skopeo = ["skopeo", ...(hasPolicy ? [] : ["--insecure-policy"]), "--override-os", "linux"] as const
  const copy = tool([
    ...skopeo,
    ...["copy", "--quiet"],
    ...(loopback ? ["--src-tls-verify=false"] : []),
    reference,
    `oci:${layout}:${pulledTag}`
  ])
  const inspect = tool([
    ...skopeo,
    ...["--command-timeout", "1m", "inspect", "--raw"],
    ...(loopback ? ["--tls-verify=false"] : []),
    reference
  ])
  yield* copy.pipe(
    Effect.catchTag("ToolFailed", (failed) =>
      Effect.flatMap(whyNotBrought(reference, inspect), Effect.zipRight(failed))
    ),
    explained(layout, (failed) => notBrought(reference, failed)),
    Effect.timeoutFail({ duration: pullLimit, onTimeout: () => notBroughtInTime(reference) })
  )
})

const IndexOfMachines = Schema.parseJson(
  Schema.Struct({
    manifests: Schema.Array(
      Schema.Struct({
        platform: Schema.optional(Schema.Struct({ architecture: Schema.String, os: Schema.String }))
      })
    )
  })
)

/** Fails with IMAGE_INVALID when the reference is an index without an image for linux/amd64. Completes when the pull failed for another reason. */
const whyNotBrought = (reference: string, inspect: Effect.Effect<string, ToolError>) =>
  inspect.pipe(
    Effect.flatMap(Schema.decode(IndexOfMachines)),
    Effect.option,
    Effect.map((index) => {
      const platforms = Option.match(index, {
        onNone: () => [],
        onSome: ({ manifests }) => manifests.flatMap(({ platform }) => platform ?? [])
      })
      const known = platforms.filter(({ os }) => os !== "unknown")
      const fits = known.some(({ architecture, os }) => architecture === "amd64" && os === "linux")
      if (known.length === 0 || fits) return Effect.void
      const names = [...new Set(known.map(({ architecture, os }) => `${os}/${architecture}`.slice(0, 60)))]
      return new ProvisionError({
        code: "IMAGE_INVALID",
        message: `${reference} is there for ${names.slice(0, 20).join(", ")}, and not for linux/amd64, which guests are`,
        hint: "use an image that was built for linux/amd64"
      })
    })
  )

/**
 * Applies the layers to `tree`, which is made. `work` is an empty directory for temporary files. Fails with ROOTFS_IMG_TOO_LARGE when the layers
 * hold more than `limitBytes`.
 */
export const unpack = Effect.fn("Oci.unpack")(function* (
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
  const entry = { mediaType: manifestType, digest, size: manifest.length, annotations: { [refName]: pulledTag } }
  for (const [file, text] of [
    [blobOf(work, digest), manifest],
    [path.join(work, "index.json"), JSON.stringify({ schemaVersion: 2, manifests: [entry] })],
    [path.join(work, "oci-layout"), JSON.stringify({ imageLayoutVersion: "1.0.0" })]
  ] as const) {
    yield* written(fs.writeFileString(file, text))
  }
  return { ...image, layout: work, tag: pulledTag, layers }
})

/** Removes blobs from the pool whose images are not in `keep`. Running pulls have links of their own. */
export const collect = Effect.fn("Oci.collect")(function* (own: string, keep: ReadonlySet<string>) {
  const fs = yield* FileSystem.FileSystem
  yield* removeDeadPulls(own)
  const pool = poolOf(own)
  const all = yield* Effect.orElseSucceed(fs.readDirectory(pool), () => [])
  const needed = yield* Effect.forEach(
    all.filter((name) => keep.has(name)),
    (id) =>
      readDocument(id, path.join(pool, id)).pipe(
        Effect.flatMap(Schema.decode(Manifest)),
        Effect.map(({ config, layers }) => [
          id,
          ...[config, ...layers].map(({ digest }) => digest.slice("sha256:".length))
        ]),
        Effect.orElseSucceed(() => [])
      )
  )
  const kept = new Set(needed.flat())
  for (const name of all) {
    if (!kept.has(name)) yield* Effect.ignore(fs.remove(path.join(pool, name), { force: true }))
  }
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

const notBrought = (reference: string, cause: Error) =>
  new ProvisionError({
    code: "IMAGE_PULL_FAILED",
    message: `${reference} could not be fetched: ${cause.message}`,
    hint: "is the name right, and can the registry be reached? `skopeo login` is for registries that ask who you are",
    cause
  })

const notBroughtInTime = (reference: string) =>
  new ProvisionError({
    code: "IMAGE_PULL_FAILED",
    message: `${reference} could not be fetched within ${pullLimit}`,
    hint: "try again: layers that an earlier image had are not fetched again"
  })
