import { createHash, type Hash } from "node:crypto"
import { closeSync, lstatSync, openSync, readdirSync, readlinkSync, readSync } from "node:fs"
import { Effect } from "effect"

/**
 * A directory tree as lstat(2) describes it. Names are bytes, one character each ("latin1"), because names on Linux need not be UTF-8. The scan
 * is synchronous in pieces: a turn of the event loop for each of 20,000 files would cost more than the files.
 */
export interface TreeScan {
  /** sha256 over the metadata of all entries, times and inodes included: an equal stamp means that no content needs to be read again. */
  readonly stamp: string
  readonly entries: ReadonlyArray<TreeEntry>
  /** The newest ctime in the tree, in Unix milliseconds. */
  readonly changedMs: number
}

interface TreeEntry {
  /** Relative to the root of the tree, which is "". */
  readonly path: string
  readonly kind: "file" | "directory" | "symlink" | "other"
  readonly mode: bigint
  readonly uid: bigint
  readonly gid: bigint
  readonly size: bigint
  readonly mtimeNs: bigint
  readonly device: bigint
}

const bytes = (name: string) => Buffer.from(name, "latin1")
const hasVanished = (cause: unknown) => cause instanceof Error && "code" in cause && cause.code === "ENOENT"

/** Scans a tree, sorted by name. Leaves out entries that vanish meanwhile. Fails with Node's error, also when the root is not there. */
export const scan = Effect.fn("treeScan.scan")(function* (root: string) {
  const stamp = createHash("sha256")
  const entries: Array<TreeEntry> = []
  let changedNs = 0n
  const base = Buffer.from(root).toString("latin1")
  const add = (path: string): TreeEntry | undefined => {
    try {
      const info = lstatSync(bytes(path === "" ? base : `${base}/${path}`), { bigint: true })
      const { ctimeNs, dev, gid, ino, mode, mtimeNs, rdev, size, uid } = info
      stamp.update(`${path}\0${dev}\0${ino}\0${mode}\0${uid}\0${gid}\0${rdev}\0${size}\0${mtimeNs}\0${ctimeNs}\n`)
      if (ctimeNs > changedNs) changedNs = ctimeNs
      const kind = info.isFile()
        ? "file"
        : info.isDirectory()
          ? "directory"
          : info.isSymbolicLink()
            ? "symlink"
            : "other"
      const entry: TreeEntry = { path, kind, mode, uid, gid, size, mtimeNs, device: rdev }
      entries.push(entry)
      return entry
    } catch (cause) {
      if (path !== "" && hasVanished(cause)) return undefined
      throw cause
    }
  }
  /** Adds the entries of a directory; returns those that are directories. */
  const list = (directory: string): ReadonlyArray<string> => {
    let names: ReadonlyArray<Buffer>
    try {
      names = readdirSync(bytes(directory === "" ? base : `${base}/${directory}`), { encoding: "buffer" })
    } catch (cause) {
      if (directory !== "" && hasVanished(cause)) return []
      throw cause
    }
    const sorted = names.map((name) => name.toString("latin1")).sort()
    return sorted.flatMap((name) => {
      const path = directory === "" ? name : `${directory}/${name}`
      return add(path)?.kind === "directory" ? [path] : []
    })
  }
  const attempt = <A>(look: () => A) => Effect.try({ try: look, catch: (cause) => cause as Error })

  yield* attempt(() => add(""))
  const directories = [""]
  for (let at = 0; at < directories.length; at++) {
    directories.push(...(yield* attempt(() => list(directories[at] ?? ""))))
    if (at % 64 === 63) yield* Effect.yieldNow()
  }
  const found: TreeScan = { stamp: stamp.digest("hex"), entries, changedMs: Number(changedNs / 1_000_000n) }
  return found
})

const bufferBytes = 1024 * 1024
/** Bytes that are read before other fibers get their turn. */
const turnBytes = 16 * bufferBytes

/**
 * sha256 over the content of a tree: a record for each path, with its mode, owner, mtime, size and content. An equal copy elsewhere has the same
 * key. Size and order of directories do not count: they depend on the file system.
 */
export const contentKey = Effect.fn("treeScan.contentKey")(function* (root: string, { entries }: TreeScan) {
  const base = Buffer.from(root).toString("latin1")
  const buffer = Buffer.allocUnsafe(bufferBytes)
  const key = createHash("sha256")
  let sinceTurn = 0
  const sorted = [...entries].sort((a, b) => (a.path < b.path ? -1 : a.path > b.path ? 1 : 0))
  for (const { device, gid, kind, mode, mtimeNs, path, size, uid } of sorted) {
    const file = bytes(path === "" ? base : `${base}/${path}`)
    const record = `${path}\0${kind}\0${mode}\0${uid}\0${gid}\0${mtimeNs}\0`
    let content = ""
    if (kind === "symlink") {
      content = yield* reading(() => readlinkSync(file, { encoding: "buffer" }).toString("latin1"))
    } else if (kind === "other") {
      content = String(device)
    } else if (kind === "file") {
      const hash = createHash("sha256")
      const fd = yield* reading(() => openSync(file, "r"))
      yield* Effect.ensuring(
        Effect.gen(function* () {
          for (;;) {
            const n = yield* reading(() => readInto(fd, buffer, hash))
            if (n === 0) return
            sinceTurn += n
            if (sinceTurn >= turnBytes) {
              sinceTurn = 0
              yield* Effect.yieldNow()
            }
          }
        }),
        Effect.sync(() => closeSync(fd))
      )
      content = `${size}\0${hash.digest("hex")}`
    }
    // unambiguous: no field holds a NUL, and the kind determines the number of fields
    key.update(`${record}${content}\0`, "latin1")
  }
  return key.digest("hex")
})

const reading = <A>(read: () => A) => Effect.try({ try: read, catch: (cause) => cause as Error })

const readInto = (fd: number, buffer: Buffer, hash: Hash): number => {
  const n = readSync(fd, buffer)
  hash.update(buffer.subarray(0, n))
  return n
}
