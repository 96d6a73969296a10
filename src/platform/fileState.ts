import { createHash } from "node:crypto"
import { statSync } from "node:fs"
import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Data, Effect, Option, Schema } from "effect"
import { writeCacheFile } from "./cacheFile.ts"

/**
 * The state of a file. Every change of the file changes one of these fields: no program can set the time of the last change (ctime) back,
 * unlike the time of the last modification (mtime).
 */
export const FileState = Schema.Struct({
  path: Schema.String,
  sizeBytes: Schema.Number,
  /** ctime in nanoseconds since 1970, as text: a number cannot hold it exactly. */
  changedNs: Schema.String,
  inode: Schema.Number,
  device: Schema.Number
})
export type FileState = typeof FileState.Type

/** More than one tick of the coarsest clock that kernels take file times from (10 ms), in milliseconds. */
export const clockTickMs = 50

/** A file's state cannot be read; `cause` is Node's error. */
export class FileUnreadable extends Data.TaggedError("FileUnreadable")<{
  readonly message: string
  readonly cause: unknown
}> {}

/** Reads the state of a file. Follows symbolic links. */
export const read = (file: string): Effect.Effect<FileState, FileUnreadable> =>
  Effect.try({
    try: () => {
      const { ctimeNs, dev, ino, size } = statSync(file, { bigint: true })
      return {
        path: file,
        sizeBytes: Number(size),
        changedNs: String(ctimeNs),
        inode: Number(ino),
        device: Number(dev)
      }
    },
    catch: (cause) => new FileUnreadable({ message: cause instanceof Error ? cause.message : String(cause), cause })
  })

/**
 * Whether the last change is so long ago that another change would show in the state. Two changes within one tick of the clock have the same
 * time.
 */
const isAtRest = ({ changedNs }: FileState): boolean =>
  Number(BigInt(changedNs) / 1_000_000n) < Date.now() - clockTickMs

/**
 * Runs `find` about a file, once for each state of the file: the result is kept in `dir`, under the state and `what` was asked. Failures are
 * not kept, nor results about a file that was changing meanwhile. Fails as `find` does, and with FileUnreadable.
 */
export const remembered = <A, E, R>(
  fs: FileSystem.FileSystem,
  options: {
    readonly dir: string
    readonly file: string
    readonly what?: string
    readonly schema: Schema.Schema<A, string>
  },
  find: Effect.Effect<A, E, R>
): Effect.Effect<A, E | FileUnreadable, R> =>
  Effect.gen(function* () {
    const state = yield* read(options.file)
    const atRest = isAtRest(state)
    const subject = JSON.stringify([options.what ?? "", state])
    const note = path.join(options.dir, createHash("sha256").update(subject).digest("hex").slice(0, 32))
    const known = yield* Effect.option(Effect.flatMap(fs.readFileString(note), Schema.decode(options.schema)))
    if (Option.isSome(known)) return known.value
    const found = yield* find
    if (atRest && (yield* read(options.file)).changedNs === state.changedNs) {
      yield* Effect.ignore(
        Effect.flatMap(Schema.encode(options.schema)(found), (text) => writeCacheFile(fs, note, text))
      )
    }
    return found
  })
