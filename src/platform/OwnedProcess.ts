import { spawn } from "node:child_process"
import { createInterface } from "node:readline"
import { Deferred, Effect, Exit, Mailbox, Runtime, type Scope, type Stream } from "effect"

/**
 * A child that lives as long as this process holds the child's stdin: the child must end when its stdin does. That works even when this
 * process crashes and runs no finalizer.
 */
export interface OwnedProcess {
  readonly pid: number
  /** The child's stdout, line by line, up to the end of stdout. May be run once. */
  readonly lines: Stream.Stream<string>
  readonly writeLine: (line: string) => Effect.Effect<void>
  /** Ends the child's stdin, which tells the child that its owner is gone. */
  readonly disown: Effect.Effect<void>
  /** Stops waiting for the child, so that this process may exit. That closes stdin: tell the child before to go on without an owner. */
  readonly release: Effect.Effect<void>
  /** Completes when the child has ended and its stdout has been read. */
  readonly ended: Effect.Effect<void>
}

/**
 * Starts a child in its own session, out of reach of the terminal's ctrl-c, in the directory `/`. The child's stderr is discarded. Closing
 * the scope does not end the child: `disown` does. Fails with Node's error when the program cannot be started.
 */
export const start = (
  argv: readonly [string, ...ReadonlyArray<string>],
  env: Readonly<Record<string, string | undefined>>
): Effect.Effect<OwnedProcess, NodeJS.ErrnoException, Scope.Scope> =>
  Effect.gen(function* () {
    const ended = yield* Deferred.make<void>()
    const lines = yield* Mailbox.make<string>()
    const runFork = Runtime.runFork(yield* Effect.runtime())
    const [bin, ...args] = argv

    const child = yield* Effect.async<ReturnType<typeof begin>, NodeJS.ErrnoException>((resume) => {
      const child = begin(bin, args, env)
      child.once("error", (error) => resume(Effect.fail(error)))
      child.once("spawn", () => resume(Effect.succeed(child)))
    })
    child.stdin.on("error", () => {}) // EPIPE: the child has ended, and `ended` says so
    const reader = createInterface({ input: child.stdout })
    reader.on("line", (line) => lines.unsafeOffer(line))
    child.once("close", () => {
      lines.unsafeDone(Exit.void) // lines that were offered before can still be read
      runFork(Deferred.succeed(ended, undefined))
    })

    return {
      pid: child.pid ?? 0,
      lines: Mailbox.toStream(lines),
      writeLine: (line) => Effect.sync(() => void child.stdin.write(`${line}\n`)),
      disown: Effect.sync(() => void child.stdin.end()),
      release: Effect.sync(() => {
        child.unref()
        child.stdin.destroy()
        reader.close()
        child.stdout.destroy()
      }),
      ended: Deferred.await(ended)
    }
  })

const begin = (bin: string, args: ReadonlyArray<string>, env: Readonly<Record<string, string | undefined>>) =>
  spawn(bin, args, { detached: true, env, cwd: "/", stdio: ["pipe", "pipe", "ignore"] })
