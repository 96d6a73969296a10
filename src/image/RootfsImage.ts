import { createHash } from "node:crypto"
import * as path from "node:path"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Context, Effect, Either, Layer, Option, Schema } from "effect"
import { type AssetError, BootError, ProvisionError } from "../errors.ts"
import { Assets } from "../host/Assets.ts"
import { buildFailed, cacheUnwritable, explained, type Tool, toolMissing } from "../host/hostTools.ts"
import * as atomicArtifact from "../platform/atomicArtifact.ts"
import * as ext4 from "../platform/ext4.ts"
import * as fileState from "../platform/fileState.ts"
import { given } from "../platform/given.ts"
import { sha256File } from "../platform/sha256File.ts"
import * as hostTool from "../platform/tool.ts"
import { Settings } from "../Settings.ts"
import * as Ext4Builder from "./Ext4Builder.ts"
import { ImageId, ImageRecord, withTag } from "./Image.ts"
import { configFile, ImageConfig, ImageConfigJson, isEmpty } from "./ImageConfig.ts"
import * as ImageNames from "./ImageNames.ts"
import { unreadable } from "./ociLayout.ts"
import * as ociPull from "./ociPull.ts"
import * as ociUnpack from "./ociUnpack.ts"

/** Names of the base images that set-up provides. */
export const baseNames = ["micro", "debian"] as const
export type BaseName = (typeof baseNames)[number]
const isBaseName = (image: string): image is BaseName => (baseNames as ReadonlyArray<string>).includes(image)

/**
 * Root filesystems. A base is a read-only ext4 image that all VMs booted from it share. It is built once for each source and found by the
 * source's sha256. What a VM writes goes to its own upper. A base counts only with its `.ok` marker ("complete and on disk"); a base without it
 * comes from a build that was cut short, and is built again.
 */
export class RootfsImage extends Context.Tag("machinen/RootfsImage")<
  RootfsImage,
  {
    /**
     * Path of the base for `micro`, `debian`, a rootfs tarball, an ext4 image, a container image (src/image/ociPull.ts), or the name or id of an image in
     * the store. Builds the base if needed. A registry is asked only for images that are not in the store.
     */
    readonly resolve: (image: string) => Effect.Effect<string, BootError | ProvisionError | AssetError>
    /** Checks a caller's own ext4 image, which is attached as it is. Returns its absolute path. */
    readonly checkDisk: (image: string) => Effect.Effect<string, BootError>
    /** The configuration in an ext4 image (`machinen-config.json`); empty when the image has none. */
    readonly config: (image: string) => Effect.Effect<ImageConfig, ProvisionError>
    /** Path of the base of a rootfs tarball. Any number of concurrent callers build it once. */
    readonly ensure: (tarball: string) => Effect.Effect<string, ProvisionError>
    /** Adds an image of any kind to the store and returns its id. Always asks the registry of a container image. */
    readonly add: (image: string) => Effect.Effect<ImageId, BootError | ProvisionError>
    /** All names, with the ids of their images. */
    readonly names: Effect.Effect<ReadonlyArray<{ readonly name: string; readonly id: ImageId }>>
    /** Sets the image of a name; `None` removes the name. */
    readonly setName: (name: string, id: Option.Option<ImageId>) => Effect.Effect<void, ProvisionError>
    /** Removes the layers of container images that are no longer in the store. */
    readonly collectLayers: Effect.Effect<void, ProvisionError>
    /** Notes that the bundle at `dir`, which may be in the making, can be restored only with this image. */
    readonly noteBundle: (image: string, dir: string) => Effect.Effect<void>
    /** Path of an empty upper of that size, which is copied for each VM. The file is sparse, so the copy is quick. */
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

      /** Runs tools with a fixed time (E2FSPROGS_FAKE_TIME), so that the same input gives the same image. */
      const tool: Tool = (argv, name) =>
        hostTool
          .run(argv, { env: { E2FSPROGS_FAKE_TIME: "1" }, ...given({ tool: name }) })
          .pipe(Effect.provideService(CommandExecutor.CommandExecutor, executor))
      const building = explained(cacheDir, buildFailed)

      const cacheFailed = cacheUnwritable(cacheDir)

      const builder = Ext4Builder.make(fs, tool, settings, cacheDir)
      const names = ImageNames.make(fs, cacheDir)

      const publish = (target: string, build: (staging: string) => Effect.Effect<void, ProvisionError>) =>
        atomicArtifact.publish(target, build).pipe(
          Effect.provideService(FileSystem.FileSystem, fs),
          Effect.mapError((e) => (e._tag === "ProvisionError" ? e : cacheFailed(e)))
        )

      const withFs = Effect.provideService(FileSystem.FileSystem, fs)

      const isComplete = (target: string) => withFs(atomicArtifact.isComplete(target))

      const upperTemplate = Effect.fn("RootfsImage.upperTemplate")(function* (sizeBytes: number) {
        const target = path.join(cacheDir, `upper-${sizeBytes}.ext4`)
        if (yield* isComplete(target)) return target
        yield* publish(target, (staging) => builder.upper(path.join(staging, "image"), sizeBytes))
        return target
      })

      /** Keeps results by the file's state: hashing 100 MB, or starting a program, would take longer than the rest of a boot. */
      const remembered = <A, E, R>(
        kind: "digests" | "image-config",
        file: string,
        schema: Schema.Schema<A, string>,
        find: Effect.Effect<A, E, R>,
        what = ""
      ) => {
        const dir = path.join(settings.cacheDir, kind === "digests" ? "rootfs/digests" : kind)
        return fileState.remembered(fs, { dir, file, schema, what }, find)
      }

      const digest = (tarball: string) => remembered("digests", tarball, Sha256, sha256File(fs, tarball))

      /** Reads the configuration. Fails when it cannot be read: without the image's user, for example, its command would run as root. */
      const readConfig = Effect.fnUntraced(
        function* (image: string) {
          const ignored = (why: string) =>
            Effect.as(Effect.logWarning(`the ${configFile} of ${image} is ignored: ${why}`), null)
          const found = yield* ext4.readFile(image, configFile, maxConfig).pipe(
            Effect.provideService(CommandExecutor.CommandExecutor, executor),
            Effect.catchTag("Ext4TooLarge", (e) => Effect.as(ignored(e.message), Option.none()))
          )
          if (Option.isNone(found)) return null
          const decoded = yield* Effect.either(Schema.decode(ImageConfigJson)(found.value.toString()))
          return Either.isRight(decoded) ? decoded.right : yield* ignored(decoded.left.message)
        },
        (effect, image) =>
          Effect.catchTags(effect, {
            Ext4Unreadable: (cause) => imageUnreadable(image, cause),
            ToolFailed: (cause) => imageUnreadable(image, cause),
            ToolMissing: toolMissing
          })
      )

      const config = Effect.fn("RootfsImage.config")(
        function* (image: string) {
          const found = yield* remembered(
            "image-config",
            image,
            Noted,
            Effect.map(readConfig(image), (config) => ({ config }))
          )
          return found.config ?? {}
        },
        (effect, image) => Effect.mapError(effect, (e) => (e instanceof ProvisionError ? e : imageUnreadable(image, e)))
      )

      const imageOf = (id: string) => path.join(cacheDir, `${id}.img`)

      /** Path of the image of a source with this sha256. `build` makes it unless it is there. */
      const ensureImage = Effect.fnUntraced(function* (
        sha: string,
        source: string,
        build: (staging: string) => Effect.Effect<void, ProvisionError>
      ) {
        const target = imageOf(sha)
        if (!(yield* isComplete(target))) {
          yield* publish(target, (staging) =>
            build(staging).pipe(
              Effect.zipRight(
                Effect.mapError(
                  fs.writeFileString(
                    path.join(cacheDir, `${sha}.json`),
                    Schema.encodeSync(RecordJson)(
                      new ImageRecord({ format: 1, id: ImageId.make(sha), source, builtAt: Date.now() })
                    )
                  ),
                  cacheFailed
                )
              )
            )
          )
        }
        yield* withFs(atomicArtifact.markUsed(target))
        return { id: ImageId.make(sha), path: target }
      })

      const ensure = Effect.fn("RootfsImage.ensure")(function* (tarball: string) {
        return (yield* ensureTarball(tarball)).path
      })

      const ensureTarball = Effect.fnUntraced(function* (tarball: string) {
        const sha = yield* Effect.mapError(
          digest(tarball),
          (cause) =>
            new ProvisionError({
              code: "PROVISION_BASE_NOT_FOUND",
              message: `the rootfs tarball cannot be read: ${tarball}`,
              cause
            })
        )
        return yield* ensureImage(sha, path.resolve(tarball), (staging) =>
          Effect.gen(function* () {
            const tree = path.join(staging, "tree")
            yield* Effect.mapError(fs.makeDirectory(tree), cacheFailed)
            yield* builder.extract(tarball, tree, staging)
            yield* builder.fromTree(tree, staging, sha)
          })
        )
      })

      /** Path of the store's own, sparse copy of an ext4 image. */
      const ensureCopy = Effect.fnUntraced(function* (image: string) {
        const sha = yield* Effect.mapError(digest(image), (cause) => imageNotFound(image, cause))
        return yield* ensureImage(sha, image, (staging) =>
          Effect.asVoid(building(tool(["cp", "--reflink=auto", "--sparse=always", image, path.join(staging, "image")])))
        )
      })

      const ociLayout = path.join(settings.cacheDir, "oci")

      const ensureOci = Effect.fn("RootfsImage.ensureOci")(function* (reference: string) {
        const archive = /^docker-archive:([^:]+)/.exec(reference)?.[1]
        if (archive === undefined) return yield* ensureOciFrom(reference)
        // finding an archive's image needs a read of the whole archive, so the result is kept
        const made = yield* remembered(
          "digests",
          path.resolve(archive),
          ImageId,
          Effect.map(ensureOciFrom(reference), ({ id }) => id),
          reference
        ).pipe(Effect.mapError((e) => (e instanceof ProvisionError ? e : unreadable(reference, archive, e))))
        return (yield* withFs(atomicArtifact.isSettled(imageOf(made))))
          ? { id: made, path: imageOf(made) }
          : yield* ensureOciFrom(reference)
      })

      const ensureOciFrom = Effect.fnUntraced(function* (reference: string) {
        const made = yield* withFs(
          ociPull.withImage(reference, ociLayout, tool, (found) =>
            ensureImage(found.id, reference, (staging) =>
              Effect.gen(function* () {
                const tree = path.join(staging, "tree")
                yield* withFs(
                  ociUnpack.unpack(found, tree, path.join(staging, "layout"), settings.imageLimitBytes, tool)
                )
                yield* writeConfig(tree, found.config)
                yield* builder.fromTree(tree, staging, found.id)
              })
            )
          )
        )
        // the result of a registry reference is kept under its name; files and directories are examined each time
        if (reference.startsWith("docker://")) yield* names.set(reference, Option.some(made.id))
        return made
      })

      /** Writes the configuration into a tree. Removes what the tree has under that name, without following a link. */
      const writeConfig = Effect.fnUntraced(function* (tree: string, config: ImageConfig) {
        const file = path.join(tree, configFile)
        yield* fs.remove(file, { recursive: true, force: true }).pipe(
          Effect.zipRight(
            isEmpty(config)
              ? Effect.void
              : fs.writeFileString(file, Schema.encodeSync(ImageConfigJson)(config), { flag: "wx", mode: 0o644 })
          ),
          // time 0, because no file of an image may have the time of its building
          Effect.zipRight(isEmpty(config) ? Effect.void : fs.utimes(file, 0, 0)),
          Effect.mapError(cacheFailed)
        )
      })

      /** Finds an image in the store by name, or by the first digits of its id (six or more). */
      const stored = Effect.fnUntraced(function* (image: string) {
        const byName = yield* Effect.orElse(
          Effect.flatten(names.get(ociPull.isReference(image) ? image : withTag(image))),
          () => Effect.fail(undefined)
        ).pipe(Effect.option)
        const candidates = Option.isSome(byName)
          ? [byName.value]
          : /^[0-9a-f]{6,64}$/.test(image)
            ? (yield* Effect.orElseSucceed(fs.readDirectory(cacheDir), () => [])).flatMap((file) =>
                file.startsWith(image) && /^[0-9a-f]{64}\.img$/.test(file) ? [ImageId.make(file.slice(0, 64))] : []
              )
            : []
        const [only] = candidates
        return only !== undefined && candidates.length === 1 && (yield* withFs(atomicArtifact.isSettled(imageOf(only))))
          ? Option.some(only)
          : Option.none()
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

      /** The absolute path of an existing file, and whether it is an ext4 image. */
      const inspect = Effect.fnUntraced(function* (image: string) {
        const file = path.resolve(image)
        const info = yield* Effect.mapError(fs.stat(file), (cause) => imageNotFound(image, cause))
        if (info.type !== "File") return yield* imageInvalid(image, "is not a file")
        const ext4 = yield* Effect.mapError(isExt4(file), (cause) => imageInvalid(image, "cannot be read", cause))
        return { file, ext4 }
      })

      return RootfsImage.of({
        ensure,
        config,
        upperTemplate,
        checkDisk: Effect.fn("RootfsImage.checkDisk")(function* (image) {
          const { ext4, file } = yield* inspect(image)
          return ext4 ? file : yield* imageInvalid(image, "is not an ext4 image")
        }),
        names: names.all,
        setName: names.set,
        add: Effect.fn("RootfsImage.add")(function* (image) {
          if (ociPull.isReference(image)) return (yield* ensureOci(image)).id
          const { ext4, file } = yield* inspect(image)
          return (yield* ext4 ? ensureCopy(file) : ensureTarball(file)).id
        }),
        collectLayers: Effect.gen(function* () {
          const files = yield* Effect.orElseSucceed(fs.readDirectory(cacheDir), () => [])
          const keep = new Set(files.flatMap((file) => (file.endsWith(".img") ? [file.slice(0, -4)] : [])))
          yield* withFs(ociPull.collect(ociLayout, keep))
        }),
        noteBundle: (image, dir) =>
          path.dirname(image) === cacheDir
            ? fs
                .makeDirectory(`${image}.bundles`, { recursive: true })
                .pipe(
                  Effect.zipRight(
                    fs.writeFileString(
                      path.join(`${image}.bundles`, createHash("sha256").update(dir).digest("hex").slice(0, 32)),
                      dir
                    )
                  ),
                  Effect.ignore
                )
            : Effect.void,
        resolve: Effect.fn("RootfsImage.resolve")(function* (image) {
          if (isBaseName(image)) return yield* assets.base(image)
          const there =
            ociPull.isReference(image) || !(yield* Effect.orElseSucceed(fs.exists(path.resolve(image)), () => false))
          if (there) {
            const known = yield* stored(image)
            if (Option.isSome(known)) {
              yield* withFs(atomicArtifact.markUsed(imageOf(known.value)))
              return imageOf(known.value)
            }
          }
          if (ociPull.isReference(image)) return (yield* ensureOci(image)).path
          const { ext4, file } = yield* inspect(image)
          return ext4 ? file : yield* ensure(file)
        })
      })
    })
  )
}

/** Offset of ext4's magic number: the superblock is at 1024, s_magic at 0x38 in it (Documentation/filesystems/ext4/super.rst). */
const ext4MagicOffset = 1024 + 0x38

const maxConfig = 1024 * 1024

const Noted = Schema.parseJson(Schema.Struct({ config: Schema.NullOr(ImageConfig) }))

const RecordJson = Schema.parseJson(ImageRecord)

const Sha256 = Schema.String.pipe(Schema.pattern(/^[0-9a-f]{64}$/))

const imageNotFound = (image: string, cause: unknown) =>
  new BootError({
    code: "BOOT_IMAGE_NOT_FOUND",
    message: `there is no image "${image}"`,
    hint: `give ${baseNames.join(", ")}, the path of a rootfs tarball or an ext4 image, docker://NAME, or what \`machinen image ls\` shows`,
    cause
  })

const imageInvalid = (image: string, why: string, cause?: unknown) =>
  new BootError({
    code: "BOOT_IMAGE_INVALID",
    message: `${image} ${why}`,
    hint: "give a rootfs tarball or an ext4 image",
    cause
  })

const imageUnreadable = (image: string, cause: Error) =>
  new ProvisionError({
    code: "IMAGE_INVALID",
    message: `what ${image} says about its commands cannot be read: ${cause.message}`,
    hint: "is the image damaged? `e2fsck -fn` shows it; build or fetch it again",
    cause
  })
