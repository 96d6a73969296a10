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

export interface CommandSpec {
  readonly argv: readonly [string, ...ReadonlyArray<string>]
  readonly env?: Readonly<Record<string, string>>
  /** Absolute; the VM's own working directory when left out. */
  readonly cwd?: string
  /** `user[:group]`, names or numbers of the guest's; the VM's own user when left out. */
  readonly user?: string
  /** Names of secrets the guest has been given, to be variables of this command. */
  readonly secrets?: ReadonlyArray<string>
  /** What the command reads; nothing (end of file at once) when left out. */
  readonly stdin?: Stream.Stream<Uint8Array>
}

/** A command, or a line for the guest's `sh -c`. */
export type Commandlike = CommandSpec | string

export interface CommandOutput {
  readonly channel: "stdout" | "stderr"
  readonly bytes: Uint8Array
}

/** A command running in the guest. Closing its scope before its end kills its process group. */
export interface RunningCommand {
  readonly pid: number
  /** Both channels in the order they were sent. Not reading it stops the command's writes; it may be run once. */
  readonly output: Stream.Stream<CommandOutput, ExecError>
  /**
   * How the command ended. Completes once `output` has been read to its end. While nobody reads that, this does: 1 MiB is kept for a reader that comes
   * later, the rest is dropped, and such a reader fails EXEC_OUTPUT_TOO_LARGE behind what was kept.
   */
  readonly exit: Effect.Effect<ExitStatus, ExecError>
  /** Sends a signal (by number) to the command's process group. */
  readonly signal: (signal: number) => Effect.Effect<void>
}

/** The command a VM exists for. */
export interface MainCommand extends RunningCommand {
  /** It goes on when its scope closes, without input; what it prints from now on goes to the shim's log. */
  readonly detach: Effect.Effect<void, ExecError>
}

export interface ExecResult {
  readonly exitCode: number
  readonly signal: number | null
  readonly oomKilled: boolean
  readonly stdout: Uint8Array
  readonly stderr: Uint8Array
}

export interface ExecOptions {
  readonly timeout?: Duration.DurationInput
  /** Is given each piece as it comes; the command's writes wait for it. */
  readonly onOutput?: (piece: CommandOutput) => Effect.Effect<void>
  /** The channels whose output the result holds; the field of any other is empty. Default: both. */
  readonly keep?: ReadonlyArray<CommandOutput["channel"]>
  /** Most that the result holds; a command that prints more is killed, and fails EXEC_OUTPUT_TOO_LARGE. Default 256 MiB. */
  readonly maxOutputBytes?: number
  /**
   * How long to wait for the guest to take the command, and after which pause to try again when it cannot be reached. A VM that is gone, and
   * a command that has started, are not tried again. Without it, a guest that is held (paused, being captured) is waited for.
   */
  readonly connect?: { readonly timeout: Duration.DurationInput; readonly pause: Duration.DurationInput }
}

/** Commands in a guest. */
export interface Exec {
  readonly start: (command: Commandlike) => Effect.Effect<RunningCommand, ExecError, Scope.Scope>
  /** Runs a command to its end and keeps all it printed. `timeout` kills it and fails EXEC_AGENT_TIMEOUT. */
  readonly execRaw: (command: Commandlike, options?: ExecOptions) => Effect.Effect<ExecResult, ExecError>
  /** The same, but an exit code other than 0 fails EXEC_NONZERO_EXIT, with the end of what it wrote to stderr. */
  readonly exec: (command: Commandlike, options?: ExecOptions) => Effect.Effect<ExecResult, ExecError>
  /** Starts the VM's main command, with all secrets the guest has by then; the VM powers off when it ends. */
  readonly startMain: (stdin?: Stream.Stream<Uint8Array>) => Effect.Effect<MainCommand, ExecError, Scope.Scope>
  /** The same, with its output left to the shim's log. */
  readonly startMainDetached: Effect.Effect<void, ExecError>
}

interface Running extends RunningCommand {
  /** The next piece of its output. */
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
              // copied: a piece may be a view of a larger buffer that would be kept alive
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

/** How much of a command's output a result holds unless its caller says otherwise, in bytes. */
const defaultMaxOutput = 256 * 1024 * 1024

const outputTooLarge = (command: Commandlike, bytes: number) =>
  new ExecError({
    code: "EXEC_OUTPUT_TOO_LARGE",
    message: `the command printed more than ${bytes} bytes and was killed: ${shown(command)}`,
    hint: "read its output as it comes (`vm.start`), keep less of it (`keep`), or allow more (`maxOutputBytes`)"
  })

const toCommand = (command: Commandlike): CommandSpec =>
  typeof command === "string" ? { argv: ["sh", "-c", command] } : command

/** A command as an error names it. */
const shown = (command: Commandlike): string =>
  (typeof command === "string" ? command : command.argv.join(" ")).slice(0, 200)

/** How much of a failed command's stderr goes into its error, in bytes. */
const stderrTail = 64 * 1024

const decodeExit = Schema.decodeUnknown(ExitStatus)

const toOutput = (frame: Frame): Option.Option<CommandOutput> =>
  frame.type === FrameType.stdout
    ? Option.some({ channel: "stdout", bytes: frame.payload })
    : frame.type === FrameType.stderr
      ? Option.some({ channel: "stderr", bytes: frame.payload })
      : Option.none()
