import { createHash } from "node:crypto"
import { statSync } from "node:fs"
import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Data, Effect, Option, Schema } from "effect"
import { writeCacheFile } from "./cacheFile.ts"

/**
 * A file as it is now. Whoever changes it changes one of these: the time of its last change (ctime) is the kernel's own and cannot be set
 * back, unlike the time of its last modification (mtime).
 */
export const FileState = Schema.Struct({
  path: Schema.String,
  sizeBytes: Schema.Number,
  /** Nanoseconds since 1970, which are more than a number can hold exactly. */
  changedNs: Schema.String,
  inode: Schema.Number,
  device: Schema.Number
})
export type FileState = typeof FileState.Type

/** The coarsest clock that file times are taken from, with room to spare. */
export const clockTickMs = 50

/** A file that cannot be looked at. */
export class FileUnreadable extends Data.TaggedError("FileUnreadable")<{
  readonly message: string
  readonly cause: unknown
}> {}

/** The state of a file, or why it cannot be looked at. */
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
 * Whether the file was last changed so long ago that another change would show in its state. Two changes within one tick of the clock have the
 * same time.
 */
export const isAtRest = ({ changedNs }: FileState): boolean =>
  Number(BigInt(changedNs) / 1_000_000n) < Date.now() - clockTickMs

/**
 * Finds something out about a file and notes it in `dir` for the state of the file and `what` was asked. Only what was established is noted: a
 * failure is not, nor what was found in a file that was being changed.
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
