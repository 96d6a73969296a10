import { Chunk, Effect, Option, Schema, type Scope, Stream } from "effect"
import { ExecError, FilesError } from "../errors.ts"
import { boundedLines } from "../platform/boundedLines.ts"
import { given } from "../platform/given.ts"
import { DirectoryEntry, FileChange, FrameType } from "./AgentProtocol.ts"
import { toFilesError } from "./agentErrors.ts"
import type { Operation, Operations } from "./operation.ts"

/**
 * Names in a guest: what there is, making, moving and removing it. All paths are absolute. A name need not be UTF-8: a byte that is not is the lone
 * surrogate U+DC00 + byte, in what is told and in what is asked for, so a listed name can be given back as it is.
 */
export interface FileTree {
  /** What is in a directory, in the order of the names. A link is described itself. */
  readonly list: (path: string) => Effect.Effect<ReadonlyArray<DirectoryEntry>, FilesError>
  /** With `recursive` (the default) also the directories above it, and one that is there is fine. */
  readonly makeDirectory: (
    path: string,
    options?: { readonly recursive?: boolean; readonly mode?: number }
  ) => Effect.Effect<void, FilesError>
  /** Within one filesystem; what has the new name already is replaced. */
  readonly rename: (from: string, to: string) => Effect.Effect<void, FilesError>
  /** A file, a link, an empty directory; with `recursive` a directory with all that is in it. */
  readonly remove: (path: string, options?: { readonly recursive?: boolean }) => Effect.Effect<void, FilesError>
  /**
   * What changes in a directory from now on, with `recursive` also in those below it, on its filesystem; until it is removed or renamed, or the
   * scope closes. Run once. Something may be told twice, nothing is left out but where a change says so (`lost`).
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

/** Two paths of 4 KiB, each byte as an escape of six characters, and what stands around them. */
const maxLine = 64 * 1024
/** Of one directory: a guest must not fill the memory of its caller. */
const maxEntries = 1_000_000

/** What an operation sends as text. */
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
