import { Command, CommandExecutor, Error as PlatformErrors } from "@effect/platform"
import { Effect, Layer, Sink, Stream } from "effect"

export interface FakeAnswer {
  readonly code?: number
  readonly stdout?: string
  readonly stderr?: string
}

/** Answers every command from a function of its arguments; `undefined` is a program that is not there. */
export const fakeCommands = (
  answer: (argv: ReadonlyArray<string>, cwd: string | undefined) => FakeAnswer | undefined | Effect.Effect<FakeAnswer>
) =>
  Layer.succeed(
    CommandExecutor.CommandExecutor,
    CommandExecutor.makeExecutor((command) =>
      Effect.gen(function* () {
        const [first] = Command.flatten(command)
        const argv = untether([first.command, ...first.args])
        const given = answer(argv, first.cwd._tag === "Some" ? first.cwd.value : undefined)
        if (given === undefined) {
          return yield* new PlatformErrors.SystemError({
            reason: "NotFound",
            module: "Command",
            method: "spawn",
            description: `${argv[0]} is not there`
          })
        }
        const { code = 0, stdout = "", stderr = "" } = Effect.isEffect(given) ? yield* given : given
        return {
          [CommandExecutor.ProcessTypeId]: CommandExecutor.ProcessTypeId,
          pid: CommandExecutor.ProcessId(1),
          exitCode: Effect.succeed(CommandExecutor.ExitCode(code)),
          isRunning: Effect.succeed(false),
          kill: () => Effect.void,
          stdin: Sink.drain,
          stdout: Stream.make(new TextEncoder().encode(stdout)),
          stderr: Stream.make(new TextEncoder().encode(stderr)),
          toJSON: () => ({}),
          toString: () => argv.join(" "),
          [Symbol.for("nodejs.util.inspect.custom")]: () => ({})
        } as unknown as CommandExecutor.Process
      })
    )
  )

/** A long command is started through a small shell script that has it as its arguments (src/platform/streamCommand.ts). */
const untether = (argv: ReadonlyArray<string>) => (argv[0] === "sh" && argv[1] === "-c" ? argv.slice(4) : argv)
