import { createHash, randomUUID } from "node:crypto"
import * as path from "node:path"
import { gunzipSync } from "node:zlib"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Context, Effect, Layer, Option, Schema, Stream } from "effect"
import { Assets } from "./Assets.ts"
import { type AssetError, BootError, ProvisionError } from "./domain/errors.ts"
import * as command from "./platform/command.ts"
import * as completeFile from "./platform/completeFile.ts"
import { Settings } from "./Settings.ts"

/** Base images that set-up provides, by the name a user gives. */
export const baseNames = ["micro", "debian"] as const
export type BaseName = (typeof baseNames)[number]
const isBaseName = (image: string): image is BaseName => (baseNames as ReadonlyArray<string>).includes(image)

/**
 * Root filesystems. A base is a read-only ext4 image shared by every VM that boots from it, built once for each tarball and found by its
 * sha256; what a VM writes goes to its own upper (design.md D4). Since no guest can write a base, its `.ok` marker means "complete and on
 * disk" and stays; an image without one (a build cut short) is built again.
 */
export class RootfsImage extends Context.Tag("machinen/RootfsImage")<
  RootfsImage,
  {
    /** The base for `micro`, `debian`, a rootfs tarball or an ext4 image. */
    readonly resolve: (image: string) => Effect.Effect<string, BootError | ProvisionError | AssetError>
    /** A caller's own ext4 image, to be attached as it is; gives its absolute path. */
    readonly checkDisk: (image: string) => Effect.Effect<string, BootError>
    /** The base built from a rootfs tarball. Any number of callers at once build it once. */
    readonly ensure: (tarball: string) => Effect.Effect<string, ProvisionError>
    /** An empty upper of that size, to be copied for a VM: almost all hole, so the copy is quick. */
    readonly upperTemplate: (sizeBytes: number) => Effect.Effect<string, ProvisionError>
  }
>() {
  static readonly layer = Layer.effect(
    RootfsImage,
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const executor = yield* CommandExecutor.CommandExecutor
      const settings = yield* Settings
      const assets = yield* Assets
      const cacheDir = path.join(settings.cacheDir, "rootfs")

      const tool = (argv: readonly [string, ...ReadonlyArray<string>]) =>
        command.run(argv, { LC_ALL: "C" }).pipe(
          Effect.provideService(CommandExecutor.CommandExecutor, executor),
          Effect.mapError(
            (cause) =>
              new ProvisionError({
                code: "ROOTFS_IMG_TOOL_MISSING",
                message: `${argv[0]} cannot be run`,
                hint: "run `machinen install`, or `machinen doctor` to see what is missing",
                cause
              })
          ),
          Effect.flatMap(({ code, stderr }) => (code === 0 ? Effect.void : toolFailed(argv, code, stderr)))
        )

      const mke2fs = Option.getOrElse(settings.mke2fs, () => "mke2fs")

      const publish = (target: string, build: (staging: string) => Effect.Effect<void, ProvisionError>) =>
        completeFile.publish(target, build).pipe(
          Effect.provideService(FileSystem.FileSystem, fs),
          Effect.mapError((e) => (e._tag === "ProvisionError" ? e : cacheFailed(cacheDir, e)))
        )

      const isComplete = (target: string) =>
        Effect.provideService(completeFile.isComplete(target), FileSystem.FileSystem, fs)

      const makeExt4 = (image: string, sizeBytes: number, options: ReadonlyArray<string>) =>
        Effect.gen(function* () {
          yield* fs.writeFile(image, new Uint8Array(0)).pipe(
            Effect.zipRight(fs.truncate(image, sizeBytes)),
            Effect.mapError((e) => cacheFailed(cacheDir, e))
          )
          yield* tool([mke2fs, "-q", "-F", "-t", "ext4", "-m", "0", ...options, image])
        })

      const upperTemplate = Effect.fn("RootfsImage.upperTemplate")(function* (sizeBytes: number) {
        const target = path.join(cacheDir, `upper-${sizeBytes}.ext4`)
        if (yield* isComplete(target)) return target
        yield* publish(target, (staging) =>
          makeExt4(path.join(staging, "image"), sizeBytes, [
            "-O",
            upperFeatures,
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
          ])
        )
        return target
      })

      /** A tarball's sha256, remembered for its path, size and times: hashing 100 MB on each boot would cost more than the boot. */
      const digest = Effect.fnUntraced(function* (tarball: string) {
        const info = yield* fs.stat(tarball)
        const stamp = [tarball, info.size, Option.map(info.mtime, Number), info.ino, info.dev].map(String).join("\n")
        const note = path.join(cacheDir, "digests", createHash("sha256").update(stamp).digest("hex").slice(0, 32))
        const known = yield* Effect.option(Effect.flatMap(fs.readFileString(note), Schema.decode(Sha256)))
        if (Option.isSome(known)) return known.value
        const hash = createHash("sha256")
        yield* Stream.runForEach(fs.stream(tarball, { chunkSize: 1024 * 1024 }), (chunk) =>
          Effect.sync(() => void hash.update(chunk))
        )
        const sha = hash.digest("hex")
        yield* fs.makeDirectory(path.dirname(note), { recursive: true })
        // a name of its own: others may be noting the same at the same time
        const draft = `${note}.${randomUUID()}`
        yield* fs.writeFileString(draft, sha).pipe(Effect.zipRight(fs.rename(draft, note)))
        return sha
      })

      const ensure = Effect.fn("RootfsImage.ensure")(function* (tarball: string) {
        const sha = yield* Effect.mapError(
          digest(tarball),
          (cause) =>
            new ProvisionError({
              code: "PROVISION_BASE_NOT_FOUND",
              message: `the rootfs tarball cannot be read: ${tarball}`,
              cause
            })
        )
        const target = path.join(cacheDir, `${sha}.img`)
        if (yield* isComplete(target)) return target
        yield* publish(target, (staging) =>
          Effect.gen(function* () {
            if (yield* fromPrebake(tarball, staging)) return
            const tree = path.join(staging, "tree")
            yield* Effect.mapError(fs.makeDirectory(tree), (e) => cacheFailed(cacheDir, e))
            yield* tool([
              "tar",
              "--extract",
              "--numeric-owner",
              "--xattrs",
              "--preserve-permissions",
              "--file",
              tarball,
              "--directory",
              tree
            ])
            yield* imageFromTree(tree, path.join(staging, "image"))
          })
        )
        return target
      })

      const imageFromTree = Effect.fnUntraced(function* (tree: string, image: string) {
        const entries = yield* Effect.mapError(fs.readDirectory(tree, { recursive: true }), (e) =>
          cacheFailed(cacheDir, e)
        )
        const sizes = yield* Effect.forEach(
          entries,
          (entry) =>
            Effect.match(fs.stat(path.join(tree, entry)), { onSuccess: (i) => Number(i.size), onFailure: () => 0 }),
          { concurrency: 32 }
        )
        const bytes = sizes.reduce((sum, size) => sum + Math.ceil(size / 4096) * 4096, 0)
        // Room for metadata; the file is sparse, so what is not needed costs nothing. Nothing is ever added to a base.
        const size = Math.ceil((bytes * 1.25 + 64 * 1024 * 1024) / 4096) * 4096
        yield* makeExt4(image, size, [
          "-O",
          "^has_journal,^resize_inode",
          "-N",
          String(entries.length + 4096),
          "-E",
          "lazy_itable_init=1,nodiscard",
          "-d",
          tree
        ])
      })

      /** `x.img.gz` beside `x.tar.gz`, when it holds an ext4 image: a build that was done before. Anything else is passed over. */
      const fromPrebake = Effect.fnUntraced(function* (tarball: string, staging: string) {
        const prebake = tarball.replace(/(\.tar)?(\.[a-z0-9]+)?$/, ".img.gz")
        const image = path.join(staging, "image")
        const unpacked = yield* Effect.gen(function* () {
          if (prebake === tarball || !(yield* fs.exists(prebake))) return false
          const source = yield* fs.readFile(prebake)
          yield* fs.writeFile(image, gunzipSync(source))
          return yield* isExt4(image)
        }).pipe(Effect.orElseSucceed(() => false))
        if (!unpacked) yield* Effect.ignore(fs.remove(image, { force: true }))
        return unpacked
      })

      const isExt4 = (image: string) =>
        Effect.scoped(
          Effect.gen(function* () {
            const file = yield* fs.open(image)
            yield* file.seek(ext4MagicOffset, "start")
            const bytes = yield* file.readAlloc(2)
            return Option.exists(bytes, (b) => b.length === 2 && b[0] === 0x53 && b[1] === 0xef)
          })
        )

      /** The absolute path of an existing file, and whether it holds ext4. */
      const inspect = Effect.fnUntraced(function* (image: string) {
        const file = path.resolve(image)
        const info = yield* Effect.mapError(fs.stat(file), (cause) => imageNotFound(image, cause))
        if (info.type !== "File") return yield* imageInvalid(image, "is not a file")
        const ext4 = yield* Effect.mapError(isExt4(file), (cause) => imageInvalid(image, "cannot be read", cause))
        return { file, ext4 }
      })

      return RootfsImage.of({
        ensure,
        upperTemplate,
        checkDisk: Effect.fn("RootfsImage.checkDisk")(function* (image) {
          const { ext4, file } = yield* inspect(image)
          return ext4 ? file : yield* imageInvalid(image, "is not an ext4 image")
        }),
        resolve: Effect.fn("RootfsImage.resolve")(function* (image) {
          if (isBaseName(image)) return yield* assets.base(image)
          const { ext4, file } = yield* inspect(image)
          return ext4 ? file : yield* ensure(file)
        })
      })
    })
  )
}

/** Superblock at 1024, s_magic 0x38 into it (Documentation/filesystems/ext4/super.rst). */
const ext4MagicOffset = 1024 + 0x38

/** Without reserved descriptor blocks an upper is 92 KiB instead of 1.2 MiB (lab/overlay-criu.md §3). */
const upperFeatures = "^resize_inode"

const Sha256 = Schema.String.pipe(Schema.pattern(/^[0-9a-f]{64}$/))

const imageNotFound = (image: string, cause: unknown) =>
  new BootError({
    code: "BOOT_IMAGE_NOT_FOUND",
    message: `there is no image "${image}"`,
    hint: `give ${baseNames.join(", ")}, or the path of a rootfs tarball or an ext4 image`,
    cause
  })

const imageInvalid = (image: string, why: string, cause?: unknown) =>
  new BootError({
    code: "BOOT_IMAGE_INVALID",
    message: `${image} ${why}`,
    hint: "give a rootfs tarball or an ext4 image",
    cause
  })

const toolFailed = (argv: ReadonlyArray<string>, code: number, stderr: string) => {
  // tar tells a short write by its length only
  const noSpace = /no space left on device|wrote only \d+ of \d+ bytes/i.test(stderr)
  return new ProvisionError({
    code: noSpace ? "ROOTFS_IMG_NO_SPACE" : "PROVISION_INSTALL_HOOK_FAILED",
    message: `${argv[0]} ended with code ${code}: ${stderr.trim().split("\n").slice(-3).join("; ")}`,
    hint: noSpace
      ? "free some space, or set MACHINEN_CACHE_DIR to a larger disk"
      : "is the tarball complete, and a root filesystem?"
  })
}

const cacheFailed = (cacheDir: string, cause: Error) =>
  new ProvisionError({
    code: "ROOTFS_IMG_IO",
    message: `the image cache cannot be written: ${cause.message}`,
    hint: `check the owner, the permissions and the free space of ${cacheDir}, or set MACHINEN_CACHE_DIR`,
    cause
  })
