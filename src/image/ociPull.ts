import { createHash } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Option, Schema } from "effect"
import { ProvisionError } from "../errors.ts"
import { cacheUnwritable, explained, type Tool } from "../host/hostTools.ts"
import * as HostLock from "../platform/HostLock.ts"
import * as processes from "../platform/processes.ts"
import type { ToolError } from "../platform/tool.ts"
import {
  blobOf,
  Manifest,
  manifestType,
  type OciImage,
  readDocument,
  readImage,
  readIndex,
  refName,
  tagged
} from "./ociLayout.ts"

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

/** Time limit of a pull: a server that sends nothing must not hold up other processes that wait for the same image. */
const pullLimit = "1 hour"

/**
 * Runs `use` with the image of a reference, which is fetched first unless it is in a layout on this host. Pulls of one reference run one after
 * the other, so that the second finds what the first has fetched. Fails with IMAGE_PULL_FAILED, IMAGE_INVALID, IMAGE_NOT_FOUND or ROOTFS_IMG_*.
 */
export const withImage = Effect.fn("ociPull.withImage")(function* <A, E, R>(
  reference: string,
  ociDirectory: string,
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
      return yield* Effect.flatMap(readImage(reference, layout, found.annotations[refName], found), use)
    }
  }
  const key = createHash("sha256").update(reference).digest("hex").slice(0, 24)
  return yield* HostLock.withLock(
    HostLock.fileFor(path.join(pullsOf(ociDirectory), key)),
    cacheUnwritable(ociDirectory)
  )(
    Effect.scoped(
      Effect.gen(function* () {
        const layout = yield* pullLayout(ociDirectory, key)
        yield* fetchImage(reference, layout, tool)
        const index = yield* readIndex(reference, layout)
        const image = yield* readImage(reference, layout, pulledTag, yield* tagged(reference, index, pulledTag))
        const used = yield* use(image)
        yield* keepBlobs(image, ociDirectory)
        return used
      })
    )
  )
})

const pulledTag = "pulled"
const poolOf = (ociDirectory: string) => path.join(ociDirectory, "blobs", "sha256")
const pullsOf = (ociDirectory: string) => path.join(ociDirectory, "pulls")

/** Makes a layout that has every layer of the pool; the scope removes it. Its name holds the process, for the case that this one is killed. */
const pullLayout = Effect.fnUntraced(function* (ociDirectory: string, key: string) {
  const fs = yield* FileSystem.FileSystem
  const me = yield* processes.self
  const boot = (yield* processes.bootId).slice(0, 8)
  const layout = path.join(pullsOf(ociDirectory), `${key}-${me.pid}-${me.startTime}-${boot}`)
  const blobs = path.join(layout, "blobs", "sha256")
  yield* removeDeadPulls(ociDirectory)
  return yield* Effect.acquireRelease(
    Effect.gen(function* () {
      yield* fs.makeDirectory(blobs, { recursive: true, mode: 0o700 })
      for (const name of yield* Effect.orElseSucceed(fs.readDirectory(poolOf(ociDirectory)), () => [])) {
        // a layer that is removed from the pool at this moment is fetched again
        yield* Effect.ignore(fs.link(path.join(poolOf(ociDirectory), name), path.join(blobs, name)))
      }
      return layout
    }).pipe(Effect.mapError(cacheUnwritable(ociDirectory))),
    () => Effect.ignore(fs.remove(layout, { recursive: true, force: true }))
  )
})

/** Removes the layouts of killed processes. */
const removeDeadPulls = Effect.fnUntraced(function* (ociDirectory: string) {
  const fs = yield* FileSystem.FileSystem
  const boot = (yield* processes.bootId).slice(0, 8)
  for (const name of yield* Effect.orElseSucceed(fs.readDirectory(pullsOf(ociDirectory)), () => [])) {
    const [, pid, startTime, madeIn] = name.split("-")
    const isAlive = yield* processes.isAlive({ pid: Number(pid), startTime: Number(startTime) })
    if (madeIn === boot && isAlive) continue
    yield* Effect.ignore(fs.remove(path.join(pullsOf(ociDirectory), name), { recursive: true, force: true }))
  }
})

/** Adds the blobs of a built image to the pool: the build has checked their digests. */
const keepBlobs = Effect.fnUntraced(function* ({ configBlob, id, layers, layout }: OciImage, ociDirectory: string) {
  const fs = yield* FileSystem.FileSystem
  yield* Effect.ignore(fs.makeDirectory(poolOf(ociDirectory), { recursive: true, mode: 0o700 }))
  for (const file of [blobOf(layout, `sha256:${id}`), configBlob.file, ...layers.map(({ file }) => file)]) {
    yield* Effect.ignore(fs.link(file, path.join(poolOf(ociDirectory), path.basename(file))))
  }
})

const fetchImage = Effect.fnUntraced(function* (reference: string, layout: string, tool: Tool) {
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
      Effect.flatMap(refuseOtherPlatforms(reference, inspect), Effect.zipRight(failed))
    ),
    explained(layout, (failed) => pullFailed(reference, failed)),
    Effect.timeoutFail({ duration: pullLimit, onTimeout: () => pullTimedOut(reference) })
  )
})

const PlatformIndex = Schema.parseJson(
  Schema.Struct({
    manifests: Schema.Array(
      Schema.Struct({
        platform: Schema.optional(Schema.Struct({ architecture: Schema.String, os: Schema.String }))
      })
    )
  })
)

/** Fails with IMAGE_INVALID when the reference is an index without an image for linux/amd64. Completes when the pull failed for another reason. */
const refuseOtherPlatforms = (reference: string, inspect: Effect.Effect<string, ToolError>) =>
  inspect.pipe(
    Effect.flatMap(Schema.decode(PlatformIndex)),
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

/** Removes blobs from the pool whose images are not in `keep`. Running pulls have links of their own. */
export const collect = Effect.fn("ociPull.collect")(function* (ociDirectory: string, keep: ReadonlySet<string>) {
  const fs = yield* FileSystem.FileSystem
  yield* removeDeadPulls(ociDirectory)
  const pool = poolOf(ociDirectory)
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

const pullFailed = (reference: string, cause: Error) =>
  new ProvisionError({
    code: "IMAGE_PULL_FAILED",
    message: `${reference} could not be fetched: ${cause.message}`,
    hint: "is the name right, and can the registry be reached? `skopeo login` is for registries that ask who you are",
    cause
  })

const pullTimedOut = (reference: string) =>
  new ProvisionError({
    code: "IMAGE_PULL_FAILED",
    message: `${reference} could not be fetched within ${pullLimit}`,
    hint: "try again: layers that an earlier image had are not fetched again"
  })
