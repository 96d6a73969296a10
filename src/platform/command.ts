import { Command, type CommandExecutor, type Error as PlatformErrors } from "@effect/platform"
import { Effect, Stream } from "effect"
import { searchPath } from "./searchPath.ts"

/** A host tool that has ended: its exit code and its output. */
export interface Finished {
  readonly code: number
  readonly stdout: string
  readonly stderr: string
}

/** Runs a host tool to its end and returns exit code and output, whatever the code is. Interruption ends the tool. */
export const run = (
  argv: readonly [string, ...ReadonlyArray<string>],
  env: Readonly<Record<string, string>> = {}
): Effect.Effect<Finished, PlatformErrors.PlatformError, CommandExecutor.CommandExecutor> => {
  const [bin, ...args] = argv
  return Effect.scoped(
    Effect.gen(function* () {
      const child = yield* Command.start(Command.make(bin, ...args).pipe(Command.env({ PATH: searchPath(), ...env })))
      const text = (bytes: typeof child.stdout) => bytes.pipe(Stream.decodeText(), Stream.mkString)
      const [stdout, stderr, code] = yield* Effect.all([text(child.stdout), text(child.stderr), child.exitCode], {
        concurrency: 3
      })
      return { code, stdout, stderr }
    })
  )
}
