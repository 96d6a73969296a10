import { Command, type CommandExecutor, type Error as PlatformErrors } from "@effect/platform"
import { Effect, Stream } from "effect"
import { start } from "./command.ts"
import { searchPath } from "./searchPath.ts"

/** How a long command ended: its exit code and the last lines it wrote. */
export interface Ended {
  readonly code: number
  readonly tail: ReadonlyArray<string>
}

/**
 * Starts the command with stderr joined to stdout. A watcher in the same process group kills the group when our end of the pipe on stdin
 * closes, also by our death: a build whose starter was killed must not go on writing.
 */
const watchedScript = 'exec 3<&0 </dev/null 2>&1; (read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 & exec 3<&-; exec "$@"'

const tailLength = 40

/** Runs a tool that takes minutes and reports each line of stdout and stderr. Interruption ends the tool and its children. */
export const run = (
  argv: readonly [string, ...ReadonlyArray<string>],
  options: {
    readonly onLine: (line: string) => Effect.Effect<void>
    readonly cwd?: string
    readonly env?: Readonly<Record<string, string>>
  }
): Effect.Effect<Ended, PlatformErrors.PlatformError, CommandExecutor.CommandExecutor> =>
  Effect.scoped(
    Effect.gen(function* () {
      const command = Command.make("sh", "-c", watchedScript, "sh", ...argv).pipe(
        Command.env({ PATH: searchPath(), ...options.env })
      )
      const child = yield* start(options.cwd === undefined ? command : Command.workingDirectory(command, options.cwd))

      const tail: Array<string> = []
      yield* child.stdout.pipe(
        Stream.decodeText(),
        Stream.splitLines,
        Stream.runForEach((line) => {
          tail.push(line)
          if (tail.length > tailLength) tail.shift()
          return options.onLine(line)
        })
      )
      return { code: yield* child.exitCode, tail }
    })
  )
