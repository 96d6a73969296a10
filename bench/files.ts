import { randomUUID } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import * as command from "../src/platform/command.ts"
import { Settings } from "../src/Settings.ts"
import { BenchError } from "./harness.ts"

const run = Effect.fnUntraced(function* (argv: readonly [string, ...ReadonlyArray<string>]) {
  const { code, stderr } = yield* command.run(argv)
  if (code !== 0) return yield* new BenchError({ message: `${argv.join(" ")}: ${stderr.trim()}` })
})

/** An unused path in this bench's home. The scope removes what is made there. */
export const newPath = Effect.fn("newPath")(function* (kind: string) {
  const fs = yield* FileSystem.FileSystem
  const { home } = yield* Settings
  return yield* Effect.acquireRelease(
    Effect.sync(() => path.join(home, `${kind}-${randomUUID().slice(0, 8)}`)),
    (made) => Effect.ignore(fs.remove(made, { recursive: true, force: true }))
  )
})

export const newDirectory = Effect.fn("newDirectory")(function* (kind: string) {
  const fs = yield* FileSystem.FileSystem
  const dir = yield* newPath(kind)
  yield* fs.makeDirectory(dir)
  return dir
})

/** Copies with cp: holes stay holes, and blocks are shared where the filesystem can. */
export const copy = (from: ReadonlyArray<string>, to: string) => run(["cp", "-R", "-H", "--reflink=auto", ...from, to])

/** Drops files from the page cache, except pages that a process maps. */
export const evict = (files: ReadonlyArray<string>) =>
  Effect.forEach(
    files,
    (file) => run(["dd", `of=${file}`, "oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none"]),
    { discard: true }
  )
