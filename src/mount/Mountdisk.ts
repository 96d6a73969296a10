import { createHash, randomUUID } from "node:crypto"
import * as os from "node:os"
import * as path from "node:path"
import { CommandExecutor, FileSystem, type Error as PlatformErrors } from "@effect/platform"
import { Context, Data, Duration, Effect, Exit, Layer, Option, Schema } from "effect"
import { BootError, ProvisionError, type RegistryError } from "../errors.ts"
import { noSpace } from "../host/hostTools.ts"
import { RootfsImage } from "../image/RootfsImage.ts"
import { validateMounts } from "../machine/mountOptions.ts"
import { Registry } from "../machine/Registry.ts"
import * as atomicArtifact from "../platform/atomicArtifact.ts"
import { writeCacheFile } from "../platform/cacheFile.ts"
import * as fileState from "../platform/fileState.ts"
import { isFull } from "../platform/freeSpace.ts"
import { searchPath } from "../platform/searchPath.ts"
import * as streamCommand from "../platform/streamCommand.ts"
import * as hostTool from "../platform/tool.ts"
import { ToolFailed } from "../platform/tool.ts"
import * as treeScan from "../platform/treeScan.ts"
import { Settings } from "../Settings.ts"

/** A disk image of a host directory. */
export interface Lower {
  /** Path of a squashfs image. */
  readonly lowerPath: string
  /** Hash of the directory's content (platform/treeScan.ts). */
  readonly key: string
}

/** An image of a directory in the cache. */
export interface MountImage {
  readonly key: string
  readonly path: string
  readonly diskBytes: number
  /** Unix milliseconds. */
  readonly lastUsedAt: number
}

/** Options of an image of a host directory. */
export interface LowerOptions {
  /** Default: `mountdisk` in the cache directory. */
  readonly cacheDir?: string
  /** True: builds the image even when it is in the cache. Default false. */
  readonly force?: boolean
  readonly onPhase?: (name: string, ms: number) => void
}

/**
 * Host directories as disks for guests: a read-only squashfs image of the directory, found by content and shared by all VMs, and above it an
 * empty ext4 layer of the VM's own. A directory that has not changed costs one lstat per file, no read. Extended attributes are not copied and
 * not part of the key.
 */
export class Mountdisk extends Context.Tag("machinen/Mountdisk")<
  Mountdisk,
  {
    readonly cacheDir: string
    /** Path of this host's `mksquashfs`; `None` when it has none. */
    readonly tool: Effect.Effect<Option.Option<string>, BootError>
    readonly lower: (host: string, options?: LowerOptions) => Effect.Effect<Lower, BootError | ProvisionError>
    /** Path of an empty upper of that size, which is copied for each VM. */
    readonly upperTemplate: (sizeBytes: number) => Effect.Effect<string, BootError | ProvisionError>
    /** Makes such a copy in the directory of temporary files, for callers with a VMM of their own. The caller removes it. */
    readonly upper: (sizeBytes: number) => Effect.Effect<string, BootError | ProvisionError>
    /**
     * Removes images that were not used for `unusedForMs`, and the least recently used ones beyond 8 GiB in all. Returns what was removed, with
     * `dryRun` what would be. An image that was used within ten minutes, or that a VM uses, stays. Bundles have copies or links of their own.
     */
    readonly collect: (options: {
      readonly unusedForMs: number
      readonly dryRun?: boolean
    }) => Effect.Effect<ReadonlyArray<MountImage>, ProvisionError | RegistryError>
  }
>() {
  static readonly layer = Layer.effect(
    Mountdisk,
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const executor = yield* CommandExecutor.CommandExecutor
      const images = yield* RootfsImage
      const registry = yield* Registry
      const settings = yield* Settings
      const defaultCacheDir = path.join(settings.cacheDir, "mountdisk")
      const withFs = Effect.provideService(FileSystem.FileSystem, fs)

      const isProgram = (file: string) =>
        fs.stat(file).pipe(
          Effect.map((info) => info.type === "File" && (info.mode & 0o111) !== 0),
          Effect.orElseSucceed(() => false)
        )

      const tool = Effect.gen(function* () {
        if (Option.isSome(settings.mksquashfs)) {
          if (yield* isProgram(settings.mksquashfs.value)) return settings.mksquashfs
          return yield* toolMissing(`MACHINEN_MKSQUASHFS is not a program: ${settings.mksquashfs.value}`)
        }
        const places = searchPath().split(path.delimiter)
        return yield* Effect.findFirst(
          places.map((dir) => path.join(dir, "mksquashfs")),
          isProgram
        )
      })

      const directoryOf = Effect.fnUntraced(function* (given: string) {
        yield* withFs(checkHost(given, "the directory to mount"))
        return yield* Effect.mapError(fs.realPath(given), unreadable(given))
      })

      /** Whether a file has squashfs's magic number and the length that its superblock states: a quick check that finds truncated files. */
      const isSound = (image: string) =>
        Effect.scoped(
          Effect.gen(function* () {
            const file = yield* fs.open(image)
            const { size } = yield* file.stat
            const head = Buffer.from(Option.getOrElse(yield* file.readAlloc(superblockBytes), () => new Uint8Array(0)))
            return (
              head.length === superblockBytes &&
              head.readUInt32LE(0) === squashfsMagic &&
              head.readBigUInt64LE(bytesUsedOffset) <= size
            )
          })
        ).pipe(Effect.orElseSucceed(() => false))

      /** Whether the image can be used. It then counts as used now, so that `collect` does not remove it. */
      const isUsable = Effect.fnUntraced(function* (image: string) {
        const complete = yield* withFs(atomicArtifact.isComplete(image))
        if (!complete || !(yield* isSound(image))) return false
        // `collect` sets the marker aside before it looks for users: either it sees this use, or this finds no marker
        return yield* withFs(atomicArtifact.markUsed(image))
      })

      const squash = Effect.fnUntraced(function* (host: string, image: string) {
        const found = yield* tool
        if (Option.isNone(found)) return yield* toolMissing("there is no mksquashfs on this host")
        yield* Effect.scoped(
          Effect.gen(function* () {
            // mksquashfs removes an unfinished image: while we hold the file open, a disk that it has filled is still full
            yield* Effect.mapError(fs.open(image, { flag: "w" }), cacheFailed(path.dirname(image)))
            const { code, tail } = yield* streamCommand
              .run([found.value, host, image, ...squashOptions], { onLine: () => Effect.void, env: { LC_ALL: "C" } })
              .pipe(
                Effect.provideService(CommandExecutor.CommandExecutor, executor),
                Effect.mapError((cause) => toolMissing(`${found.value} cannot be run: ${cause.message}`))
              )
            if (code === 0) return
            const failed = new ToolFailed({ tool: found.value, code, stderr: tail.join("\n") })
            const full = yield* isFull(path.dirname(image))
            return yield* full ? noSpace(path.dirname(image), failed) : squashFailed(host, failed)
          })
        )
        const { size } = yield* Effect.mapError(fs.stat(image), cacheFailed(path.dirname(image)))
        // a virtual disk has whole sectors
        const whole = Math.ceil(Number(size) / sectorBytes) * sectorBytes
        yield* Effect.mapError(fs.truncate(image, whole), cacheFailed(path.dirname(image)))
      })

      const publish = <E>(dir: string, image: string, build: (staging: string) => Effect.Effect<void, E>) =>
        withFs(atomicArtifact.publish(image, build)).pipe(
          Effect.mapError((e) => (isPlatformError(e) ? cacheFailed(dir)(e) : e))
        )

      const remember = (memo: string, found: typeof Memo.Type) =>
        Effect.ignore(Effect.flatMap(Schema.encode(Memo)(found), (text) => writeCacheFile(fs, memo, text)))

      /** The images in the cache, the most recently used first. */
      const stored = Effect.gen(function* () {
        const names = yield* Effect.orElseSucceed(fs.readDirectory(defaultCacheDir), () => [])
        const found = yield* Effect.forEach(names, (name) => {
          const key = /^([0-9a-f]{64})\.sqfs$/.exec(name)?.[1]
          if (key === undefined) return Effect.succeedNone
          const file = path.join(defaultCacheDir, name)
          return Effect.option(
            Effect.gen(function* () {
              const [info, lastUsedAt] = yield* Effect.all([fs.stat(file), withFs(atomicArtifact.lastUsedAt(file))])
              const diskBytes = Option.getOrElse(info.blocks, () => 0) * 512
              return { key, path: file, diskBytes, lastUsedAt }
            })
          )
        })
        return found.flatMap(Option.toArray).sort((a, b) => b.lastUsedAt - a.lastUsedAt)
      })

      const collect = Effect.fn("Mountdisk.collect")(function* (options: {
        readonly unusedForMs: number
        readonly dryRun?: boolean
      }) {
        const now = Date.now()
        let bytes = 0
        const due = (yield* stored).filter(({ diskBytes, lastUsedAt }) => {
          bytes += diskBytes
          const isUnwanted = lastUsedAt <= now - options.unusedForMs || bytes > maxCacheBytes
          return isUnwanted && lastUsedAt <= now - recentMs
        })
        if (options.dryRun === true) return due
        const removed = yield* Effect.filter(due, (image) =>
          withFs(
            atomicArtifact.setAside(image.path)(
              Effect.gen(function* () {
                if ((yield* withFs(atomicArtifact.lastUsedAt(image.path))) > image.lastUsedAt) return false
                // when the VM's directory could not have a hard link, the VM uses the image under this name
                const vms = yield* registry.list
                if (vms.some(({ disks }) => disks?.some(({ path }) => path === image.path))) return false
                yield* fs.remove(image.path, { force: true })
                yield* fs.remove(atomicArtifact.asideMarker(image.path), { force: true })
                return true
              })
            )
          ).pipe(Effect.catchIf(isPlatformError, (e) => cacheFailed(defaultCacheDir)(e)))
        )
        yield* withFs(atomicArtifact.removeAbandoned(defaultCacheDir, now - recentMs))
        yield* forgetRemoved
        return removed
      })

      /** Removes memos of directories whose image is gone. */
      const forgetRemoved = Effect.gen(function* () {
        const memos = path.join(defaultCacheDir, "trees")
        for (const name of yield* fs.readDirectory(memos)) {
          const memo = path.join(memos, name)
          const known = yield* Effect.option(Effect.flatMap(fs.readFileString(memo), Schema.decode(Memo)))
          const isNeeded = Option.match(known, {
            onNone: () => Effect.succeed(false),
            onSome: ({ key }) => fs.exists(path.join(defaultCacheDir, `${key}.sqfs`))
          })
          if (!(yield* isNeeded)) yield* fs.remove(memo, { force: true })
        }
      }).pipe(Effect.ignore)

      /** Collects after each new image; failures are logged only. */
      const collectUnasked = collect({ unusedForMs: keptUnusedMs }).pipe(
        Effect.catchAll((error) => Effect.logWarning("images of mounted directories could not be removed", error))
      )

      const lower = Effect.fn("Mountdisk.lower")(function* (given: string, options: LowerOptions = {}) {
        const { cacheDir: dir = defaultCacheDir, force = false, onPhase } = options
        const phase =
          (name: string) =>
          <A, E, R>(effect: Effect.Effect<A, E, R>) =>
            Effect.map(Effect.timed(effect), ([took, a]) => {
              onPhase?.(name, Duration.toMillis(took))
              return a
            })
        const host = yield* directoryOf(given)
        const lowerOf = (key: string): Lower => ({ lowerPath: path.join(dir, `${key}.sqfs`), key })
        const memo = path.join(dir, "trees", `${createHash("sha256").update(host).digest("hex").slice(0, 32)}.json`)

        const began = Date.now()
        const tree = yield* Effect.mapError(treeScan.scan(host), unreadable(host))
        const known = yield* Effect.option(Effect.flatMap(fs.readFileString(memo), Schema.decode(Memo)))
        if (!force && Option.isSome(known) && known.value.stamp === tree.stamp) {
          const found = lowerOf(known.value.key)
          if (yield* isUsable(found.lowerPath)) return found
        }

        const key = yield* treeScan
          .contentKey(host, tree)
          .pipe(Effect.mapError(unreadable(host)), phase("manifest-hash"))
        const wanted = lowerOf(key)
        if (force || !(yield* isUsable(wanted.lowerPath))) {
          yield* Effect.mapError(withFs(atomicArtifact.unmark(wanted.lowerPath)), cacheFailed(dir))
        }
        const build = (staging: string) =>
          Effect.gen(function* () {
            yield* squash(host, path.join(staging, "image")).pipe(phase("mksquashfs"))
            const now = yield* Effect.mapError(treeScan.scan(host), unreadable(host))
            if (now.stamp !== tree.stamp) return yield* new TreeChanged()
          })
        const isPublished = yield* publish(dir, wanted.lowerPath, build).pipe(
          phase("staging-rename"),
          Effect.as(true),
          Effect.catchTag("TreeChanged", () => Effect.succeed(false))
        )
        if (isPublished) {
          // a file that changes within one clock tick of the scan has the same times before and after the change
          if (tree.changedMs < began - fileState.clockTickMs) yield* remember(memo, { stamp: tree.stamp, key })
          yield* collectUnasked
          return wanted
        }
        // the directory keeps changing: its image is as inconsistent as any copy of it would be, and is used for this mount alone
        const once = lowerOf(createHash("sha256").update(`${key}${randomUUID()}`).digest("hex"))
        yield* publish(dir, once.lowerPath, (staging) => squash(host, path.join(staging, "image")))
        yield* collectUnasked
        return once
      })

      const upperTemplate = (sizeBytes: number) =>
        Effect.mapError(images.upperTemplate(sizeBytes), (error) =>
          error.code === "ROOTFS_IMG_TOOL_MISSING" ? toolMissing(error.message, error) : error
        )

      const upper = Effect.fn("Mountdisk.upper")(function* (sizeBytes: number) {
        yield* validateMounts({ mountDiskUpperSizeBytes: sizeBytes })
        const template = yield* upperTemplate(sizeBytes)
        const dir = os.tmpdir()
        const copy = path.join(dir, `machinen-upper-${randomUUID()}.ext4`)
        return yield* hostTool.run(["cp", "--sparse=always", "--reflink=auto", template, copy]).pipe(
          Effect.provideService(CommandExecutor.CommandExecutor, executor),
          Effect.mapError(cacheFailed(dir)),
          Effect.as(copy),
          Effect.onExit((exit) =>
            Exit.isSuccess(exit) ? Effect.void : Effect.ignore(fs.remove(copy, { force: true }))
          )
        )
      })

      return Mountdisk.of({ cacheDir: defaultCacheDir, tool, lower, upperTemplate, upper, collect })
    })
  )
}

/** Fails with BOOT_MOUNT_HOST_NOT_FOUND or BOOT_MOUNT_INVALID unless `host` is a directory of the host. */
export const checkHost = Effect.fn("Mountdisk.checkHost")(function* (
  host: string,
  what: string,
  allowed: { readonly file: boolean } = { file: false }
) {
  const fs = yield* FileSystem.FileSystem
  const info = yield* Effect.mapError(
    fs.stat(host),
    (cause) =>
      new BootError({
        code: "BOOT_MOUNT_HOST_NOT_FOUND",
        message: `${what} is not there: ${host}`,
        hint: `give an existing directory${allowed.file ? " or file" : ""} of the host`,
        cause
      })
  )
  if (info.type === "Directory" || (allowed.file && info.type === "File")) return
  return yield* new BootError({
    code: "BOOT_MOUNT_INVALID",
    message: `${what} is ${allowed.file ? "neither a directory nor a regular file" : "not a directory"}: ${host}`,
    hint: "mount the directory it is in"
  })
})

/** zstd's level 1 packs as small as gzip in a tenth of the time, and unpacks faster (measured). */
const squashOptions = ["-noappend", "-no-xattrs", "-no-progress", "-quiet", "-comp", "zstd", "-Xcompression-level", "1"]

/** squashfs's superblock (Documentation/filesystems/squashfs.rst): the magic number `hsqs`, and the length of the image at offset 40. */
const squashfsMagic = 0x73717368
const superblockBytes = 96
const bytesUsedOffset = 40
const sectorBytes = 512

/** Most bytes of all images in the cache. Beyond it the least recently used are removed, unless a VM uses them. */
const maxCacheBytes = 8 * 1024 ** 3
/** An image that was used within this time may be about to be used by a VM that is starting. */
const recentMs = 10 * 60_000
const keptUnusedMs = 7 * 24 * 3_600_000

/** The stamp of a directory at its last scan, and the key of its content then. */
const Memo = Schema.parseJson(Schema.Struct({ stamp: Schema.String, key: Schema.String }))

class TreeChanged extends Data.TaggedError("TreeChanged") {}

const isPlatformError = (e: unknown): e is PlatformErrors.PlatformError =>
  typeof e === "object" && e !== null && "_tag" in e && (e._tag === "SystemError" || e._tag === "BadArgument")

const toolMissing = (message: string, cause?: unknown) =>
  new BootError({
    code: "BOOT_MOUNTDISK_TOOL_MISSING",
    message,
    hint: "run `machinen install`, or share the directory as a live mount",
    cause
  })

const unreadable = (host: string) => (cause: Error) =>
  new BootError({
    code: "BOOT_MOUNT_INVALID",
    message: `${host} cannot be read: ${cause.message}`,
    hint: "check the permissions of what is in it",
    cause
  })

const squashFailed = (host: string, failed: ToolFailed) =>
  new BootError({
    code: "BOOT_MOUNTDISK_BUILD_FAILED",
    message: `no image could be made of ${host}: ${failed.message}`,
    hint: "can everything in the directory be read?",
    cause: failed
  })

const cacheFailed = (dir: string) => (cause: Error) =>
  new ProvisionError({
    code: "ROOTFS_IMG_IO",
    message: `the cache of mounted directories cannot be written: ${cause.message}`,
    hint: `check the owner, the permissions and the free space of ${dir}, or set MACHINEN_CACHE_DIR`,
    cause
  })
