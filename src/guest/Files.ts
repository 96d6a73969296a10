import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Effect, Option, Schema, type Scope, Stream } from "effect"
import { FilesError, isMachinenError } from "../errors.ts"
import type { Assets } from "../host/Assets.ts"
import { given } from "../platform/given.ts"
import * as tar from "../platform/tar.ts"
import type { Connection } from "../platform/UnixSocket.ts"
import { type AgentRequest, FileStat, type Frame, FrameType } from "./AgentProtocol.ts"
import { toFilesError } from "./agentErrors.ts"
import { encodeRequest, forEachOf, type Operations, sendAll } from "./operation.ts"

/** Options of `writeFile`. */
export interface WriteFileOptions {
  /** Permission bits. Default: 0644 for a new file; an existing file keeps its own. */
  readonly mode?: number
  /** Makes missing parent directories. Default true. */
  readonly recursive?: boolean
  readonly append?: boolean
}

/** A part of a file, in bytes. */
export interface FileRange {
  /** First byte. Default 0. */
  readonly offset?: number
  /** Number of bytes. Default: to the end. */
  readonly length?: number
}

/** Options of `push`. */
export interface CopyOptions {
  /** Patterns of fnmatch(3) for the path below a directory, or, without a slash, for any name. */
  readonly excludes?: ReadonlyArray<string>
  /** True (default): a source that is a symbolic link stands for what it leads to. False: the link itself is copied. */
  readonly follow?: boolean
}

/** Options of `pull`. */
export interface PullOptions extends CopyOptions {
  /**
   * Most bytes that the guest may send: contents without holes, and at least 512 for each file. More fails with FILES_TOO_LARGE. Default: no
   * bound.
   */
  readonly maxBytes?: number
}

/** Copies file contents to and from a guest: single files, trees, the whole root. Failures are FILES_* errors. */
export interface Files {
  readonly writeFile: (
    path: string,
    contents: Stream.Stream<Uint8Array> | Uint8Array | string,
    options?: WriteFileOptions
  ) => Effect.Effect<void, FilesError>
  /** The content of a file, or of a range of it. A reader that stalls stops the guest's reads. */
  readonly readFile: (path: string, range?: FileRange) => Stream.Stream<Uint8Array, FilesError>
  /**
   * Copies the contents of a host directory into a guest directory, which is made if missing; or a host file to that guest path (a symbolic link
   * there stands for what it leads to). Each file gets its name once it is whole and replaces what had the name. If a copy fails half-way, the
   * files that are whole remain.
   */
  readonly push: (hostPath: string, guestPath: string, options?: CopyOptions) => Effect.Effect<void, FilesError>
  /** Copies from the guest to the host, in the same way. Files belong to the caller; devices and set-id bits are left out. */
  readonly pull: (guestPath: string, hostPath: string, options?: PullOptions) => Effect.Effect<void, FilesError>
  /**
   * The root filesystem as a tar stream that another machine can start from: with owners, modes, extended attributes, links and devices, without
   * anything that is mounted in it. No entry has an mtime after `newest` (seconds since 1970).
   */
  readonly image: (options?: { readonly newest?: number }) => Stream.Stream<Uint8Array, FilesError>
  /** Describes a file. With `follow` what a symbolic link leads to, else (default) the link itself. */
  readonly stat: (path: string, options?: { readonly follow?: boolean }) => Effect.Effect<FileStat, FilesError>
}

/** `archiver` is the path of the shim, which packs and unpacks trees on the host. */
export const make = (
  { ask, begun, dial, operate }: Operations,
  fs: FileSystem.FileSystem,
  archiver: Assets["Type"]["shim"]
): Files => {
  /** Copies a tree between host and guest. A child takes over the connection, so the data do not pass through this process. */
  const copy = (
    request: AgentRequest,
    guestPath: string,
    hostPath: string,
    start: (connection: Connection, request: string) => Effect.Effect<tar.TransferProcess, Error, Scope.Scope>
  ) =>
    Effect.scoped(
      Effect.gen(function* () {
        const connection = yield* Effect.mapError(dial, toFilesError(guestPath))
        const { answers, failed, succeeded } = yield* Effect.mapError(
          start(connection, encodeRequest(request)),
          hostIo(hostPath)
        )
        const answer = Effect.gen(function* () {
          const { frame, result } = yield* begun({ read: answers, write: connection.write, end: Effect.void })
          yield* forEachOf(frame, () => Effect.void)
          yield* result
        })
        // the host's own failure first: the guest's answer is missing then, and no end of the VM explains that
        const answered = yield* Effect.exit(Effect.raceFirst(answer, failed))
        yield* Effect.mapError(succeeded, (cause) =>
          cause instanceof tar.PulledTooMuch
            ? new FilesError({
                code: "FILES_TOO_LARGE",
                message: `${guestPath} is larger than allowed: ${cause.message}`,
                hint: "allow more (`maxBytes`), or leave something out (`excludes`)",
                cause
              })
            : hostIo(hostPath)(cause)
        )
        yield* Effect.mapError(answered, toFilesError(guestPath))
      })
    )

  const receive = (request: AgentRequest, guestPath: string) =>
    Stream.unwrapScoped(Effect.map(operate(request), ({ frames }) => Stream.filterMap(frames, toData))).pipe(
      Stream.mapError(toFilesError(guestPath))
    )

  const stat = Effect.fn("Agent.stat")(function* (
    path: string,
    { follow = false }: { readonly follow?: boolean } = {}
  ) {
    const json = yield* Effect.mapError(ask({ op: "stat", path, follow }), toFilesError(path))
    return yield* Effect.mapError(decodeStat(json), toFilesError(path))
  })

  return {
    writeFile: Effect.fn("Agent.writeFile")(
      function* (path, contents, options = {}) {
        const { mode } = options
        const { frame, result, send } = yield* operate({
          op: "write",
          path,
          append: options.append ?? false,
          recursive: options.recursive ?? true,
          ...given({ mode })
        })
        const receiving = forEachOf(frame, () => Effect.void)
        yield* Effect.all([sendAll(send, toStream(contents)), receiving], { concurrency: 2, discard: true })
        yield* result
      },
      (effect, path) => Effect.mapError(Effect.scoped(effect), toFilesError(path))
    ),
    readFile: (path, range = {}) =>
      Stream.unwrap(Effect.as(checkRange(range), receive({ op: "read", path, ...range }, path))),
    image: (options) => receive({ op: "image", ...options }, "/"),
    push: Effect.fn("Agent.push")(function* (hostPath, guestPath, { excludes = [], follow = true } = {}) {
      const isLink = !follow && Option.isSome(yield* Effect.option(fs.readLink(hostPath)))
      const info = isLink ? undefined : yield* Effect.mapError(fs.stat(hostPath), nothingToPush(hostPath))
      const file = info?.type !== "Directory"
      const program = yield* Effect.mapError(archiver, hostIo(hostPath))
      const pushed = { path: hostPath, name: path.posix.basename(guestPath), follow, excludes }
      yield* copy({ op: "push", path: guestPath, file }, guestPath, hostPath, (connection, request) =>
        tar.push(program, connection, request, pushed)
      )
    }),
    pull: Effect.fn("Agent.pull")(function* (guestPath, hostPath, { excludes = [], follow = true, maxBytes } = {}) {
      const kind = (yield* stat(guestPath, { follow })).kind === "directory" ? "directory" : "file"
      const program = yield* Effect.mapError(archiver, hostIo(hostPath))
      const pulled = { kind, path: hostPath, ...given({ maxBytes }) } as const
      const request = { op: "pull", path: guestPath, follow, excludes } as const
      yield* copy(request, guestPath, hostPath, (connection, request) => tar.pull(program, connection, request, pulled))
    }),
    stat
  }
}

const checkRange = (range: FileRange): Effect.Effect<void, FilesError> =>
  Object.values(range).every((n) => Number.isSafeInteger(n) && n >= 0)
    ? Effect.void
    : new FilesError({
        code: "FILES_RANGE_INVALID",
        message: `${JSON.stringify(range)} is not a part of a file`,
        hint: "offset and length are whole numbers of bytes"
      })

const toStream = (contents: Stream.Stream<Uint8Array> | Uint8Array | string): Stream.Stream<Uint8Array> =>
  typeof contents === "string"
    ? Stream.make(Buffer.from(contents))
    : contents instanceof Uint8Array
      ? Stream.make(contents)
      : contents

const decodeStat = Schema.decodeUnknown(FileStat)

const toData = (frame: Frame): Option.Option<Uint8Array> =>
  frame.type === FrameType.data ? Option.some(frame.payload) : Option.none()

const nothingToPush = (hostPath: string) => (cause: unknown) =>
  new FilesError({
    code: "FILES_HOST_DIR_NOT_FOUND",
    message: `there is no file or directory ${hostPath} on the host`,
    cause
  })

const hostIo = (hostPath: string) => (cause: unknown) =>
  cause instanceof FilesError
    ? cause
    : new FilesError({
        code: "FILES_HOST_IO",
        message: `${hostPath} cannot be read or written: ${cause instanceof Error ? cause.message : String(cause)}`,
        ...(isMachinenError(cause) ? given({ hint: cause.hint }) : {}),
        cause
      })
