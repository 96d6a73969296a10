import { type Duration, Effect, Option, Schedule, Schema, type Scope, type Stream } from "effect"
import { ExecError } from "../errors.ts"
import { ExitStatus } from "../machine/MachineSpec.ts"
import { given } from "../platform/given.ts"
import { Tail } from "../platform/Tail.ts"
import { type AgentRequest, encodeFrame, type Frame, FrameType } from "./AgentProtocol.ts"
import { mayBeReachedLater, protocolError, toExecError } from "./agentErrors.ts"
import { checkCommand } from "./commandCheck.ts"
import { drainable } from "./drainable.ts"
import { forEachOf, type Operations, sendAll } from "./operation.ts"

/** A command for a guest: a program with its arguments. */
export interface CommandSpec {
  readonly argv: readonly [string, ...ReadonlyArray<string>]
  readonly env?: Readonly<Record<string, string>>
  /** Absolute path. Default: the VM's working directory. */
  readonly cwd?: string
  /** `user[:group]`, names or numbers in the guest. Default: the VM's user. */
  readonly user?: string
  /** Names of secrets of the guest that the command gets as variables. Unknown: EXEC_SECRET_UNKNOWN. */
  readonly secrets?: ReadonlyArray<string>
  /** The command's input. Default: none, the command reads end of file at once. */
  readonly stdin?: Stream.Stream<Uint8Array>
}

/** A command, or a line that the guest's `sh -c` runs. */
export type Commandlike = CommandSpec | string

/** A piece of a command's output. */
export interface CommandOutput {
  readonly channel: "stdout" | "stderr"
  readonly bytes: Uint8Array
}

/** A command running in the guest. Closing its scope before its end kills its process group. */
export interface RunningCommand {
  readonly pid: number
  /** stdout and stderr in the order in which they were sent. A reader that stalls stops the command's writes. May be run once. */
  readonly output: Stream.Stream<CommandOutput, ExecError>
  /**
   * How the command ended. Completes once `output` has been read to its end. While nobody reads `output`, `exit` reads it: 1 MiB is kept for a
   * later reader and the rest is dropped. A later reader then fails with EXEC_OUTPUT_TOO_LARGE after the bytes that were kept.
   */
  readonly exit: Effect.Effect<ExitStatus, ExecError>
  /** Sends a signal (by number) to the command's process group. */
  readonly signal: (signal: number) => Effect.Effect<void>
}

/** The main command of a VM: the VM powers off when it ends. */
export interface MainCommand extends RunningCommand {
  /** Lets the command go on when its scope closes, without input. From now on its output goes to the shim's log. */
  readonly detach: Effect.Effect<void, ExecError>
}

/** How a command ended, and its output. */
export interface ExecResult {
  /** 128 + `signal` when a signal ended the command. */
  readonly exitCode: number
  readonly signal: number | null
  /** The command got SIGKILL, and the guest kernel killed a process for want of memory while it ran. */
  readonly oomKilled: boolean
  readonly stdout: Uint8Array
  readonly stderr: Uint8Array
}

/** Options of `exec` and `execRaw`. */
export interface ExecOptions {
  /** Time limit of the command. Default: none. */
  readonly timeout?: Duration.DurationInput
  /** Called with each piece of output. The command's writes wait for it. */
  readonly onOutput?: (piece: CommandOutput) => Effect.Effect<void>
  /** The channels whose output is kept in the result; the field of the other one is empty. Default: both. */
  readonly keep?: ReadonlyArray<CommandOutput["channel"]>
  /** Most bytes kept in the result. A command that prints more is killed, and this fails with EXEC_OUTPUT_TOO_LARGE. Default 256 MiB. */
  readonly maxOutputBytes?: number
  /**
   * How long to wait until the guest has started the command, and the pause between attempts while the guest cannot be reached. A VM that has
   * ended, and a command that has started, are not tried again. Default: one attempt, which waits for a guest that is paused or being captured.
   */
  readonly connect?: { readonly timeout: Duration.DurationInput; readonly pause: Duration.DurationInput }
}

/** Commands in a guest. */
export interface Exec {
  /** Starts a command. Closing the scope before its end kills its process group. */
  readonly start: (command: Commandlike) => Effect.Effect<RunningCommand, ExecError, Scope.Scope>
  /**
   * Runs a command to its end and keeps its output. After `timeout` the command is killed, and this fails with EXEC_AGENT_TIMEOUT. An
   * interruption kills the command.
   */
  readonly execRaw: (command: Commandlike, options?: ExecOptions) => Effect.Effect<ExecResult, ExecError>
  /** As `execRaw`, but an exit code other than 0 fails with EXEC_NONZERO_EXIT and the end of the command's stderr. */
  readonly exec: (command: Commandlike, options?: ExecOptions) => Effect.Effect<ExecResult, ExecError>
  /** Starts the VM's main command, with all secrets that the guest has by then. The VM powers off when the command ends. */
  readonly startMain: (stdin?: Stream.Stream<Uint8Array>) => Effect.Effect<MainCommand, ExecError, Scope.Scope>
  /** As `startMain`, but detached from the start: without input, its output goes to the shim's log. */
  readonly startMainDetached: Effect.Effect<void, ExecError>
}

interface Running extends RunningCommand {
  /** The next piece of output; `None` at its end. */
  readonly piece: Effect.Effect<CommandOutput, Option.Option<ExecError>>
}

export const make = ({ ask, operate }: Operations): Exec => {
  const run = Effect.fnUntraced(function* (
    request: Extract<AgentRequest, { op: "exec" | "main" }>,
    stdin: Stream.Stream<Uint8Array> | undefined
  ) {
    const operation = yield* operate(request).pipe(Effect.mapError(toExecError))
    if (stdin !== undefined) {
      yield* Effect.forkScoped(sendAll(operation.send, stdin, operation.sendInput))
    }
    const next: Running["piece"] = Effect.flatMap(Effect.mapError(operation.frame, Option.map(toExecError)), (frame) =>
      Option.getOrElse(Option.map(toOutput(frame), Effect.succeed), () => next)
    )
    const ended = Effect.mapError(operation.result, toExecError)
    const { drained, output, piece } = yield* drainable(next, operation.isOver, ended)
    const running: Running = {
      pid: operation.started.pid ?? 0,
      piece,
      output,
      exit: Effect.zipRight(drained, ended).pipe(
        Effect.flatMap((json) =>
          Effect.mapError(decodeExit(json), (cause) => protocolError("unreadable exit status", cause))
        )
      ),
      signal: (signal) => Effect.ignore(operation.send(encodeFrame(FrameType.signal, Uint8Array.of(signal))))
    }
    return running
  })

  const start = Effect.fn("Agent.start")(function* (commandlike: Commandlike) {
    const command = toCommand(commandlike)
    const bad = checkCommand(command)
    if (bad !== undefined) return yield* bad
    const { argv, cwd, env, secrets, stdin, user } = command
    return yield* run(
      {
        op: "exec",
        argv: [...argv],
        env: { ...env },
        stdin: stdin !== undefined,
        ...given({ cwd, user, secrets })
      },
      stdin
    )
  })

  const startWithin = (command: Commandlike, connect: ExecOptions["connect"]) =>
    connect === undefined
      ? start(command)
      : start(command).pipe(
          Effect.retry({ while: mayBeReachedLater, schedule: Schedule.spaced(connect.pause) }),
          Effect.timeoutFail({
            duration: connect.timeout,
            onTimeout: () =>
              new ExecError({
                code: "EXEC_AGENT_UNAVAILABLE",
                message: `the guest did not take the command in time: ${shown(command)}`,
                hint: "is the VM paused, or being captured?"
              })
          })
        )

  const collect = (
    command: Commandlike,
    { connect, keep = ["stdout", "stderr"], maxOutputBytes = defaultMaxOutput, onOutput }: ExecOptions
  ) =>
    Effect.scoped(
      Effect.gen(function* () {
        const running = yield* startWithin(command, connect)
        const parts: { stdout: Array<Uint8Array>; stderr: Array<Uint8Array> } = { stdout: [], stderr: [] }
        const said = new Tail(stderrTail)
        let kept = 0
        yield* forEachOf(running.piece, (piece) =>
          Effect.suspend(() => {
            const { bytes, channel } = piece
            if (keep.includes(channel)) {
              kept += bytes.length
              if (kept > maxOutputBytes) return Effect.fail(outputTooLarge(command, maxOutputBytes))
              // copied, because a piece may be a view of a larger buffer, which would be kept alive
              parts[channel].push(Buffer.from(bytes))
            }
            if (channel === "stderr") said.push(bytes)
            return onOutput === undefined ? Effect.void : onOutput(piece)
          })
        )
        const exit = yield* running.exit
        const result: ExecResult = {
          exitCode: exit.code,
          signal: exit.signal,
          oomKilled: exit.oomKilled,
          stdout: Buffer.concat(parts.stdout),
          stderr: Buffer.concat(parts.stderr)
        }
        return { result, said }
      })
    )

  const collectWithin = (command: Commandlike, options: ExecOptions = {}) =>
    options.timeout === undefined
      ? collect(command, options)
      : collect(command, options).pipe(
          Effect.timeoutFail({
            duration: options.timeout,
            onTimeout: () =>
              new ExecError({
                code: "EXEC_AGENT_TIMEOUT",
                message: `the command was still running at its time limit and was killed: ${shown(command)}`,
                hint: "give it more time, or none at all"
              })
          })
        )

  return {
    start,
    execRaw: Effect.fn("Agent.execRaw")(function* (command, options) {
      return (yield* collectWithin(command, options)).result
    }),
    exec: Effect.fn("Agent.exec")(function* (command, options) {
      const { result, said } = yield* collectWithin(command, options)
      if (result.exitCode === 0) return result
      const ended = result.signal === null ? `code ${result.exitCode}` : `signal ${result.signal}`
      const stderr = said.toString().trim()
      return yield* new ExecError({
        code: "EXEC_NONZERO_EXIT",
        message: `${shown(command)} ended with ${ended}${stderr === "" ? "" : `: ${stderr}`}`,
        exitCode: result.exitCode,
        ...(result.oomKilled ? { hint: "the guest ran out of memory: boot it with more" } : {})
      })
    }),
    startMain: Effect.fn("Agent.startMain")(function* (stdin) {
      const running = yield* run({ op: "main", stdin: stdin !== undefined, detach: false }, stdin)
      const detach = Effect.mapError(ask({ op: "detach" }), toExecError)
      const main: MainCommand = { ...running, detach }
      return main
    }),
    startMainDetached: ask({ op: "main", stdin: false, detach: true }).pipe(Effect.mapError(toExecError), Effect.asVoid)
  }
}

/** Default of `maxOutputBytes`. */
const defaultMaxOutput = 256 * 1024 * 1024

const outputTooLarge = (command: Commandlike, bytes: number) =>
  new ExecError({
    code: "EXEC_OUTPUT_TOO_LARGE",
    message: `the command printed more than ${bytes} bytes and was killed: ${shown(command)}`,
    hint: "read its output as it comes (`vm.start`), keep less of it (`keep`), or allow more (`maxOutputBytes`)"
  })

const toCommand = (command: Commandlike): CommandSpec =>
  typeof command === "string" ? { argv: ["sh", "-c", command] } : command

/** A command as error messages name it. */
const shown = (command: Commandlike): string =>
  (typeof command === "string" ? command : command.argv.join(" ")).slice(0, 200)

/** Bytes of a failed command's stderr that its error holds. */
const stderrTail = 64 * 1024

const decodeExit = Schema.decodeUnknown(ExitStatus)

const toOutput = (frame: Frame): Option.Option<CommandOutput> =>
  frame.type === FrameType.stdout
    ? Option.some({ channel: "stdout", bytes: frame.payload })
    : frame.type === FrameType.stderr
      ? Option.some({ channel: "stderr", bytes: frame.payload })
      : Option.none()
