import { spawn } from "node:child_process"
import * as net from "node:net"
import { Deferred, Effect, type Scope, Stream } from "effect"
import * as Tar from "tar"
import { type Connection, fromSocket } from "./UnixSocket.ts"

/**
 * Trees of this host as tar, by the shim (docs/protocol.md §5): the same code that packs and unpacks in the guest. What is unpacked may come from
 * a hostile guest; the kernel itself keeps it below its directory, whatever is renamed or linked meanwhile.
 */

/** A directory's contents, or a file by that name. Patterns are fnmatch's, for the path below the directory or for any name. */
export const pack = (
  shim: string,
  path: string,
  name: string,
  excludes: ReadonlyArray<string>
): Stream.Stream<Uint8Array, Error> =>
  Stream.unwrapScoped(
    Effect.map(start([shim, "pack", path, name, ...excludes]), ({ output, succeeded }) =>
      Stream.concat(output.bytes, Stream.drain(Stream.fromEffect(succeeded)))
    )
  )

/** Files belong to the caller; devices are not made, and no file gets a set-id bit. */
export const unpack = <E, R>(
  shim: string,
  dir: string,
  bytes: Stream.Stream<Uint8Array, E, R>
): Effect.Effect<void, E | Error, R> =>
  Effect.scoped(
    Effect.gen(function* () {
      const { input, succeeded } = yield* start([shim, "unpack", dir])
      // one that takes no more has a reason, and tells it at its end
      yield* Stream.runForEachWhile(bytes, (piece) => Effect.isSuccess(input.write(piece)))
      yield* input.end
      yield* succeeded
    })
  )

interface Archiver {
  readonly input: Connection
  readonly output: Connection
  /** It has ended, without a fault or with what it said. */
  readonly succeeded: Effect.Effect<void, Error>
}

/** Ends with the scope, at the latest; with this process too: it loses its input, or its reader. */
const start = (argv: readonly [string, ...ReadonlyArray<string>]): Effect.Effect<Archiver, Error, Scope.Scope> =>
  Effect.gen(function* () {
    const [bin, ...args] = argv
    const ended = yield* Deferred.make<void, Error>()
    const child = yield* Effect.acquireRelease(
      Effect.async<ReturnType<typeof begin>, Error>((resume) => {
        const child = begin(bin, args)
        const said: Array<Buffer> = []
        child.stderr.on("data", (chunk: Buffer) => said.push(chunk))
        child.once("error", (error) => resume(Effect.fail(error)))
        child.once("spawn", () => resume(Effect.succeed(child)))
        child.once("close", (code, signal) =>
          Deferred.unsafeDone(
            ended,
            code === 0
              ? Effect.void
              : Effect.fail(new Error(Buffer.concat(said).toString().trim() || `it ended with ${signal ?? code}`))
          )
        )
      }),
      (child) =>
        Effect.suspend(() => {
          child.kill("SIGKILL")
          child.stdin.destroy()
          child.stdout.destroy()
          return Effect.exit(Deferred.await(ended))
        })
    )
    const { stdin, stdout } = child
    if (!(stdin instanceof net.Socket && stdout instanceof net.Socket)) {
      return yield* Effect.dieMessage("a child's pipes are no sockets")
    }
    // When a child has ended, Node lets what nobody listens for run out of its pipe; between two of our reads nobody would.
    stdout.on("readable", () => {})
    return { input: fromSocket(stdin), output: fromSocket(stdout), succeeded: Deferred.await(ended) }
  })

const begin = (bin: string, args: ReadonlyArray<string>) => spawn(bin, args, { stdio: ["pipe", "pipe", "pipe"] })

/** One file's header and content, as they stand in an archive; it is root's, and of no time. */
export const entry = (name: string, content: Uint8Array): Uint8Array => {
  const header = new Tar.Header({
    path: name,
    mode: 0o644,
    uid: 0,
    gid: 0,
    size: content.length,
    mtime: new Date(0),
    type: "File"
  })
  const padded = Buffer.alloc(512 + Math.ceil(content.length / 512) * 512)
  header.encode(padded, 0)
  padded.set(content, 512)
  return padded
}
