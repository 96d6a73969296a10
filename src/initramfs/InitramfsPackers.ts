import * as path from "node:path"
import { parseArgs } from "node:util"
import { type CommandExecutor, FileSystem, type Error as PlatformErrors } from "@effect/platform"
import { Effect, Option, Schema } from "effect"
import picomatch from "picomatch"
import { type AssetError, MkinitramfsError, ParseError } from "../errors.ts"
import { type CpioEntry, cpioPieces } from "../guest/Initramfs.ts"
import { Assets } from "../host/Assets.ts"
import { configFile } from "../image/ImageConfig.ts"
import * as command from "../platform/command.ts"

/**
 * Archives for who starts a machine by other means than `boot`: whole root filesystems, bundles and directories as an initramfs. Every packer
 * writes beside `out` and renames; a failure leaves what was there. Entries are in the order of their names and have no times: but
 * for the clock's seed in it, the same input gives the same bytes.
 */
export interface TinyBundleOptions {
  /** A directory with a `machinen-config.json`. */
  readonly bundle: string
  readonly out: string
  /** Below the bundle's own. */
  readonly env?: Readonly<Record<string, string>>
  /** Where the guest finds an overlay mount. */
  readonly mountGuest?: string
  /** Default: the guest program set-up builds. */
  readonly initPath?: string
}

/** What packing needs. */
export type Services = Assets | CommandExecutor.CommandExecutor | FileSystem.FileSystem

export interface BundleOptions extends Omit<TinyBundleOptions, "mountGuest"> {
  /** A tarball that lies below all else. */
  readonly base?: string
  /** A directory of the host that lies over the base, at that place. */
  readonly mount?: { readonly host: string; readonly guest: string }
  /** fnmatch patterns against paths in the tree; what is below an excluded directory is not looked at. */
  readonly excludes?: ReadonlyArray<string>
  /** Left out when it is not there. */
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
  /** Names, anywhere in the tree. */
  readonly excludes?: Iterable<string>
  /** Of the archive. Default 500. */
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

const directory = 0o040000
const regular = 0o100000
const symlink = 0o120000
const characterDevice = 0o020000

/** A file's bytes are read when it is its turn: an archive need not fit into memory. */
type Node = Omit<CpioEntry, "name" | "data"> & {
  readonly data?: Uint8Array | { readonly file: string; readonly size: number }
}
type Tree = Map<string, Node>

/** Only what `out`'s own directory refuses. */
type Failure = MkinitramfsError | AssetError

const fail = (code: MkinitramfsError["code"], message: string, cause?: unknown) =>
  new MkinitramfsError({ code, message, cause })

/** One line, one pattern; what follows a `#` is for the reader. */
export const parseExcludes = (text: string): ReadonlyArray<string> =>
  text
    .split("\n")
    .map((line) => line.replace(/#.*$/, "").trim())
    .filter((line) => line !== "")

/** `*` stands for any characters, slashes too, as in fnmatch(3) without flags. */
const fnmatch = (patterns: ReadonlyArray<string>): ((relative: string) => boolean) =>
  patterns.length === 0 ? () => false : picomatch([...patterns], { dot: true, bash: true })

const isDirectory = (node: Node | undefined) => node !== undefined && (node.mode & 0o170000) === directory

/** Puts something at a place; what a directory held goes with it when it is replaced by something else. */
const put = (tree: Tree, name: string, node: Node) => {
  // only a directory has anything below it: looking for that at every file would take the square of their number
  if (isDirectory(tree.get(name)) && !isDirectory(node)) {
    for (const other of [...tree.keys()]) if (other.startsWith(`${name}/`)) tree.delete(other)
  }
  tree.set(name, node)
}

/** Adds what is below `root`, at `prefix`. Sockets, devices and fifos are left out. */
const walk = Effect.fnUntraced(function* (
  tree: Tree,
  root: string,
  prefix: string,
  skip: (relative: string, name: string) => boolean,
  onFile: (size: number) => Effect.Effect<void, MkinitramfsError> = () => Effect.void
) {
  const fs = yield* FileSystem.FileSystem
  const pending = [""]
  for (let at = pending.pop(); at !== undefined; at = pending.pop()) {
    for (const name of yield* fs.readDirectory(path.join(root, at))) {
      const relative = at === "" ? name : `${at}/${name}`
      if (skip(relative, name)) continue
      const file = path.join(root, relative)
      const target = prefix === "" ? relative : `${prefix}/${relative}`
      const link = yield* Effect.option(fs.readLink(file))
      if (Option.isSome(link)) {
        put(tree, target, { mode: symlink | 0o777, data: Buffer.from(link.value) })
        continue
      }
      const info = yield* fs.stat(file)
      const mode = info.mode & 0o7777
      if (info.type === "Directory") {
        put(tree, target, { mode: directory | mode })
        pending.push(relative)
      } else if (info.type === "File") {
        yield* onFile(Number(info.size))
        put(tree, target, { mode: regular | mode, data: { file, size: Number(info.size) } })
      }
    }
  }
})

/** Directories that lead to a place, unless they are there. */
const addParents = (tree: Tree, name: string) => {
  const parts = name.split("/").slice(0, -1)
  for (let n = 1; n <= parts.length; n++) {
    const parent = parts.slice(0, n).join("/")
    if (!tree.has(parent)) tree.set(parent, { mode: directory | 0o755 })
  }
}

interface Finals {
  readonly init: Option.Option<Uint8Array>
  readonly execAgent?: Option.Option<Uint8Array>
  readonly config?: Uint8Array
  readonly mountGuest?: string | undefined
  readonly epoch: boolean
}

/** What the kernel and init look for, last and so over anything else of that name. */
const finalEntries = ({
  config,
  epoch,
  execAgent,
  init,
  mountGuest
}: Finals): ReadonlyArray<readonly [string, Node]> => {
  const file = (name: string, data: Uint8Array, mode = 0o644) => [[name, { mode: regular | mode, data }] as const]
  return [
    ...Option.match(init, { onNone: () => [], onSome: (bytes) => file("init", bytes, 0o755) }),
    ...Option.match(execAgent ?? Option.none(), {
      onNone: () => [],
      onSome: (bytes) => file("exec-agent", bytes, 0o755)
    }),
    ...(config === undefined ? [] : file(configFile, config)),
    ...(epoch ? file("etc/machinen-boot-epoch", Buffer.from(String(Math.floor(Date.now() / 1000)))) : []),
    ...(mountGuest === undefined ? [] : file("etc/machinen-mountdisk-guest", Buffer.from(mountGuest))),
    ["dev/console", { mode: characterDevice | 0o600, device: [5, 1] }],
    ["tmp", { mode: directory | 0o1777 }]
  ]
}

/** The archive's entries in order: the root, the tree by name, then the finals, each after the directories it needs. */
const entriesOf = (
  tree: Tree,
  finals: ReadonlyArray<readonly [string, Node]>
): ReadonlyArray<readonly [string, Node]> => {
  for (const [name] of finals) {
    tree.delete(name)
    addParents(tree, name)
  }
  const walked = [...tree].sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0))
  return [[".", { mode: directory | 0o755 }], ...walked, ...finals]
}

/** Small files are gathered to this many bytes: a write for each costs more than the file. */
const writtenAtOnce = 1024 * 1024

/** Writes the archive piece by piece; `out` has its name only when it is whole. */
const write = Effect.fnUntraced(function* (out: string, entries: ReadonlyArray<readonly [string, Node]>) {
  const fs = yield* FileSystem.FileSystem
  yield* Effect.scoped(
    Effect.gen(function* () {
      yield* fs.makeDirectory(path.dirname(out), { recursive: true })
      const staging = yield* fs.makeTempDirectoryScoped({ directory: path.dirname(out), prefix: ".machinen-" })
      const draft = path.join(staging, "archive")
      yield* Effect.scoped(
        Effect.gen(function* () {
          const target = yield* fs.open(draft, { flag: "w" })
          let [pieces, length]: [Array<Uint8Array>, number] = [[], 0]
          const flush = Effect.suspend(() => {
            const bytes = Buffer.concat(pieces)
            ;[pieces, length] = [[], 0]
            return target.writeAll(bytes)
          })
          for (const [index, [name, { data, ...rest }]] of entries.entries()) {
            const bytes = data === undefined || data instanceof Uint8Array ? data : yield* readWhole(data)
            const entry = { ...rest, name, ...(bytes === undefined ? {} : { data: bytes }) }
            const added = cpioPieces(entry, index + 1)
            pieces.push(...added)
            length += added.reduce((sum, piece) => sum + piece.length, 0)
            if (length >= writtenAtOnce) yield* flush
          }
          pieces.push(...cpioPieces({ name: "TRAILER!!!", mode: 0 }, entries.length + 1))
          yield* flush
        })
      )
      yield* fs.rename(draft, out)
    })
  )
})

const readWhole = ({ file }: { readonly file: string }) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => fs.readFile(file))

/** The program that becomes `/init`. MACHINEN_REQUIRE_FIXTURES=0: an archive may do without. */
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

/** The bundle's configuration, with an environment below its own. */
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

/** What goes wrong with files has the code of the packer. */
const asFailure =
  (code: MkinitramfsError["code"], what: string) =>
  <A, R>(effect: Effect.Effect<A, Failure | PlatformErrors.PlatformError, R>): Effect.Effect<A, Failure, R> =>
    Effect.mapError(effect, (e) =>
      e._tag === "SystemError" || e._tag === "BadArgument"
        ? fail(code, `${what} could not be packed: ${e.message}`, e)
        : e
    )

/** Configuration and init alone, for a machine that has its root on a disk. */
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

/** A whole root filesystem: base, then the mounted directory, then the bundle's `rootfs/`; the later wins. */
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
        // what is in /dev is the kernel's to make, and not for everybody to unpack
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

/** A directory as the root filesystem. */
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

/** Init alone. */
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

/** A directory below a mount point, without init. */
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
    // a header, a name and padding for each
    if (bytes + entries.reduce((sum, [name]) => sum + 120 + Buffer.byteLength(name), 0) > limit) return yield* tooLarge
    yield* write(options.out, entries)
  },
  (effect, options) => asFailure("MKINITRAMFS_WORKSPACE_INVALID", options.workspace)(effect)
)

const flags = {
  bundle: { type: "string" },
  rootfs: { type: "string" },
  workspace: { type: "string" },
  tiny: { type: "boolean" },
  base: { type: "string" },
  excludes: { type: "string" },
  config: { type: "string" },
  init: { type: "string" },
  "exec-agent": { type: "string" },
  "mount-guest": { type: "string" },
  mountpoint: { type: "string" },
  "max-mb": { type: "string" },
  out: { type: "string" }
} as const

const usage =
  "--out FILE and one of --bundle DIR [--tiny] [--base TAR], --rootfs DIR [--config FILE], --workspace DIR [--mountpoint NAME], or none of them; --excludes FILE, --init FILE"

/** Every packer from a command line; without a source it is the minimal one. */
export const cli = Effect.fn("InitramfsPackers.cli")(function* (argv: ReadonlyArray<string>) {
  const fs = yield* FileSystem.FileSystem
  const { values } = yield* Effect.try({
    try: () => parseArgs({ args: [...argv], options: flags, strict: true }),
    catch: (cause) =>
      new ParseError({
        code: /unknown option/i.test(String(cause)) ? "PARSE_FLAG_UNKNOWN" : "PARSE_FLAG_MALFORMED",
        message: cause instanceof Error ? (cause.message.split("\n", 1)[0] ?? "") : String(cause),
        hint: usage
      })
  })
  const sources = [values.bundle, values.rootfs, values.workspace].filter((source) => source !== undefined)
  if (values.out === undefined || sources.length > 1) {
    return yield* new ParseError({
      code: values.out === undefined ? "PARSE_FLAG_MISSING_VALUE" : "PARSE_FLAG_MALFORMED",
      message: values.out === undefined ? "--out is missing" : "more than one source was given",
      hint: usage
    })
  }
  const maxMb = values["max-mb"] === undefined ? undefined : Number(values["max-mb"])
  if (maxMb !== undefined && !(maxMb > 0)) {
    return yield* new ParseError({ code: "PARSE_FLAG_MALFORMED", message: "--max-mb is not a number", hint: usage })
  }
  const patterns =
    values.excludes === undefined
      ? undefined
      : parseExcludes(
          yield* Effect.mapError(
            fs.readFileString(values.excludes),
            (cause) =>
              new ParseError({ code: "PARSE_FLAG_MALFORMED", message: `--excludes: ${cause.message}`, hint: usage })
          )
        )
  const common = given({ out: values.out, initPath: values.init, excludes: patterns })
  const { out } = values
  if (values.workspace !== undefined) {
    return yield* workspace(
      given({ out, workspace: values.workspace, mountpoint: values.mountpoint, excludes: patterns, maxMb })
    )
  }
  if (values.rootfs !== undefined)
    return yield* rootfs(given({ ...common, out, rootfs: values.rootfs, config: values.config }))
  if (values.bundle === undefined) return yield* minimal(given({ out, initPath: values.init, config: values.config }))
  if (values.tiny === true) {
    return yield* tinyBundle(
      given({ out, bundle: values.bundle, initPath: values.init, mountGuest: values["mount-guest"] })
    )
  }
  return yield* bundle(
    given({ ...common, out, bundle: values.bundle, base: values.base, execAgentPath: values["exec-agent"] })
  )
})

type Given<A> = { [K in keyof A as undefined extends A[K] ? never : K]: A[K] } & {
  [K in keyof A as undefined extends A[K] ? K : never]?: Exclude<A[K], undefined>
}
const given = <A extends object>(values: A) =>
  Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as Given<A>
