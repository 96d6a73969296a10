import { createHash, randomUUID } from "node:crypto"
import * as path from "node:path"
import { gunzipSync } from "node:zlib"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Context, Effect, Either, Layer, Option, Schema, Stream } from "effect"
import { Assets } from "./Assets.ts"
import { type AssetError, BootError, ProvisionError } from "./domain/errors.ts"
import { ImageId, ImageRecord, withTag } from "./domain/Image.ts"
import { configFile, ImageConfig, ImageConfigJson, isEmpty } from "./domain/ImageConfig.ts"
import * as Oci from "./Oci.ts"
import * as command from "./platform/command.ts"
import * as completeFile from "./platform/completeFile.ts"
import { writeNote } from "./platform/note.ts"
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
    /**
     * The base for `micro`, `debian`, a rootfs tarball, an ext4 image, a container image (src/Oci.ts), or the name or id of one that is in the
     * store. A registry is asked only for what is not there.
     */
    readonly resolve: (image: string) => Effect.Effect<string, BootError | ProvisionError | AssetError>
    /** A caller's own ext4 image, to be attached as it is; gives its absolute path. */
    readonly checkDisk: (image: string) => Effect.Effect<string, BootError>
    /** What an ext4 image says about the commands that run in it. */
    readonly config: (image: string) => Effect.Effect<ImageConfig, ProvisionError>
    /** The base built from a rootfs tarball. Any number of callers at once build it once. */
    readonly ensure: (tarball: string) => Effect.Effect<string, ProvisionError>
    /** Puts an image into the store, whatever it is in; asks a registry again. Gives its id. */
    readonly add: (image: string) => Effect.Effect<ImageId, BootError | ProvisionError>
    /** What a name stands for. */
    readonly named: (name: string) => Effect.Effect<Option.Option<ImageId>>
    /** Makes a name stand for an image, or for nothing. */
    readonly setName: (name: string, id: Option.Option<ImageId>) => Effect.Effect<void, ProvisionError>
    /** Removes layers of container images that are not in the store any more. */
    readonly collectLayers: Effect.Effect<void, ProvisionError>
    /** A bundle that can be restored only with this image is at `dir`, or will be. */
    readonly noteBundle: (image: string, dir: string) => Effect.Effect<void>
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
        // no file of an image is made at a time of its own: the same input gives the same image
        command.run(argv, { LC_ALL: "C", E2FSPROGS_FAKE_TIME: "1" }).pipe(
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
          Effect.flatMap((done) => (done.code === 0 ? Effect.succeed(done.stdout) : toolFailed(argv, done)))
        )

      const mke2fs = Option.getOrElse(settings.mke2fs, () => "mke2fs")

      const publish = (target: string, build: (staging: string) => Effect.Effect<void, ProvisionError>) =>
        completeFile.publish(target, build).pipe(
          Effect.provideService(FileSystem.FileSystem, fs),
          Effect.mapError((e) => (e._tag === "ProvisionError" ? e : cacheFailed(cacheDir, e)))
        )

      const withFs = Effect.provideService(FileSystem.FileSystem, fs)

      const isComplete = (target: string) => withFs(completeFile.isComplete(target))

      const makeExt4 = (
        image: string,
        sizeBytes: number,
        options: ReadonlyArray<string>,
        through: (argv: ReadonlyArray<string>) => readonly [string, ...ReadonlyArray<string>] = ([
          first = "",
          ...rest
        ]) => [first, ...rest]
      ) =>
        Effect.gen(function* () {
          yield* fs.writeFile(image, new Uint8Array(0)).pipe(
            Effect.zipRight(fs.truncate(image, sizeBytes)),
            Effect.mapError((e) => cacheFailed(cacheDir, e))
          )
          yield* tool(through([mke2fs, "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", ...options, image]))
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

      /**
       * Something found out about a file, remembered for its path, size, times and inode: hashing 100 MB, or starting a program, on each boot
       * would cost more than the boot.
       */
      const remembered = <A, E, R>(
        kind: "digests" | "image-config",
        file: string,
        schema: Schema.Schema<A, string>,
        find: Effect.Effect<A, E, R>,
        what = ""
      ) =>
        Effect.gen(function* () {
          const info = yield* fs.stat(file)
          const stamp =
            [file, info.size, Option.map(info.mtime, Number), info.ino, info.dev].map(String).join("\n") + what
          const key = createHash("sha256").update(stamp).digest("hex").slice(0, 32)
          const note = path.join(settings.cacheDir, kind === "digests" ? "rootfs/digests" : kind, key)
          const known = yield* Effect.option(Effect.flatMap(fs.readFileString(note), Schema.decode(schema)))
          if (Option.isSome(known)) return known.value
          const found = yield* find
          yield* Effect.ignore(Effect.flatMap(Schema.encode(schema)(found), (text) => writeNote(fs, note, text)))
          return found
        })

      const digest = (tarball: string) => remembered("digests", tarball, Sha256, sha256Of(tarball))

      const sha256Of = Effect.fnUntraced(function* (file: string) {
        const hash = createHash("sha256")
        yield* Stream.runForEach(fs.stream(file, { chunkSize: 1024 * 1024 }), (chunk) =>
          Effect.sync(() => void hash.update(chunk))
        )
        return hash.digest("hex")
      })

      const readConfig = Effect.fnUntraced(function* (image: string) {
        // a file of any size may lie there: no more of it is read than a configuration could be
        const script = `debugfs -R "cat /${configFile}" "$1" 2>/dev/null | head -c ${maxConfig + 1}`
        const text = yield* tool(["sh", "-c", script, "sh", image])
        if (text === "") return null
        const decoded = yield* Effect.either(Schema.decode(ImageConfigJson)(text))
        if (Either.isRight(decoded)) return decoded.right
        yield* Effect.logWarning(`${image} holds a ${configFile} that makes no sense; it is ignored`, decoded.left)
        return null
      })

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
        Effect.mapError((e) => (e._tag === "ProvisionError" ? e : cacheFailed(cacheDir, e)))
      )

      const imageOf = (id: string) => path.join(cacheDir, `${id}.img`)

      /** The image made of what has this sha256, built by `build` unless it is there. */
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
                  (e) => cacheFailed(cacheDir, e)
                )
              )
            )
          )
        }
        // when it was used last, for who collects garbage
        const now = new Date()
        yield* Effect.ignore(fs.utimes(`${target}.ok`, now, now))
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
            if (yield* fromPrebake(tarball, staging)) return
            const tree = path.join(staging, "tree")
            yield* Effect.mapError(fs.makeDirectory(tree), (e) => cacheFailed(cacheDir, e))
            yield* extract(tarball, tree)
            yield* imageFromTree(tree, staging, sha)
          })
        )
      })

      /** An ext4 image's own copy in the store, holes and all. */
      const ensureCopy = Effect.fnUntraced(function* (image: string) {
        const sha = yield* Effect.mapError(digest(image), (cause) => imageNotFound(image, cause))
        return yield* ensureImage(sha, image, (staging) =>
          Effect.asVoid(tool(["cp", "--reflink=auto", "--sparse=always", image, path.join(staging, "image")]))
        )
      })

      const ociLayout = path.join(settings.cacheDir, "oci")

      const ensureOci = Effect.fn("RootfsImage.ensureOci")(function* (reference: string) {
        const archive = /^docker-archive:([^:]+)/.exec(reference)?.[1]
        if (archive === undefined) return yield* ensureOciFrom(reference)
        // an archive says what is in it only when all of it is read: that is remembered
        const made = yield* remembered(
          "digests",
          path.resolve(archive),
          ImageId,
          Effect.map(ensureOciFrom(reference), ({ id }) => id),
          reference
        ).pipe(Effect.mapError((e) => (e._tag === "ProvisionError" ? e : Oci.unreadable(reference, archive, e))))
        return (yield* withFs(completeFile.isSettled(imageOf(made))))
          ? { id: made, path: imageOf(made) }
          : yield* ensureOciFrom(reference)
      })

      const ensureOciFrom = Effect.fnUntraced(function* (reference: string) {
        const made = yield* withFs(
          Oci.withImage(reference, ociLayout, tool, (found) =>
            ensureImage(found.id, reference, (staging) =>
              Effect.gen(function* () {
                const tree = path.join(staging, "tree")
                yield* Oci.unpack(found, tree, settings.imageLimitBytes, tool)
                yield* writeConfig(tree, found.config)
                yield* imageFromTree(tree, staging, found.id)
              })
            )
          )
        )
        // what is fetched once is there; what lies in a file or directory is looked at each time
        if (reference.startsWith("docker://")) yield* setName(reference, Option.some(made.id))
        return made
      })

      /** Whatever the tree has under that name is not followed and goes. */
      const writeConfig = Effect.fnUntraced(function* (tree: string, config: ImageConfig) {
        const file = path.join(tree, configFile)
        yield* fs.remove(file, { recursive: true, force: true }).pipe(
          Effect.zipRight(
            isEmpty(config)
              ? Effect.void
              : fs.writeFileString(file, Schema.encodeSync(ImageConfigJson)(config), { flag: "wx", mode: 0o644 })
          ),
          // no file of the image has the time of its building
          Effect.zipRight(isEmpty(config) ? Effect.void : fs.utimes(file, 0, 0)),
          Effect.mapError((e) => cacheFailed(cacheDir, e))
        )
      })

      const nameFile = (name: string) => path.join(cacheDir, "names", encodeURIComponent(name))

      const named = (name: string) =>
        fs.readFileString(nameFile(name)).pipe(Effect.flatMap(Schema.decode(ImageId)), Effect.option)

      const setName = Effect.fnUntraced(function* (name: string, id: Option.Option<ImageId>) {
        const file = nameFile(name)
        const draft = `${file}.${randomUUID()}`
        yield* Option.match(id, {
          onNone: () => fs.remove(file, { force: true }),
          onSome: (id) =>
            fs
              .makeDirectory(path.dirname(file), { recursive: true })
              .pipe(Effect.zipRight(fs.writeFileString(draft, id)), Effect.zipRight(fs.rename(draft, file)))
        }).pipe(Effect.mapError((e) => cacheFailed(cacheDir, e)))
      })

      /** What is in the store under a name, or under an id of which at least this much is given. */
      const stored = Effect.fnUntraced(function* (image: string) {
        const byName = yield* Effect.orElse(
          Effect.flatten(named(Oci.isReference(image) ? image : withTag(image))),
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
        return only !== undefined && candidates.length === 1 && (yield* withFs(completeFile.isSettled(imageOf(only))))
          ? Option.some(only)
          : Option.none()
      })

      /** Owners and device nodes need root, or something that answers like root and remembers from one command to the next. */
      const asRoot = (staging: string, argv: ReadonlyArray<string>): readonly [string, ...ReadonlyArray<string>] => {
        const state = path.join(staging, "owners")
        const [first = "true", ...rest] = argv
        if (process.getuid?.() === 0) return [first, ...rest]
        return [
          "sh",
          "-c",
          'state=$1; shift; : >>"$state"; exec fakeroot -i "$state" -s "$state" -- "$@"',
          "sh",
          state,
          ...argv
        ]
      }

      /**
       * The tarball is not trusted: GNU tar itself refuses names with `..`, makes absolute ones relative and never writes through a symbolic
       * link of the archive's. Beyond the limit it is ended from its own checkpoint; the shell turns the signal into an exit code.
       */
      const extract = (tarball: string, tree: string) =>
        tool(
          asRoot(path.dirname(tree), [
            "sh",
            "-c",
            'tar "$@"; exit $?',
            "sh",
            "--extract",
            "--numeric-owner",
            "--same-owner",
            // capabilities and ACLs, not only user attributes; fakeroot loses the kind of a file that has any
            ...(process.getuid?.() === 0 ? ["--xattrs", "--xattrs-include=*"] : ["--no-xattrs"]),
            "--preserve-permissions",
            `--checkpoint=${Math.ceil(settings.imageLimitBytes / tarRecord)}`,
            "--checkpoint-action=exec=kill -KILL $PPID",
            "--file",
            tarball,
            "--directory",
            tree
          ])
        ).pipe(
          Effect.mapError((e) =>
            e.code === "PROVISION_INSTALL_HOOK_FAILED" && e.message.includes("code 137")
              ? tooLarge(tarball, settings.imageLimitBytes)
              : e
          )
        )

      /** The same tree gives the same bytes, for a bundle is restored only on the image it was taken on. `sha` is that of its source. */
      const imageFromTree = Effect.fnUntraced(function* (tree: string, staging: string, sha: string) {
        const image = path.join(staging, "image")
        const listing = yield* tool(["find", tree, "-printf", "%i %s %b\\n"])
        const inodes = new Map<string, number>()
        for (const line of listing.trimEnd().split("\n")) {
          const [inode = "", size, blocks] = line.split(" ")
          // holes of a large file take no space, and blocks that are not written yet are not counted
          const bytes = Number(size) > sparseFrom ? Math.min(Number(size), Number(blocks) * 512) : Number(size)
          inodes.set(inode, Math.ceil(bytes / 4096) * 4096)
        }
        const bytes = [...inodes.values()].reduce((sum, size) => sum + size, 0)
        // Room for metadata; the file is sparse, so what is not needed costs nothing. Nothing is ever added to a base.
        const size = Math.ceil((bytes * 1.25 + 64 * 1024 * 1024) / 4096) * 4096
        const id = sha.replace(/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*$/, "$1-$2-4$3-8$4-$5")
        yield* makeExt4(
          image,
          size,
          [
            ...["-I", "256", "-N", String(inodes.size + 4096), "-U", id],
            ...["-O", baseFeatures, "-E", `hash_seed=${id},lazy_itable_init=1,nodiscard`, "-d", tree]
          ],
          (argv) => asRoot(staging, argv)
        )
        // mke2fs copies access and change times of the extracted files, which are those of this run
        const times = path.join(staging, "times")
        const numbers = [2, ...Array.from({ length: inodes.size + 16 }, (_, i) => 11 + i)]
        yield* Effect.mapError(
          fs.writeFileString(
            times,
            numbers.map((n) => `set_inode_field <${n}> atime @1\nset_inode_field <${n}> ctime @1\n`).join("")
          ),
          (e) => cacheFailed(cacheDir, e)
        )
        yield* tool(["debugfs", "-w", "-f", times, image])
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
        config,
        upperTemplate,
        checkDisk: Effect.fn("RootfsImage.checkDisk")(function* (image) {
          const { ext4, file } = yield* inspect(image)
          return ext4 ? file : yield* imageInvalid(image, "is not an ext4 image")
        }),
        named,
        setName,
        add: Effect.fn("RootfsImage.add")(function* (image) {
          if (Oci.isReference(image)) return (yield* ensureOci(image)).id
          const { ext4, file } = yield* inspect(image)
          return (yield* ext4 ? ensureCopy(file) : ensureTarball(file)).id
        }),
        collectLayers: Effect.gen(function* () {
          const files = yield* Effect.orElseSucceed(fs.readDirectory(cacheDir), () => [])
          const keep = new Set(files.flatMap((file) => (file.endsWith(".img") ? [file.slice(0, -4)] : [])))
          yield* withFs(Oci.collect(ociLayout, keep, tool))
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
            Oci.isReference(image) || !(yield* Effect.orElseSucceed(fs.exists(path.resolve(image)), () => false))
          if (there) {
            const known = yield* stored(image)
            if (Option.isSome(known)) {
              const now = new Date()
              yield* Effect.ignore(fs.utimes(`${imageOf(known.value)}.ok`, now, now))
              return imageOf(known.value)
            }
          }
          if (Oci.isReference(image)) return (yield* ensureOci(image)).path
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

/** Of a base: named one by one, so that the host's mke2fs.conf has no say. */
const baseFeatures =
  "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,metadata_csum,sparse_super,64bit"

/** tar counts in records of this many bytes. */
const tarRecord = 10240
const sparseFrom = 64 * 1024 * 1024
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

const tooLarge = (tarball: string, limit: number) =>
  new ProvisionError({
    code: "ROOTFS_IMG_TOO_LARGE",
    message: `${tarball} holds more than ${Math.ceil(limit / 1024 ** 2)} MiB`,
    hint: "if it is to be that large, raise MACHINEN_IMAGE_LIMIT_MIB"
  })

const toolFailed = (argv: ReadonlyArray<string>, { code, stderr }: command.Finished) => {
  // tar tells a short write by its length only
  const noSpace = /no space left on device|wrote only \d+ of \d+ bytes/i.test(stderr)
  return new ProvisionError({
    code: noSpace ? "ROOTFS_IMG_NO_SPACE" : "PROVISION_INSTALL_HOOK_FAILED",
    message: `${argv.includes("--extract") ? "tar" : argv[0]} ended with code ${code}: ${stderr.trim().split("\n").slice(-3).join("; ")}`,
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
