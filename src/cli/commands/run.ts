import { Args, Command, Options } from "@effect/cli"
import { Effect, Option, Stream } from "effect"
import type { RunningCommand } from "../../Agent.ts"
import { defaultImage } from "../../domain/BootOptions.ts"
import { ExecError, ParseError } from "../../domain/errors.ts"
import { Machinen } from "../../Machinen.ts"
import { baseNames } from "../../RootfsImage.ts"
import { ExitWith } from "../exit.ts"
import { bootOptions, durationMs, toBootOptions } from "../options.ts"
import * as signals from "../signals.ts"
import * as stdio from "../stdio.ts"
import * as terminal from "../terminal.ts"

/**
 * Shows a guest command as if it ran here: its output on our channels as it comes, our signals to it, its exit code as ours. Nobody
 * reading our stdout any more ends it, as a broken pipe would.
 */
export const relay = (running: RunningCommand) =>
  Effect.gen(function* () {
    yield* signals.intercept((signal) => Effect.runFork(running.signal(signals.signalNumber(signal))))
    yield* Stream.runForEach(running.output, ({ bytes, channel }) => stdio.write(channel)(bytes)).pipe(
      Effect.catchIf(
        (e) => !(e instanceof ExecError),
        () => new ExitWith({ code: 141 }) // 128 + SIGPIPE
      )
    )
    const { code } = yield* running.exit
    return code
  })

/** Ends a command that runs for longer than it may, in milliseconds. */
export const withinLimit = <A, E, R>(running: Effect.Effect<A, E, R>, limit: Option.Option<number>) =>
  Option.match(limit, {
    onNone: (): Effect.Effect<A, E | ExecError, R> => running,
    onSome: (ms) =>
      Effect.timeoutFail(running, {
        duration: ms,
        onTimeout: () =>
          new ExecError({
            code: "EXEC_AGENT_TIMEOUT",
            message: `the command was still running after ${ms / 1000} s and was killed`,
            hint: "raise --timeout"
          })
      })
  })

/** docker's convention for a command that could not be started. */
export const startFailure = (error: ExecError): number =>
  error.code === "EXEC_COMMAND_NOT_FOUND" ? 127 : error.code === "EXEC_NOT_EXECUTABLE" ? 126 : 125

export const commandArgs = Args.text({ name: "command" }).pipe(
  Args.repeated,
  Args.withDescription("the command and its arguments, after --")
)

/**
 * The guest's command line: what stands before `--` and what follows it. The option parser takes an option it does not know for an
 * argument; before `--` it is a mistake.
 */
export const guestCommand = Effect.fnUntraced(function* (head: ReadonlyArray<string>, tail: ReadonlyArray<string>) {
  const flag = head.find((part) => part.startsWith("-"))
  if (flag !== undefined) {
    return yield* new ParseError({
      code: "PARSE_FLAG_UNKNOWN",
      message: `there is no option ${flag}`,
      hint: "`--help` shows the options; an option of the guest's command goes after `--`"
    })
  }
  return [...head, ...tail]
})

/** `machinen run -- COMMAND`: a VM for one command, gone when it ends. */
export const run = (tail: ReadonlyArray<string>) =>
  Command.make(
    "run",
    {
      ...bootOptions,
      tty: Options.boolean("tty").pipe(
        Options.withAlias("t"),
        Options.withDescription("run it in a terminal, which ours becomes")
      ),
      timeout: Options.text("timeout").pipe(
        Options.optional,
        Options.withDescription("end the command after this long (30s, 5m)")
      ),
      command: commandArgs
    },
    (input) =>
      Effect.gen(function* () {
        const command = yield* guestCommand(input.command, tail)
        if (input.tty) yield* terminal.required
        const nothing = new ParseError({
          code: "PARSE_ARGUMENT_MISSING",
          message: "no command to run",
          hint: "machinen run --image debian -- python3 -c 'print(6 * 7)'"
        })
        // an image may have one of its own; the bases of set-up have none
        const bare = (baseNames as ReadonlyArray<string>).includes(Option.getOrElse(input.image, () => defaultImage))
        if (command.length === 0 && bare) return yield* nothing
        const options = yield* toBootOptions(input, command)
        const limit = yield* Effect.transposeMapOption(input.timeout, (value) => durationMs("timeout", value))
        const machinen = yield* Machinen
        const { command: effective, vm } = yield* machinen.boot(options)
        if (effective === undefined) return yield* nothing
        if (input.tty) {
          const spec = { argv: effective, env: terminal.environment() }
          const running = terminal.relay(vm.terminal(spec, terminal.size()), { detachKeys: false })
          const code = yield* withinLimit(running, limit)
          yield* vm.stop()
          return yield* new ExitWith({ code: code === "detached" ? 129 : code })
        }
        const main = Effect.flatMap(vm.startMain(yield* stdio.stdin), relay)
        const code = yield* withinLimit(main, limit)
        // its end is the VM's: what is left is gone before we are
        yield* vm.wait
        return yield* new ExitWith({ code })
      }).pipe(Effect.scoped)
  ).pipe(Command.withDescription("run a command in a new VM and remove it afterwards"))
