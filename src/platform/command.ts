import { Command, type CommandExecutor, type Error as PlatformErrors } from "@effect/platform"
import { Effect, Stream } from "effect"
import { searchPath } from "./searchPath.ts"

/** A host tool that has ended: its exit code and its output. */
export interface Finished {
  readonly code: number
  readonly stdout: string
  readonly stderr: string
}

/** Time between SIGTERM and SIGKILL. A compiler ends at once at SIGTERM, or never. */
const killDelay = "5 seconds"

/** Starts a command. The scope ends its process group: with SIGTERM, and when that does not help, with SIGKILL. */
export const start = (command: Command.Command) =>
  // Command.start alone would wait for ever for a program that ignores SIGTERM
  Effect.acquireRelease(Command.start(command), (child) =>
    Effect.whenEffect(
      child.kill("SIGTERM").pipe(
        Effect.interruptible, // finalizers run uninterruptibly: without this the timeout cannot fire
        Effect.timeout(killDelay),
        Effect.catchAll(() => Effect.ignore(child.kill("SIGKILL")))
      ),
      Effect.orElseSucceed(child.isRunning, () => false)
    )
  )

/** Runs a host tool to its end and returns exit code and output, whatever the code is. Interruption ends the tool. */
export const run = (
  argv: readonly [string, ...ReadonlyArray<string>],
  env: Readonly<Record<string, string>> = {}
): Effect.Effect<Finished, PlatformErrors.PlatformError, CommandExecutor.CommandExecutor> => {
  const [bin, ...args] = argv
  return Effect.scoped(
    Effect.gen(function* () {
      const child = yield* start(Command.make(bin, ...args).pipe(Command.env({ PATH: searchPath(), ...env })))
      const text = (bytes: typeof child.stdout) => bytes.pipe(Stream.decodeText(), Stream.mkString)
      const [stdout, stderr, code] = yield* Effect.all([text(child.stdout), text(child.stderr), child.exitCode], {
        concurrency: 3
      })
      return { code, stdout, stderr }
    })
  )
}
