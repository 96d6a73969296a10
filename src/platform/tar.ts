import { spawn } from "node:child_process"
import * as net from "node:net"
import { Deferred, Effect } from "effect"
import * as Tar from "tar"
import { type Connection, fromSocket } from "./UnixSocket.ts"

/**
 * Trees of this host to and from a guest, by the shim (docs/protocol.md §5): the same code that packs and unpacks in the guest. What is unpacked
 * may come from a hostile one; the kernel itself keeps it below its directory, whatever is renamed or linked meanwhile.
 */

/** The child that has a connection to a guest's agent instead of this process, and sends or takes the data of one operation there. */
export interface TransferProcess {
  /** What the agent says beside the data. */
  readonly answers: Connection["read"]
  /** It has ended, and all was well at this end. */
  readonly succeeded: Effect.Effect<void, Error>
}

/** What goes to a guest. */
export interface Pushed {
  /** A directory, whose contents are sent, or a file, which is sent by `name`. */
  readonly path: string
  readonly name: string
  /** A symbolic link at `path` stands for what it leads to. */
  readonly follow: boolean
  /** Patterns of fnmatch, for the path below the directory or for any name. */
  readonly excludes: ReadonlyArray<string>
}

/** Where what comes from a guest goes. */
export interface Pulled {
  readonly kind: "directory" | "file"
  readonly path: string
  /** Most that the guest may send, in bytes; no bound when left out. */
  readonly maxBytes?: number
}

/** The guest sent more than it may. */
export class PulledTooMuch extends Error {}

export const push = (shim: string, connection: Connection, request: string, { excludes, follow, name, path }: Pushed) =>
  courier([shim, "push", request, follow ? "follow" : "link", path, name, ...excludes], connection)

/** What this request brings. Files belong to the caller; devices are not made, and no file gets a set-id bit. */
export const pull = (shim: string, connection: Connection, request: string, { kind, maxBytes, path }: Pulled) =>
  courier([shim, "pull", request, kind, path, String(maxBytes ?? 2n ** 64n - 1n)], connection)

/** What the shim ends with when the guest sent more than it may. */
const tooLarge = 3

/** Ends with the scope, at the latest; with this process too, by a signal. */
const courier = ([bin, ...args]: readonly [string, ...ReadonlyArray<string>], { socket }: Connection) =>
  Effect.gen(function* () {
    const ended = yield* Deferred.make<void, Error>()
    const child = yield* Effect.acquireRelease(
      Effect.async<ReturnType<typeof begin>, Error>((resume) => {
        const child = begin(bin, args, socket)
        // in the same turn: not a byte of what comes to the child is read here
        socket.destroy()
        const said: Array<Buffer> = []
        child.stderr?.on("data", (chunk: Buffer) => said.push(chunk))
        child.once("error", (error) => resume(Effect.fail(error)))
        child.once("spawn", () => resume(Effect.succeed(child)))
        child.once("close", (code, signal) =>
          Deferred.unsafeDone(
            ended,
            code === 0
              ? Effect.void
              : Effect.fail(failureOf(code, Buffer.concat(said).toString().trim() || `it ended with ${signal ?? code}`))
          )
        )
      }),
      (child) =>
        Effect.suspend(() => {
          child.kill("SIGKILL")
          child.stdout?.destroy()
          return Effect.exit(Deferred.await(ended))
        })
    )
    const { stdout } = child
    if (!(stdout instanceof net.Socket)) return yield* Effect.dieMessage("a child's pipe is no socket")
    // When a child has ended, Node lets what nobody listens for run out of its pipe; between two of our reads nobody would.
    stdout.on("readable", () => {})
    const { read } = fromSocket(stdout)
    const courier: TransferProcess = {
      answers: read,
      // it is over when its output is
      succeeded: Effect.zipRight(Effect.ignore(Effect.forever(read)), Deferred.await(ended))
    }
    return courier
  })

const failureOf = (code: number | null, message: string) =>
  code === tooLarge ? new PulledTooMuch(message) : new Error(message)

const begin = (bin: string, args: ReadonlyArray<string>, stdin: net.Socket) =>
  spawn(bin, args, { stdio: [stdin, "pipe", "pipe"] })

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
