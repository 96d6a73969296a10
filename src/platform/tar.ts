import { spawn } from "node:child_process"
import * as net from "node:net"
import { Deferred, Effect } from "effect"
import { type Connection, fromSocket } from "./UnixSocket.ts"

/**
 * Copies trees between this host and a guest by a child process, the shim's `push` and `pull` (docs/protocol.md §5.6), which packs and unpacks
 * with the same code as the guest. An archive may come from a hostile guest: the kernel (openat2) keeps every entry below its directory,
 * whatever is renamed or linked meanwhile.
 */

/** A child that has taken over a connection to a guest's agent, and sends or receives the data of one operation there. */
export interface TransferProcess {
  /** The agent's frames other than data, as bytes. */
  readonly answers: Connection["read"]
  /** Waits for the child's end. Fails when this host's side of the copy failed, with PulledTooMuch beyond `maxBytes`. */
  readonly succeeded: Effect.Effect<void, Error>
  /** Fails as soon as `succeeded` would; never completes otherwise. */
  readonly failed: Effect.Effect<never, Error>
}

/** What is sent to a guest. */
export interface Pushed {
  /** A directory, whose contents are sent, or a file, which is sent under `name`. */
  readonly path: string
  readonly name: string
  /** A symbolic link at `path` stands for what it leads to. */
  readonly follow: boolean
  /** Patterns of fnmatch(3) for the path below the directory, or, without a slash, for any name. */
  readonly excludes: ReadonlyArray<string>
}

/** Where files from a guest are written. */
export interface Pulled {
  readonly kind: "directory" | "file"
  readonly path: string
  /** Most bytes of archive that the guest may send. Default: no bound. */
  readonly maxBytes?: number
}

/** The guest sent more than `maxBytes`. */
export class PulledTooMuch extends Error {}

export const push = (shim: string, connection: Connection, request: string, { excludes, follow, name, path }: Pushed) =>
  startTransfer([shim, "push", request, follow ? "follow" : "link", path, name, ...excludes], connection)

/** Receives what the request asks for. Files belong to the caller; devices are left out, and no file gets a set-id bit. */
export const pull = (shim: string, connection: Connection, request: string, { kind, maxBytes, path }: Pulled) =>
  startTransfer([shim, "pull", request, kind, path, String(maxBytes ?? 2n ** 64n - 1n)], connection)

/** The shim's exit code when the guest sent more than `maxBytes`. */
const tooLarge = 3

/** Hands the connection to a child. The child ends with the scope at the latest, and with this process (PDEATHSIG). */
const startTransfer = ([bin, ...args]: readonly [string, ...ReadonlyArray<string>], { socket }: Connection) =>
  Effect.gen(function* () {
    const ended = yield* Deferred.make<void, Error>()
    const child = yield* Effect.acquireRelease(
      Effect.async<ReturnType<typeof spawnChild>, Error>((resume) => {
        const child = spawnChild(bin, args, socket)
        // destroyed in the same turn, so that this process reads no byte of the child's
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
    // Node discards the output of a child that has ended while no listener is there, as between two of our reads.
    stdout.on("readable", () => {})
    const { read } = fromSocket(stdout)
    const transfer: TransferProcess = {
      answers: read,
      // reads to the end of its output first: the child ends after that
      succeeded: Effect.zipRight(Effect.ignore(Effect.forever(read)), Deferred.await(ended)),
      failed: Effect.zipRight(Deferred.await(ended), Effect.never)
    }
    return transfer
  })

const failureOf = (code: number | null, message: string) =>
  code === tooLarge ? new PulledTooMuch(message) : new Error(message)

const spawnChild = (bin: string, args: ReadonlyArray<string>, stdin: net.Socket) =>
  spawn(bin, args, { stdio: [stdin, "pipe", "pipe"] })
