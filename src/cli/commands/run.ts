import { Args, Command, Options } from "@effect/cli"
import { Effect, Option, Stream } from "effect"
import { ExecError, ParseError } from "../../errors.ts"
import type { RunningCommand } from "../../guest/Exec.ts"
import { baseNames } from "../../image/RootfsImage.ts"
import { Machinen } from "../../Machinen.ts"
import { defaultImage } from "../../machine/BootOptions.ts"
import { ExitWith, exitWithTerminal, tellOutOfMemory } from "../exit.ts"
import { bootOptions, durationMs, toBootOptions } from "../options.ts"
import * as signals from "../signals.ts"
import * as stdio from "../stdio.ts"
import * as terminal from "../terminal.ts"

/**
 * Shows a guest command as if it ran on the host: copies its output as it arrives, passes signals on, and returns its exit code.
 */
export const relay = (running: RunningCommand) =>
  Effect.gen(function* () {
    yield* signals.relay((signal) => Effect.runFork(running.signal(signals.signalNumber(signal))))
    yield* Stream.runForEach(running.output, ({ bytes, channel }) => stdio.write(channel)(bytes))
    const status = yield* running.exit
    yield* tellOutOfMemory(status)
    return status.code
  }).pipe(Effect.scoped)

/** `--timeout` in milliseconds. 0 means no limit, as in timeout(1). */
export const timeLimit = (timeout: Option.Option<string>) =>
  Effect.map(
    Effect.transposeMapOption(timeout, (value) => durationMs("timeout", value)),
    Option.filter((ms) => ms > 0)
  )

/** Ends a command at its time limit, with EXEC_AGENT_TIMEOUT. */
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

const exitCodes: Readonly<Partial<Record<ExecError["code"], number>>> = {
  EXEC_AGENT_TIMEOUT: 124,
  EXEC_NOT_EXECUTABLE: 126,
  EXEC_COMMAND_NOT_FOUND: 127,
  EXEC_VM_ENDED: 137
}

/**
 * The exit code of an ExecError: docker's convention for a command that could not be started, and timeout(1)'s for one that ran too long. A
 * command whose VM was ended counts as killed (128 + SIGKILL); one whose VM failed is a failure of the CLI (125).
 */
export const startFailure = ({ code }: ExecError): number => exitCodes[code] ?? 125

export const commandArgs = Args.text({ name: "command" }).pipe(
  Args.repeated,
  Args.withDescription("the command and its arguments, after --")
)

/** `machinen run -- COMMAND`: runs one command in a VM of its own, which ends with the command. */
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
        const command = [...input.command, ...tail]
        if (input.tty) yield* terminal.required
        const nothing = new ParseError({
          code: "PARSE_ARGUMENT_MISSING",
          message: "no command to run",
          hint: "machinen run --image debian -- python3 -c 'print(6 * 7)'"
        })
        // an image may have a command of its own; the bases have none
        const bare = (baseNames as ReadonlyArray<string>).includes(Option.getOrElse(input.image, () => defaultImage))
        if (command.length === 0 && bare) return yield* nothing
        const options = yield* toBootOptions(input, command)
        const limit = yield* timeLimit(input.timeout)
        const machinen = yield* Machinen
        const { command: effective, vm } = yield* machinen.boot(options)
        if (effective === undefined) return yield* nothing
        // At the time limit the VM is killed, because a busy guest would use its whole grace too. If it writes to files of the host, it may finish.
        const writesToHost = Option.isSome(input.rootDisk) || input.mountLive.length > 0
        const inTime = <A, E, R>(running: Effect.Effect<A, E, R>) =>
          withinLimit(running, limit).pipe(
            Effect.tapError((error) =>
              error instanceof ExecError && error.code === "EXEC_AGENT_TIMEOUT" && !writesToHost ? vm.kill : Effect.void
            )
          )
        if (input.tty) {
          const spec = { argv: effective, env: terminal.environment() }
          const running = terminal.relay(vm.terminal(spec, terminal.size()), { detachKeys: false })
          const code = yield* inTime(running)
          yield* vm.stop()
          return yield* exitWithTerminal(code)
        }
        const main = Effect.flatMap(vm.startMain(yield* stdio.stdin), relay)
        const code = yield* inTime(main)
        // the VM ends with the command: wait until nothing of it is left
        yield* vm.wait
        return yield* new ExitWith({ code })
      }).pipe(Effect.scoped)
  ).pipe(Command.withDescription("run a command in a new VM and remove it afterwards"))
