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

/** A bundle on disk whose manifest has been checked. */
export interface Bundle {
  /** Absolute path. */
  readonly dir: string
  readonly manifest: BundleManifest
  /** This user's machinen wrote the manifest, and it is unchanged. Another bundle is untrusted input: a restore must ask for what it records. */
  readonly isOwn: boolean
}

/** A directory that is claimed for a bundle in the making. */
export interface Claim {
  readonly dir: string
  /** Paths that are removed if the bundle is not kept: the directory, when it was made for the bundle, else what may be in it. */
  readonly remove: ReadonlyArray<string>
  /** Keeps the bundle: closing the scope does not remove it any more. */
  readonly keep: Effect.Effect<void>
}

const manifestFile = "meta.json"
const draftFile = "meta.json.partial"
/**
 * The claim is made first and exclusively: of two makers that want one directory, one is refused. It is a symbolic link whose text names its
 * maker, because link and text appear at once. A file could be left empty by a maker that is killed.
 */
const claimFile = "claim"

/** The files that an unfinished bundle may hold, for a directory that was there before and stays. */
const mayHold = (dir: string, blobs: ReadonlyArray<string>) =>
  [...blobs, draftFile, claimFile].map((name) => path.join(dir, name))

/**
 * Claims `outDir` for a bundle: the directory must not exist, or be empty. Missing parents are made. Closing the scope removes what was made,
 * unless `keep` was run before. Fails with SNAPSHOT_DUMP_FAILED.
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
      // one by one: Node's recursive mkdir never returns on a file system that refuses to make directories
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

/** Removes a directory, unless another process has put a file into it meanwhile. */
const removeIfEmpty = (dir: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) =>
    Effect.whenEffect(
      fs.remove(dir, { recursive: true }),
      Effect.map(fs.readDirectory(dir), (inside) => inside.length === 0)
    )
  ).pipe(Effect.ignore)

/** Fails unless a bundle can be made there. Returns the directories that would have to be made first, the topmost one first. */
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

/** Whether a claim's maker has been killed before it made any other file. */
const isStale = (claim: string) =>
  Effect.gen(function* () {
    const fs = yield* FileSystem.FileSystem
    const maker = yield* Schema.decode(Schema.parseJson(ProcessIdentity))(yield* fs.readLink(claim))
    return !(yield* processes.isAlive(maker))
  }).pipe(Effect.orElseSucceed(() => false))

export type Facts = Omit<typeof BundleManifest.Encoded, "blobs" | "format">

/** Makes the files in the directory a bundle: syncs and hashes every blob, then writes the manifest by rename. */
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
 * The manifest's text with its hash, which tells damage, and with its MAC under the user's own key, which tells the user's own bundles from
 * others (docs/protocol.md §6).
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

/** Far more than a manifest needs. A hostile maker must not decide how much is read. */
const maxManifestBytes = 1024 * 1024

/** The size of a regular file of the bundle. Fails on a link: it would give the guest, or this process, another file of this host. */
const sizeOfRegular = Effect.fnUntraced(function* (file: string) {
  const fs = yield* FileSystem.FileSystem
  const isLink = yield* Effect.isSuccess(fs.readLink(file))
  const { size, type } = yield* fs.stat(file)
  if (isLink || type !== "File") return yield* Effect.fail(new Error(`${path.basename(file)} is not a regular file`))
  return Number(size)
})

/** Reads and checks the manifest of a bundle. Fails with BOOT_SNAPSHOT_NOT_FOUND, BOOT_SNAPSHOT_INVALID, BOOT_SNAPSHOT_MISMATCH (format). */
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

/** Checks the mounts and disks of a manifest, by the rules of a boot. */
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
 * Compares the blobs with the manifest, by size and by a probe of up to 3 MiB each: fast enough for every restore. Finds truncated files before a
 * machine maps them. `needed` are blobs that every bundle of the engine has. Fails with BOOT_SNAPSHOT_INVALID.
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

/** Reads every byte of data in a bundle. Returns the names of the blobs that differ from the manifest. */
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
