import { Chunk, Effect, Option, Schema, type Scope, Stream } from "effect"
import { ExecError, FilesError } from "../errors.ts"
import { boundedLines } from "../platform/boundedLines.ts"
import { given } from "../platform/given.ts"
import { DirectoryEntry, FileChange, FrameType } from "./AgentProtocol.ts"
import { toFilesError } from "./agentErrors.ts"
import type { Operation, Operations } from "./operation.ts"

/**
 * Operations on names in a guest. All paths are absolute. A name need not be UTF-8: each other byte is the lone surrogate U+DC00 + byte, in
 * answers and in requests alike, so that a listed name can be used in a request as it is. Failures are FILES_* errors.
 */
export interface FileTree {
  /** The entries of a directory, sorted by name. Symbolic links are not followed. At most 1,000,000. */
  readonly list: (path: string) => Effect.Effect<ReadonlyArray<DirectoryEntry>, FilesError>
  /** Makes a directory. With `recursive` (default) also those above it, and an existing directory is no error. */
  readonly makeDirectory: (
    path: string,
    options?: { readonly recursive?: boolean; readonly mode?: number }
  ) => Effect.Effect<void, FilesError>
  /** Renames within one filesystem. Replaces a file that has the new name. */
  readonly rename: (from: string, to: string) => Effect.Effect<void, FilesError>
  /** Removes a file, a link or an empty directory; with `recursive` (default false) a directory with its content. */
  readonly remove: (path: string, options?: { readonly recursive?: boolean }) => Effect.Effect<void, FilesError>
  /**
   * Changes in a directory from now on, with `recursive` also in the directories below it on the same filesystem. The stream ends when the
   * directory is removed or renamed; closing the scope ends the watch. May be run once. A change may be reported twice; none is missing unless a
   * `lost` says so.
   */
  readonly watch: (
    path: string,
    options?: { readonly recursive?: boolean }
  ) => Effect.Effect<Stream.Stream<FileChange, FilesError>, FilesError, Scope.Scope>
}

export const make = ({ ask, operate }: Operations): FileTree => ({
  list: Effect.fn("Agent.list")(function* (path: string) {
    const listed = Stream.unwrapScoped(Effect.map(operate({ op: "list", path }), lines))
    const entries = yield* Stream.runCollect(Stream.take(Stream.mapEffect(listed, decodeEntry), maxEntries + 1)).pipe(
      Effect.mapError(toFilesError(path))
    )
    if (entries.length > maxEntries) {
      return yield* new FilesError({
        code: "FILES_TOO_LARGE",
        message: `${path} has more than ${maxEntries} entries`,
        hint: "let a command in the guest look through it (find)"
      })
    }
    return Chunk.toReadonlyArray(entries).toSorted((a, b) => (a.name < b.name ? -1 : 1))
  }),
  makeDirectory: Effect.fn("Agent.makeDirectory")((path, { mode, recursive = true } = {}) =>
    Effect.mapError(Effect.asVoid(ask({ op: "mkdir", path, recursive, ...given({ mode }) })), toFilesError(path))
  ),
  rename: Effect.fn("Agent.rename")((from, to) =>
    Effect.mapError(Effect.asVoid(ask({ op: "rename", from, to })), toFilesError(from))
  ),
  remove: Effect.fn("Agent.remove")((path, { recursive = false } = {}) =>
    Effect.mapError(Effect.asVoid(ask({ op: "remove", path, recursive })), toFilesError(path))
  ),
  watch: Effect.fn("Agent.watch")((path, { recursive = false } = {}) =>
    operate({ op: "watch", path, recursive }).pipe(
      Effect.map((operation) => Stream.mapError(Stream.mapEffect(lines(operation), decodeChange), toFilesError(path))),
      Effect.mapError(toFilesError(path))
    )
  )
})

/** Longest line in characters: two paths of 4 KiB, each byte as an escape of six characters, and the rest of the JSON. */
const maxLine = 64 * 1024
/** Most entries of one listing: a guest must not fill the memory of the caller. */
const maxEntries = 1_000_000

/** The lines of text that an operation sends as data. */
const lines = ({ frames }: Operation) =>
  frames.pipe(
    Stream.filterMap(({ payload, type }) => (type === FrameType.data ? Option.some(payload) : Option.none())),
    boundedLines(
      maxLine,
      () =>
        new ExecError({ code: "EXEC_PROTOCOL", message: `the agent sent a line of more than ${maxLine} characters` })
    )
  )

const decodeEntry = Schema.decode(Schema.parseJson(DirectoryEntry))
const decodeChange = Schema.decode(Schema.parseJson(FileChange))
