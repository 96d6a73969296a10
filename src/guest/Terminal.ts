import { Effect, Schema, type Scope, Stream } from "effect"
import { ExecError } from "../errors.ts"
import { ExitStatus } from "../machine/MachineSpec.ts"
import { given } from "../platform/given.ts"
import { type AgentRequest, encodeFrame, type Frame, FrameType, TerminalSession } from "./AgentProtocol.ts"
import { checkCommand } from "./commandCheck.ts"

/** The command of a terminal: a line that the guest's `sh -c` runs, or an `argv`; without either a login shell. */
export type TerminalCommand =
  | string
  | {
      readonly argv?: ReadonlyArray<string>
      /** Variables over the VM's. `TERM` names the kind of terminal; default `xterm`. */
      readonly env?: Readonly<Record<string, string>>
      /** Absolute path. Default: the VM's working directory. */
      readonly cwd?: string
      /** `user[:group]`, names or numbers in the guest. Default: the VM's user. */
      readonly user?: string
      /** Names of secrets of the guest that the command gets as variables. */
      readonly secrets?: ReadonlyArray<string>
    }

/** The size of a terminal in cells. */
export interface TerminalSize {
  /** Columns and rows are from 1 to 65535 each. */
  readonly columns: number
  readonly rows: number
}

/** Options of a terminal. */
export interface TerminalOptions extends TerminalSize {
  /**
   * Name of a session: the command outlives its client. 1 to 64 letters, digits, `_`, `.`, `-`, unique in the guest. An existing session is joined:
   * the command is ignored, and `output` begins with what the session's screen shows. One client at a time (EXEC_SESSION_IN_USE). The screen of a
   * session has at most 512 × 256 cells.
   */
  readonly session?: string
  /** True: takes the session from the client that is attached. Default false. */
  readonly steal?: boolean
}

/** A terminal in the guest that runs a command. Closing its scope hangs the command up, unless the command is in a session. */
export interface Terminal {
  readonly pid: number
  /** The terminal's output. A reader that stalls stops the command's writes. May be run once. */
  readonly output: Stream.Stream<Uint8Array, ExecError>
  /** Types bytes. Completes when the guest takes more. */
  readonly write: (bytes: Uint8Array) => Effect.Effect<void, ExecError>
  /** Resizes the terminal, which its programs learn by SIGWINCH. Does nothing when the size is the same. */
  readonly resize: (size: TerminalSize) => Effect.Effect<void, ExecError>
  /** How the command ended. Completes once `output` has been read to its end. */
  readonly exit: Effect.Effect<ExitStatus, ExecError>
}

export interface TerminalClient {
  readonly terminal: (
    command: TerminalCommand,
    options: TerminalOptions
  ) => Effect.Effect<Terminal, ExecError, Scope.Scope>
  /** Terminal sessions, oldest first. */
  readonly sessions: Effect.Effect<ReadonlyArray<TerminalSession>, ExecError>
  /** Hangs a session up, and completes when its processes are gone. Fails with EXEC_SESSION_NOT_FOUND. */
  readonly killSession: (name: string) => Effect.Effect<void, ExecError>
}

/** The part of the agent's operations that terminals need. */
interface Wire {
  readonly open: (request: AgentRequest) => Effect.Effect<
    {
      readonly pid: number
      readonly frames: Stream.Stream<Frame, ExecError>
      readonly result: Effect.Effect<unknown, ExecError>
      readonly send: (bytes: Uint8Array) => Effect.Effect<void, unknown>
      readonly sendInput: (bytes: Uint8Array) => Effect.Effect<void, unknown>
    },
    ExecError,
    Scope.Scope
  >
  readonly ask: (request: AgentRequest) => Effect.Effect<unknown, ExecError>
}

export const make = (wire: Wire): TerminalClient => ({
  terminal: Effect.fn("Agent.terminal")(function* (command, { columns, rows, session, steal = false }) {
    const { argv = [], env = {}, ...rest } = typeof command === "string" ? { argv: ["sh", "-c", command] } : command
    const bad =
      checkSize({ columns, rows }) ??
      (session === undefined ? undefined : checkSession(session)) ??
      checkCommand({ argv, env, ...rest })
    if (bad !== undefined) return yield* bad
    const { frames, pid, result, send, sendInput } = yield* wire.open({
      op: "pty",
      argv,
      env,
      columns,
      rows,
      steal,
      ...rest,
      ...given({ session })
    })
    let last: TerminalSize = { columns, rows }
    const terminal: Terminal = {
      pid,
      output: Stream.map(
        Stream.filter(frames, ({ type }) => type === FrameType.stdout),
        ({ payload }) => payload
      ),
      write: (bytes) => Effect.mapError(sendInput(bytes), gone),
      resize: (size) =>
        Effect.suspend(() => {
          const bad = checkSize(size)
          if (bad !== undefined) return bad
          if (size.columns === last.columns && size.rows === last.rows) return Effect.void
          last = size
          return Effect.mapError(send(encodeFrame(FrameType.resize, sizePayload(size))), gone)
        }),
      exit: Effect.flatMap(result, decodeWith(ExitStatus))
    }
    return terminal
  }),
  sessions: Effect.map(
    Effect.flatMap(wire.ask({ op: "sessions" }), decodeWith(SessionList)),
    ({ sessions }) => sessions
  ),
  killSession: Effect.fn("Agent.killSession")(function* (name) {
    const bad = checkSession(name)
    if (bad !== undefined) return yield* bad
    yield* wire.ask({ op: "session-kill", session: name })
  })
})

const SessionList = Schema.Struct({ sessions: Schema.Array(TerminalSession) })

const decodeWith =
  <A, I>(schema: Schema.Schema<A, I>) =>
  (json: unknown) =>
    Effect.mapError(
      Schema.decodeUnknown(schema)(json),
      (cause) =>
        new ExecError({
          code: "EXEC_PROTOCOL",
          message: "the agent sent something else than the protocol says",
          cause
        })
    )

const gone = (cause: unknown) =>
  new ExecError({ code: "EXEC_AGENT_UNAVAILABLE", message: "the guest has closed the terminal", cause })

const sizePayload = ({ columns, rows }: TerminalSize) => {
  const payload = Buffer.alloc(4)
  payload.writeUInt16BE(columns, 0)
  payload.writeUInt16BE(rows, 2)
  return payload
}

export const checkSize = ({ columns, rows }: TerminalSize): ExecError | undefined =>
  [columns, rows].every((n) => Number.isInteger(n) && n >= 1 && n <= 65_535)
    ? undefined
    : new ExecError({
        code: "EXEC_TERMINAL_SIZE_INVALID",
        message: `a terminal cannot have ${columns} columns and ${rows} rows`,
        hint: "give whole numbers from 1 to 65535"
      })

const checkSession = (name: string): ExecError | undefined =>
  /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$/.test(name)
    ? undefined
    : new ExecError({
        code: "EXEC_SESSION_INVALID",
        message: `${JSON.stringify(name)} cannot be a session's name`,
        hint: "1 to 64 letters, digits, `_`, `.` and `-`, not beginning with `.` or `-`"
      })
