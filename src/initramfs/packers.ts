import * as path from "node:path"
import { type CommandExecutor, FileSystem, type Error as PlatformErrors } from "@effect/platform"
import { Effect, Option, Schema } from "effect"
import type { MkinitramfsError } from "../errors.ts"
import { Assets } from "../host/Assets.ts"
import { configFile } from "../image/ImageConfig.ts"
import * as command from "../platform/command.ts"
import { addParents, entriesOf, type Failure, fail, finalEntries, fnmatch, type Tree, walk, write } from "./archive.ts"

/** Options of an archive with configuration and init alone, for a machine that has its root on a disk. */
export interface TinyBundleOptions {
  /** A directory that holds a `machinen-config.json`. */
  readonly bundle: string
  readonly out: string
  /** Variables that the bundle's own override. */
  readonly env?: Readonly<Record<string, string>>
  /** Path in the guest of an overlay mount. */
  readonly mountGuest?: string
  /** The program that becomes `/init`. Default: the guest program that set-up builds. */
  readonly initPath?: string
}

/** The services that packers need. */
export type Services = Assets | CommandExecutor.CommandExecutor | FileSystem.FileSystem

export interface BundleOptions extends Omit<TinyBundleOptions, "mountGuest"> {
  /** A tarball that is unpacked first. */
  readonly base?: string
  /** A host directory that is put over the base, at `guest`. */
  readonly mount?: { readonly host: string; readonly guest: string }
  /** fnmatch(3) patterns for paths in the tree. Excluded directories are not entered. */
  readonly excludes?: ReadonlyArray<string>
  /** Ignored when the file does not exist. */
  readonly execAgentPath?: string
}

export interface RootfsOptions {
  readonly rootfs: string
  readonly out: string
  /** A file that becomes `machinen-config.json`. */
  readonly config?: string
  readonly excludes?: ReadonlyArray<string>
  readonly initPath?: string
}

export interface MinimalOptions {
  readonly out: string
  readonly initPath?: string
  readonly config?: string
}

export interface WorkspaceOptions {
  readonly workspace: string
  readonly out: string
  /** Default `workspace`. */
  readonly mountpoint?: string
  /** Names that are left out, anywhere in the tree. */
  readonly excludes?: Iterable<string>
  /** Most MiB of the archive. Default 500. */
  readonly maxMb?: number
}

export const defaultWorkspaceExcludes: ReadonlySet<string> = new Set([
  ".git",
  "node_modules",
  ".DS_Store",
  "dist",
  ".next",
  ".turbo",
  ".cache",
  "coverage"
])

/** Reads the program that becomes `/init`. With MACHINEN_REQUIRE_FIXTURES=0 an archive may lack it. */
const readInit = Effect.fnUntraced(function* (initPath: string | undefined) {
  const fs = yield* FileSystem.FileSystem
  const file = initPath ?? (yield* (yield* Assets).init)
  const bytes = yield* Effect.either(fs.readFile(file))
  if (bytes._tag === "Right") return Option.some(bytes.right)
  if (process.env["MACHINEN_REQUIRE_FIXTURES"] === "0") return Option.none()
  return yield* fail(
    "MKINITRAMFS_INIT_MISSING",
    `the init program ${file} cannot be read: ${bytes.left.message}`,
    bytes.left
  )
})

const BundleConfig = Schema.parseJson(
  Schema.Struct(
    { env: Schema.optional(Schema.Record({ key: Schema.String, value: Schema.String })) },
    Schema.Record({ key: Schema.String, value: Schema.Unknown })
  )
)

/** The bundle's configuration; its own variables override `env`. */
const bundleConfig = Effect.fnUntraced(function* (bundle: string, env: Readonly<Record<string, string>> = {}) {
  const fs = yield* FileSystem.FileSystem
  const config = yield* Effect.flatMap(
    fs.readFileString(path.join(bundle, configFile)),
    Schema.decode(BundleConfig)
  ).pipe(
    Effect.mapError((cause) =>
      fail("MKINITRAMFS_BUNDLE_INVALID", `${bundle} is no bundle: ${configFile}: ${cause.message}`, cause)
    )
  )
  return Buffer.from(JSON.stringify({ ...config, env: { ...env, ...config.env } }))
})

/** Turns errors of files and tools into a MkinitramfsError with the packer's code. */
const asFailure =
  (code: MkinitramfsError["code"], what: string) =>
  <A, R>(effect: Effect.Effect<A, Failure | PlatformErrors.PlatformError, R>): Effect.Effect<A, Failure, R> =>
    Effect.mapError(effect, (e) =>
      e._tag === "SystemError" || e._tag === "BadArgument"
        ? fail(code, `${what} could not be packed: ${e.message}`, e)
        : e
    )

/** Packs configuration and init alone, for a machine that has its root on a disk. */
export const tinyBundle = Effect.fn("InitramfsPackers.tinyBundle")(
  function* ({ bundle, env, initPath, mountGuest, out }: TinyBundleOptions) {
    const config = yield* bundleConfig(bundle, env)
    yield* write(
      out,
      entriesOf(new Map(), finalEntries({ init: yield* readInit(initPath), config, mountGuest, epoch: true }))
    )
  },
  (effect, { bundle }) => asFailure("MKINITRAMFS_BUNDLE_INVALID", bundle)(effect)
)

/** Packs a whole root filesystem: the base, then the mounted directory, then the bundle's `rootfs/`. Later entries replace earlier ones. */
export const bundle = Effect.fn("InitramfsPackers.bundle")(
  function* (options: BundleOptions) {
    const fs = yield* FileSystem.FileSystem
    const config = yield* bundleConfig(options.bundle, options.env)
    const excluded = fnmatch(options.excludes ?? [])
    const tree: Tree = new Map()
    const pack = Effect.gen(function* () {
      if (options.base !== undefined) {
        const unpacked = yield* fs.makeTempDirectoryScoped({ prefix: "machinen-initramfs-" })
        const { base } = options
        // the guest's kernel makes /dev, and only root could unpack device nodes here
        const argv = [
          "tar",
          "-xpf",
          base,
          "-C",
          unpacked,
          "--no-same-owner",
          "--exclude=dev/*",
          "--exclude=./dev/*"
        ] as const
        yield* command.run(argv, { LC_ALL: "C" }).pipe(
          Effect.filterOrFail(
            ({ code }) => code === 0,
            ({ stderr }) => new Error(stderr.trim().split("\n").slice(-2).join("; "))
          ),
          Effect.mapError((cause) =>
            fail("MKINITRAMFS_BASE_EXTRACT_FAILED", `${base} could not be unpacked: ${cause.message}`, cause)
          )
        )
        yield* walk(tree, unpacked, "", excluded)
      }
      if (options.mount !== undefined) {
        const at = path.posix.normalize(options.mount.guest).replace(/^\/+|\/+$/g, "")
        if (at === "" || at === "." || at.startsWith("..")) {
          return yield* fail("MKINITRAMFS_BUNDLE_INVALID", `nothing can be mounted at ${options.mount.guest}`)
        }
        addParents(tree, `${at}/x`)
        yield* walk(tree, options.mount.host, at, (relative) => excluded(`${at}/${relative}`))
      }
      const rootfs = path.join(options.bundle, "rootfs")
      if (yield* fs.exists(rootfs)) yield* walk(tree, rootfs, "", excluded)
      const { execAgentPath } = options
      const execAgent = execAgentPath === undefined ? Option.none() : yield* Effect.option(fs.readFile(execAgentPath))
      const init = yield* readInit(options.initPath)
      yield* write(options.out, entriesOf(tree, finalEntries({ init, execAgent, config, epoch: true })))
    })
    yield* Effect.scoped(pack)
  },
  (effect, options) => asFailure("MKINITRAMFS_BUNDLE_INVALID", options.bundle)(effect)
)

/** Packs a directory as the root filesystem. */
export const rootfs = Effect.fn("InitramfsPackers.rootfs")(
  function* (options: RootfsOptions) {
    const tree: Tree = new Map()
    yield* walk(tree, options.rootfs, "", fnmatch(options.excludes ?? []))
    const config = yield* optionalFile(options.config)
    yield* write(
      options.out,
      entriesOf(tree, finalEntries({ init: yield* readInit(options.initPath), ...config, epoch: true }))
    )
  },
  (effect, options) => asFailure("MKINITRAMFS_BUNDLE_INVALID", options.rootfs)(effect)
)

/** Packs init alone. */
export const minimal = Effect.fn("InitramfsPackers.minimal")(
  function* (options: MinimalOptions) {
    const config = yield* optionalFile(options.config)
    yield* write(
      options.out,
      entriesOf(new Map(), finalEntries({ init: yield* readInit(options.initPath), ...config, epoch: true }))
    )
  },
  (effect, options) => asFailure("MKINITRAMFS_BUNDLE_INVALID", options.out)(effect)
)

const optionalFile = (file: string | undefined) =>
  file === undefined
    ? Effect.succeed({})
    : Effect.map(
        Effect.flatMap(FileSystem.FileSystem, (fs) => fs.readFile(file)),
        (config) => ({ config })
      )

/** Packs a directory below a mount point, without init. */
export const workspace = Effect.fn("InitramfsPackers.workspace")(
  function* (options: WorkspaceOptions) {
    const fs = yield* FileSystem.FileSystem
    const mountpoint = (options.mountpoint ?? "workspace").replace(/^\/+|\/+$/g, "")
    const info = yield* Effect.option(fs.stat(options.workspace))
    if (Option.isNone(info) || info.value.type !== "Directory") {
      return yield* fail("MKINITRAMFS_WORKSPACE_INVALID", `the workspace ${options.workspace} is not a directory`)
    }
    const limit = (options.maxMb ?? 500) * 1024 ** 2
    const excludes = new Set(options.excludes ?? defaultWorkspaceExcludes)
    const tree: Tree = new Map()
    addParents(tree, `${mountpoint}/x`)
    let bytes = 0
    const tooLarge = fail(
      "MKINITRAMFS_WORKSPACE_TOO_LARGE",
      `${options.workspace} makes an archive of more than ${options.maxMb ?? 500} MiB; exclude what the guest does not need`
    )
    yield* walk(
      tree,
      options.workspace,
      mountpoint,
      (_, name) => excludes.has(name),
      (size) => {
        bytes += size
        return bytes > limit ? tooLarge : Effect.void
      }
    )
    const entries = entriesOf(tree, [])
    // each entry has a header, its name and padding
    if (bytes + entries.reduce((sum, [name]) => sum + 120 + Buffer.byteLength(name), 0) > limit) return yield* tooLarge
    yield* write(options.out, entries)
  },
  (effect, options) => asFailure("MKINITRAMFS_WORKSPACE_INVALID", options.workspace)(effect)
)
