import { spawn } from "node:child_process"
import { createInterface } from "node:readline"
import { Deferred, Effect, Exit, Mailbox, Runtime, type Scope, type Stream } from "effect"

/**
 * A child that lives as long as we hold its stdin: it must end by itself when stdin does. That works in a crash of ours too, where no
 * finalizer runs.
 */
export interface OwnedProcess {
  readonly pid: number
  /** Its stdout, line by line; ends when it closes stdout, at the latest when it dies. May be run once. */
  readonly lines: Stream.Stream<string>
  readonly writeLine: (line: string) => Effect.Effect<void>
  /** Ends its stdin: "your owner is gone". */
  readonly disown: Effect.Effect<void>
  /** Lets go of it without ending stdin in its eyes, so that this process may exit; the child must have been told to expect that. */
  readonly release: Effect.Effect<void>
  /** Completes when it has ended and its stdout is read. */
  readonly ended: Effect.Effect<void>
}

/** Starts a child in its own session, out of reach of the terminal's ctrl-c. Its stderr is discarded. */
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
    child.stdin.on("error", () => {}) // EPIPE: it ended; `ended` tells
    const reader = createInterface({ input: child.stdout })
    reader.on("line", (line) => lines.unsafeOffer(line))
    child.once("close", () => {
      lines.unsafeDone(Exit.void) // what was offered before is still read
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
