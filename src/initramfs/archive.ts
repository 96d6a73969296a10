import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Option } from "effect"
import picomatch from "picomatch"
import { type AssetError, MkinitramfsError } from "../errors.ts"
import { type CpioEntry, cpioPieces } from "../guest/Initramfs.ts"
import { configFile } from "../image/ImageConfig.ts"
import { given } from "../platform/given.ts"

const directory = 0o040000
const regular = 0o100000
const symlink = 0o120000
const characterDevice = 0o020000

/** An entry of the archive. A file's content is read only when it is written, so that the archive need not fit into memory. */
export type Node = Omit<CpioEntry, "name" | "data"> & {
  readonly data?: Uint8Array | { readonly file: string; readonly size: number }
}
export type Tree = Map<string, Node>

/** Errors of a packer. */
export type Failure = MkinitramfsError | AssetError

export const fail = (code: MkinitramfsError["code"], message: string, cause?: unknown) =>
  new MkinitramfsError({ code, message, cause })

/** Parses a file of exclude patterns: one pattern a line, `#` begins a comment. */
export const parseExcludes = (text: string): ReadonlyArray<string> =>
  text
    .split("\n")
    .map((line) => line.replace(/#.*$/, "").trim())
    .filter((line) => line !== "")

/** A test for exclude patterns. `*` matches any characters, also slashes, as in fnmatch(3) without flags. */
export const fnmatch = (patterns: ReadonlyArray<string>): ((relative: string) => boolean) =>
  patterns.length === 0 ? () => false : picomatch([...patterns], { dot: true, bash: true })

const isDirectory = (node: Node | undefined) => node !== undefined && (node.mode & 0o170000) === directory

/** Sets the node of a name. If a directory is replaced by something else, its entries are removed. */
const put = (tree: Tree, name: string, node: Node) => {
  // only a directory has entries below it: searching for them at every file would take quadratic time
  if (isDirectory(tree.get(name)) && !isDirectory(node)) {
    for (const other of [...tree.keys()]) if (other.startsWith(`${name}/`)) tree.delete(other)
  }
  tree.set(name, node)
}

/** Adds everything below `root` at `prefix`, without sockets, devices and fifos. */
export const walk = Effect.fnUntraced(function* (
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

/** Adds the missing directories above a name. */
export const addParents = (tree: Tree, name: string) => {
  const parts = name.split("/").slice(0, -1)
  for (let n = 1; n <= parts.length; n++) {
    const parent = parts.slice(0, n).join("/")
    if (!tree.has(parent)) tree.set(parent, { mode: directory | 0o755 })
  }
}

export interface Finals {
  readonly init: Option.Option<Uint8Array>
  readonly execAgent?: Option.Option<Uint8Array>
  readonly config?: Uint8Array
  readonly mountGuest?: string | undefined
  readonly epoch: boolean
}

/** The entries that kernel and init look for. They come last, so that they replace others of the same name. */
export const finalEntries = ({
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

/** The archive's entries in order: the root, the tree by name, then the final entries, each after the directories above it. */
export const entriesOf = (
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

/** Bytes that are gathered for one write, because a write for each small file would take longer than the file. */
const writtenAtOnce = 1024 * 1024

/** Writes the archive piece by piece. `out` gets its name only when it is whole. */
export const write = Effect.fnUntraced(function* (out: string, entries: ReadonlyArray<readonly [string, Node]>) {
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
            const entry = { ...rest, name, ...given({ data: bytes }) }
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
