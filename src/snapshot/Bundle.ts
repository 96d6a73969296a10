import { createHash } from "node:crypto"
import * as path from "node:path"
import { FileSystem, type Error as PlatformErrors } from "@effect/platform"
import { Effect, Ref, Schema } from "effect"
import { BootError, SnapshotError } from "../errors.ts"
import { validateMounts } from "../machine/mountOptions.ts"
import { given } from "../platform/given.ts"
import { ProcessIdentity } from "../platform/ProcessIdentity.ts"
import { probeHash } from "../platform/probeHash.ts"
import * as processes from "../platform/processes.ts"
import * as BundleKey from "./BundleKey.ts"
import { BundleManifest } from "./BundleManifest.ts"
import { FileHasher } from "./FileHasher.ts"

/** A bundle on disk whose manifest is sound. */
export interface Bundle {
  /** Absolute. */
  readonly dir: string
  readonly manifest: BundleManifest
  /** This user's machinen wrote the manifest, and nobody has changed it. Another's is input: nothing it records is done unasked. */
  readonly isOwn: boolean
}

/** A directory taken for a bundle in the making. */
export interface Claim {
  readonly dir: string
  /** What goes if the bundle is not kept: the directory, when it was made for this, else what may be in it. */
  readonly remove: ReadonlyArray<string>
  /** The bundle is finished and committed: closing the scope, however it ends, does not remove it any more. */
  readonly keep: Effect.Effect<void>
}

const manifestFile = "meta.json"
const draftFile = "meta.json.partial"
/**
 * Made first and exclusively: of two that want one directory, one is refused. A symbolic link, whose text is its maker, since that is there
 * with it at once; a file could be left empty by a maker that is killed.
 */
const claimFile = "claim"

/** The files an unfinished bundle may hold; the directory itself was there before and stays. */
const mayHold = (dir: string, blobs: ReadonlyArray<string>) =>
  [...blobs, draftFile, claimFile].map((name) => path.join(dir, name))

/**
 * Takes `outDir` for a bundle: it must not exist, parents included if need be, or be empty. Closing the scope removes what was made, unless
 * it was to be kept by then.
 */
export const claim = Effect.fn("Bundle.claim")(function* (outDir: string, blobs: ReadonlyArray<string>) {
  const fs = yield* FileSystem.FileSystem
  const { dir, missing } = yield* checkDir(outDir)
  const [topmost] = missing
  const remove = topmost === undefined ? mayHold(dir, blobs) : [topmost]
  const me = yield* processes.self
  const kept = yield* Ref.make(false)
  yield* Effect.acquireRelease(
    Effect.gen(function* () {
      // one by one: Node's recursive mkdir never returns where a file system refuses to make directories
      yield* Effect.forEach(missing, (at) => Effect.catchIf(fs.makeDirectory(at), alreadyExists, () => Effect.void))
      yield* fs.symlink(JSON.stringify(me), path.join(dir, claimFile))
    }).pipe(
      Effect.tapError(() => Effect.forEach([...missing].reverse(), removeIfEmpty)),
      Effect.mapError((cause) =>
        alreadyExists(cause) ? notEmpty(dir, "is being written by another snapshot") : unusable(dir)(cause)
      )
    ),
    () =>
      Effect.unlessEffect(
        Effect.forEach(remove, (file) => Effect.ignore(fs.remove(file, { recursive: true, force: true }))),
        Ref.get(kept)
      )
  )
  const claimed: Claim = { dir, remove, keep: Ref.set(kept, true) }
  return claimed
})

const alreadyExists = (e: PlatformErrors.PlatformError) => e._tag === "SystemError" && e.reason === "AlreadyExists"

/** What somebody else has put something into meanwhile stays. */
const removeIfEmpty = (dir: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) =>
    Effect.whenEffect(
      fs.remove(dir, { recursive: true }),
      Effect.map(fs.readDirectory(dir), (inside) => inside.length === 0)
    )
  ).pipe(Effect.ignore)

/** Whether a bundle can be made there; and the directories that would have to be made first, the topmost first. */
export const checkDir = Effect.fn("Bundle.checkDir")(function* (outDir: string) {
  const fs = yield* FileSystem.FileSystem
  const dir = path.resolve(outDir)
  const missing: Array<string> = []
  for (let at = dir; !(yield* Effect.mapError(fs.exists(at), unusable(dir))); at = path.dirname(at)) missing.unshift(at)
  if (missing.length > 0) return { dir, missing }
  const info = yield* Effect.mapError(fs.stat(dir), unusable(dir))
  if (info.type !== "Directory") return yield* notEmpty(dir, "is a file")
  const inside = yield* Effect.mapError(fs.readDirectory(dir), unusable(dir))
  const [only] = inside
  if (only === claimFile && inside.length === 1 && (yield* isStale(path.join(dir, claimFile)))) {
    yield* Effect.ignore(fs.remove(path.join(dir, claimFile), { force: true }))
    return { dir, missing }
  }
  if (only !== undefined) return yield* notEmpty(dir, "is not empty")
  return { dir, missing }
})

/** A claim whose maker was killed before there was anything else. */
const isStale = (claim: string) =>
  Effect.gen(function* () {
    const fs = yield* FileSystem.FileSystem
    const maker = yield* Schema.decode(Schema.parseJson(ProcessIdentity))(yield* fs.readLink(claim))
    return !(yield* processes.isAlive(maker))
  }).pipe(Effect.orElseSucceed(() => false))

export type Facts = Omit<typeof BundleManifest.Encoded, "blobs" | "format">

/** Makes what lies in the directory a bundle: every blob on disk and hashed, then the manifest, by rename. */
export const finish = Effect.fn("Bundle.finish")(
  function* (dir: string, blobs: ReadonlyArray<string>, facts: Facts) {
    const fs = yield* FileSystem.FileSystem
    const digests = yield* FileHasher
    const files = blobs.map((name) => path.join(dir, name))
    const [hashes, probes] = yield* Effect.all(
      [digests.of(files), Effect.forEach(files, probeHash), Effect.forEach(files, sync)],
      { concurrency: 3 }
    )
    const manifest = yield* Schema.decode(BundleManifest)({
      ...facts,
      format: 1,
      blobs: blobs.flatMap((name, i) => {
        const [digest, probe] = [hashes[i], probes[i]]
        return digest === undefined || probe === undefined ? [] : [{ name, ...digest, probe }]
      })
    })
    yield* fs.remove(path.join(dir, claimFile))
    const draft = path.join(dir, draftFile)
    yield* fs.writeFileString(draft, yield* seal(yield* Schema.encode(BundleManifest)(manifest)))
    yield* sync(draft)
    yield* fs.rename(draft, path.join(dir, manifestFile))
    yield* sync(dir)
    yield* sync(path.dirname(dir))
    const bundle: Bundle = { dir, manifest, isOwn: true }
    return bundle
  },
  (effect, dir) =>
    Effect.mapError(
      effect,
      (cause) =>
        new SnapshotError({
          code: "SNAPSHOT_DUMP_FAILED",
          message: `the bundle ${dir} could not be finished: ${cause.message}`,
          hint: "check the free space and the permissions there",
          cause
        })
    )
)

const sync = (file: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) =>
    Effect.scoped(Effect.flatMap(fs.open(file, { flag: "r" }), (handle) => handle.sync))
  )

const checksum = (text: string) => createHash("sha256").update(text).digest("hex")

/**
 * The manifest's text with its hash, so that a damaged one is known for what it is, and with its MAC under the user's own key, so that the
 * user's own bundles are told from others.
 */
const seal = (encoded: typeof BundleManifest.Encoded) => {
  const text = JSON.stringify(encoded)
  return Effect.map(BundleKey.sign(text), (mac) => JSON.stringify({ ...encoded, checksum: checksum(text), mac }))
}

const Sealed = Schema.parseJson(
  Schema.Struct(
    { checksum: Schema.String, mac: Schema.optional(Schema.String) },
    Schema.Record({ key: Schema.String, value: Schema.Unknown })
  )
)

/** Far more than a manifest has; whoever made the bundle decides what is read here. */
const maxManifestBytes = 1024 * 1024

/** A file of the bundle's directory itself: a link would give the guest, or us, another file of this host. */
const sizeOfRegular = Effect.fnUntraced(function* (file: string) {
  const fs = yield* FileSystem.FileSystem
  const isLink = yield* Effect.isSuccess(fs.readLink(file))
  const { size, type } = yield* fs.stat(file)
  if (isLink || type !== "File") return yield* Effect.fail(new Error(`${path.basename(file)} is not a regular file`))
  return Number(size)
})

/** Reads the manifest of a bundle. */
export const read = Effect.fn("Bundle.read")(function* (snapDir: string) {
  const fs = yield* FileSystem.FileSystem
  const dir = path.resolve(snapDir)
  const file = path.join(dir, manifestFile)
  const size = yield* Effect.mapError(sizeOfRegular(file), (cause) => noBundle(dir, cause))
  if (size > maxManifestBytes) return yield* damaged(dir, `${manifestFile} has ${size} bytes`)
  const text = yield* Effect.mapError(fs.readFileString(file), (cause) => noBundle(dir, cause))
  const {
    checksum: stated,
    mac,
    ...rest
  } = yield* Effect.mapError(Schema.decode(Sealed)(text), (cause) =>
    damaged(dir, `${manifestFile} cannot be read`, cause)
  )
  if (rest["format"] !== 1) {
    return yield* new BootError({
      code: "BOOT_SNAPSHOT_MISMATCH",
      message: `the bundle ${dir} has format ${String(rest["format"])}; this version reads format 1`,
      hint: "restore it with the version that made it, or take the snapshot again"
    })
  }
  const signed = JSON.stringify(rest)
  if (checksum(signed) !== stated) return yield* damaged(dir, `${manifestFile} does not match its checksum`)
  const manifest = yield* Effect.mapError(Schema.decodeUnknown(BundleManifest)(rest), (cause) =>
    damaged(dir, `${manifestFile} lacks something, or has something else than a manifest has`, cause)
  )
  const names = manifest.blobs.map(({ name }) => name)
  const used = manifest.disks.flatMap(({ source }) => (source._tag === "Blob" ? [source.name] : []))
  if (new Set(names).size !== names.length || used.some((name) => !names.includes(name))) {
    return yield* damaged(dir, `${manifestFile} contradicts itself about the files there are`)
  }
  yield* Effect.mapError(checkRecorded(manifest), ({ message }) => damaged(dir, message))
  const bundle: Bundle = { dir, manifest, isOwn: mac !== undefined && (yield* BundleKey.isSignedBy(signed, mac)) }
  return bundle
})

/** What a manifest says of mounts and disks holds for its own bundle too: places and paths are those a boot would have accepted. */
const checkRecorded = Effect.fnUntraced(function* ({ disks, liveMounts = [], mount }: BundleManifest) {
  const plan = yield* validateMounts({ liveMounts, ...given({ mount }) })
  const images = disks.flatMap(({ source }) => (source._tag === "Image" ? [source.path] : []))
  const recorded = [...images, ...[mount ?? [], liveMounts].flat().map(({ host }) => host)]
  const relative = recorded.find((file) => !path.isAbsolute(file))
  if (relative !== undefined) return yield* wrongRecord(`${JSON.stringify(relative)} is not an absolute path`)
  const places = [plan.mount ?? [], plan.liveMounts].flat().map(({ guest }) => guest)
  const stated = [mount ?? [], liveMounts].flat().map(({ guest }) => guest)
  const other = stated.find((guest, i) => guest !== places[i])
  if (other !== undefined) return yield* wrongRecord(`${JSON.stringify(other)} is no place for a mount`)
  const ids = disks.map(({ id }) => id)
  if (new Set(ids).size !== ids.length) return yield* wrongRecord("it has two disks of one kind")
})

const wrongRecord = (message: string) => Effect.fail(new Error(message))

/**
 * Looks whether the blobs are those of the manifest, by size and by both ends of each: fast enough for every restore. A file that was cut is
 * found here, before a machine maps it. `needed`: what a bundle of its engine has in any case.
 */
export const check = Effect.fn("Bundle.check")(function* ({ dir, manifest }: Bundle, needed: ReadonlyArray<string>) {
  const fs = yield* FileSystem.FileSystem
  const missing = needed.find((name) => !manifest.blobs.some((blob) => blob.name === name))
  if (missing !== undefined) return yield* damaged(dir, `${manifestFile} does not list "${missing}"`)
  yield* Effect.forEach(
    manifest.blobs,
    ({ name, probe, sizeBytes }) =>
      Effect.gen(function* () {
        const file = path.join(dir, name)
        if (!(yield* Effect.mapError(fs.exists(file), (cause) => damaged(dir, `${name} cannot be found`, cause)))) {
          return yield* damaged(dir, `${name} is missing`)
        }
        const size = yield* Effect.mapError(sizeOfRegular(file), (cause) => damaged(dir, cause.message, cause))
        if (size !== sizeBytes) {
          return yield* damaged(dir, `${name} has ${size} bytes instead of ${sizeBytes}`)
        }
        const found = yield* Effect.mapError(probeHash(file), (cause) => damaged(dir, `${name} cannot be read`, cause))
        if (found !== probe) return yield* damaged(dir, `${name} is not the file this snapshot was made with`)
      }),
    { concurrency: 4, discard: true }
  )
})

/** Reads every byte of data in a bundle; returns the names of the blobs that are not what they were. */
export const verify = Effect.fn("Bundle.verify")(function* ({ dir, manifest }: Bundle) {
  const digests = yield* FileHasher
  return yield* Effect.filter(
    manifest.blobs,
    ({ name, sha256, sizeBytes }) =>
      sizeOfRegular(path.join(dir, name)).pipe(
        Effect.zipRight(digests.of([path.join(dir, name)])),
        Effect.map(([found]) => found?.sha256 !== sha256 || found.sizeBytes !== sizeBytes),
        Effect.orElseSucceed(() => true)
      ),
    { concurrency: 2 }
  ).pipe(Effect.map((bad) => bad.map(({ name }) => name)))
})

const unusable = (dir: string) => (cause: PlatformErrors.PlatformError) =>
  new SnapshotError({
    code: "SNAPSHOT_DUMP_FAILED",
    message: `${dir} cannot be used for a bundle: ${cause.message}`,
    hint: "choose a directory that can be made or is empty",
    cause
  })

const notEmpty = (dir: string, why: string) =>
  new SnapshotError({
    code: "SNAPSHOT_DUMP_FAILED",
    message: `${dir} ${why}; nothing was touched`,
    hint: "choose a directory that does not exist yet, or an empty one"
  })

const noBundle = (dir: string, cause: unknown) =>
  new BootError({
    code: "BOOT_SNAPSHOT_NOT_FOUND",
    message: `there is no snapshot in ${dir}: it has no ${manifestFile}`,
    hint: "give the directory `machinen snapshot` made; one that was interrupted is none",
    cause
  })

const damaged = (dir: string, what: string, cause?: unknown) =>
  new BootError({
    code: "BOOT_SNAPSHOT_INVALID",
    message: `the bundle ${dir} is damaged: ${what}`,
    hint: "`machinen snapshot verify` reads all of it; a damaged bundle cannot be mended, take the snapshot again",
    cause
  })
