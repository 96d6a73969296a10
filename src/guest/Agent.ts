import { randomBytes } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import {
  Context,
  Deferred,
  Duration,
  Effect,
  Layer,
  Option,
  ParseResult,
  Schedule,
  Schema,
  type Scope,
  Stream
} from "effect"
import { ExecError, FilesError } from "../errors.ts"
import { Assets } from "../host/Assets.ts"
import { ExitStatus } from "../machine/MachineSpec.ts"
import { type ExitRecord, hasFailed, howEnded } from "../machine/ShimPlan.ts"
import { boundedLines } from "../platform/boundedLines.ts"
import { Tail } from "../platform/Tail.ts"
import * as tar from "../platform/tar.ts"
import type { Connection } from "../platform/UnixSocket.ts"
import {
  AgentFault,
  AgentRequest,
  AgentStarted,
  encodeFrame,
  FileStat,
  type Frame,
  FrameDecoder,
  FrameType,
  GuestStats,
  inputPiece,
  inputWindow,
  pieces,
  Rejuvenation
} from "./AgentProtocol.ts"
import { checkCommand } from "./commandCheck.ts"
import * as FileTree from "./FileTree.ts"
import type { GuestConfig } from "./Initramfs.ts"
import * as SecretStore from "./SecretStore.ts"
import * as Terminal from "./Terminal.ts"
import * as Tunnel from "./Tunnel.ts"
import { Vsock, VsockUnreachable } from "./Vsock.ts"

/** The guest port the agent serves operations on. */
export const agentPort = 1978
/** The host port the agent calls when it can serve. */
export const doorbellPort = 1979

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

export interface WriteFileOptions {
  /** Permission bits; a new file's default is 0644. */
  readonly mode?: number
  /** Create missing parent directories. Default true. */
  readonly recursive?: boolean
  readonly append?: boolean
}

export interface FileRange {
  /** Default 0. */
  readonly offset?: number
  /** Default: to the end. */
  readonly length?: number
}

export interface CopyOptions {
  /** Patterns of fnmatch, for the path below a directory or for any name. */
  readonly excludes?: ReadonlyArray<string>
  /** A source that is a symbolic link stands for what it leads to (default); with `false` the link itself is copied. */
  readonly follow?: boolean
}

export interface PullOptions extends CopyOptions {
  /** Most that the guest may send, in bytes: contents without holes, and at least 512 for each file. FILES_TOO_LARGE beyond it. Default: no bound. */
  readonly maxBytes?: number
}

/** What is a restored guest's own. */
export interface Identity {
  readonly hostname: string
  /** A UUID; no other machine that was restored from the same snapshot has it. */
  readonly generation: string
  /** Of its network card, if it has one. */
  readonly mac?: string
  /** Over the environment the original was booted with. */
  readonly env: Readonly<Record<string, string>>
  /** In place of everything the original was configured with: it has run nothing, and begins here. */
  readonly config?: GuestConfig["config"]
}

/** What the agent in one guest can do. */
export interface AgentClient
  extends Terminal.TerminalClient,
    Tunnel.Tunnels,
    SecretStore.SecretStore,
    FileTree.FileTree {
  readonly start: (command: Commandlike) => Effect.Effect<RunningCommand, ExecError, Scope.Scope>
  /** Runs a command to its end and keeps all it printed. `timeout` kills it and fails EXEC_AGENT_TIMEOUT. */
  readonly execRaw: (command: Commandlike, options?: ExecOptions) => Effect.Effect<ExecResult, ExecError>
  /** The same, but an exit code other than 0 fails EXEC_NONZERO_EXIT, with the end of what it wrote to stderr. */
  readonly exec: (command: Commandlike, options?: ExecOptions) => Effect.Effect<ExecResult, ExecError>
  /** Starts the VM's main command, with all secrets the guest has by then; the VM powers off when it ends. */
  readonly startMain: (stdin?: Stream.Stream<Uint8Array>) => Effect.Effect<MainCommand, ExecError, Scope.Scope>
  /** The same, with its output left to the shim's log. */
  readonly startMainDetached: Effect.Effect<void, ExecError>
  readonly writeFile: (
    path: string,
    contents: Stream.Stream<Uint8Array> | Uint8Array | string,
    options?: WriteFileOptions
  ) => Effect.Effect<void, FilesError>
  /** The file, or `length` bytes of it from `offset` on. Not reading it stops the guest's reads. */
  readonly readFile: (path: string, range?: FileRange) => Stream.Stream<Uint8Array, FilesError>
  /**
   * Copies the contents of a host directory into a guest directory, made if missing; a host file to that guest path, or to where a link there leads. A
   * file gets its name when all of it has come, and what had the name stays until then; of a directory that fails half-way, the files that came whole stay.
   */
  readonly push: (hostPath: string, guestPath: string, options?: CopyOptions) => Effect.Effect<void, FilesError>
  /** The other way round. */
  readonly pull: (guestPath: string, hostPath: string, options?: PullOptions) => Effect.Effect<void, FilesError>
  /**
   * The root filesystem as a tar stream that another machine can start from: owners, modes, extended attributes, links and devices; not what is
   * mounted in it. No entry is younger than `newest`, in seconds since 1970.
   */
  readonly image: (options?: { readonly newest?: number }) => Stream.Stream<Uint8Array, FilesError>
  /** With `follow` of what a symbolic link leads to, else of the link itself. */
  readonly stat: (path: string, options?: { readonly follow?: boolean }) => Effect.Effect<FileStat, FilesError>
  /**
   * Freezes the guest's commands until the scope closes; with `sync` its filesystems are written out first. Operations asked for meanwhile
   * wait.
   */
  readonly freeze: (options: {
    readonly sync: boolean
    /** Fail EXEC_MOUNT_BUSY otherwise when a process holds files on a shared directory: a copy's host does not know them. */
    readonly lazyUmount: boolean
    readonly timeout: Duration.DurationInput
  }) => Effect.Effect<void, ExecError, Scope.Scope>
  /**
   * Writes the guest's processes to its disk and keeps both still until the scope closes; returns for how many milliseconds they have stood
   * still by then. `timeout` is the guest's: what it has begun it ends before it says so.
   */
  readonly dump: (options: {
    readonly tcpClose: boolean
    readonly timeout: Duration.DurationInput
  }) => Effect.Effect<number, ExecError, Scope.Scope>
  /** Brings such processes back in a guest that was booted from a copy of that disk, once it is one of its own. */
  readonly revive: (identity: Identity, options: { readonly lazy: boolean }) => Effect.Effect<Rejuvenation, ExecError>
  /** Makes a restored guest one of its own, and only then lets its commands go on. */
  readonly rejuvenate: (identity: Identity) => Effect.Effect<Rejuvenation, ExecError>
  /** Sets the guest's wall clock to the host's: it has stood still for as long as the machine did. Answered while commands are frozen, too. */
  readonly setClock: Effect.Effect<void, ExecError>
  readonly stats: Effect.Effect<GuestStats, ExecError>
}

/**
 * Runs commands in guests and moves files, over the private channel. It knows a VM by its vsock socket only; whether that VM should be
 * running is somebody else's question.
 */
export class Agent extends Context.Tag("machinen/Agent")<
  Agent,
  {
    /** `exited`: the end of the VM, which explains that of a connection. */
    readonly client: (vsockPath: string, exited?: Effect.Effect<ExitRecord, unknown>) => AgentClient
    /** Waits for the guest's doorbell and answers it with the time: returns once listening, the inner effect is the wait. */
    readonly doorbell: (vsockPath: string) => Effect.Effect<Effect.Effect<void, ExecError>, ExecError, Scope.Scope>
  }
>() {
  static readonly layer = Layer.effect(
    Agent,
    Effect.gen(function* () {
      const vsock = yield* Vsock
      const fs = yield* FileSystem.FileSystem
      const { shim } = yield* Assets

      const doorbell = Effect.fn("Agent.doorbell")(function* (vsockPath: string) {
        const accept = yield* Effect.mapError(vsock.listen(vsockPath, doorbellPort), unavailable)
        return Effect.gen(function* () {
          const connection = yield* Effect.mapError(accept, unavailable)
          const line = yield* connection.bytes.pipe(
            boundedLines(maxHello, () => new Error("a line without an end")),
            Stream.runHead,
            Effect.mapError(unavailable)
          )
          if (Option.isNone(line)) return yield* protocolError("the guest hung up at the doorbell")
          const { version } = yield* Effect.mapError(decodeHello(line.value), () =>
            protocolError(`the guest rang with ${JSON.stringify(line.value.slice(0, 200))}`)
          )
          if (version !== 1) {
            return yield* new ExecError({
              code: "EXEC_PROTOCOL",
              message: `the guest agent speaks protocol ${version}, this host speaks 1`,
              hint: "run `machinen install`: kernel and guest binary must come from the same release"
            })
          }
          // Not waited for: what is asked of the guest next comes after it on the same channel.
          yield* Effect.ignore(connection.write(Buffer.from(`${JSON.stringify({ nowMs: Date.now() })}\n`)))
          yield* connection.end
        }).pipe(Effect.scoped)
      })

      return Agent.of({
        doorbell,
        client: (vsockPath, exited = Effect.never) => makeClient(vsock, fs, shim, vsockPath, exited)
      })
    })
  )
}

/** Longest line at the doorbell, in characters. */
const maxHello = 4096

const encodeRequest = (request: AgentRequest) => JSON.stringify(Schema.encodeSync(AgentRequest)(request))

const decodeHello = Schema.decode(Schema.parseJson(Schema.Struct({ version: Schema.Int })))

/** One operation: the request is sent and accepted; frames follow. */
export interface Operation {
  readonly started: typeof AgentStarted.Type
  /** The next frame after `started`; `None` at `end`, whose JSON goes to `result`. */
  readonly frame: Effect.Effect<Frame, Option.Option<ExecError | AgentRefusal>>
  /** All of them. */
  readonly frames: Stream.Stream<Frame, ExecError | AgentRefusal>
  readonly result: Effect.Effect<unknown, ExecError | AgentRefusal>
  /** The result, or the failure, is known. */
  readonly isOver: Effect.Effect<boolean>
  readonly send: Connection["write"]
  /** Sends input to a command, as far ahead of it as the guest gives credit. Nothing else ever waits behind input. */
  readonly sendInput: Connection["write"]
}

interface Running extends RunningCommand {
  /** The next piece of its output. */
  readonly piece: Effect.Effect<CommandOutput, Option.Option<ExecError>>
}

/** The agent answered with an error frame. */
export class AgentRefusal extends Schema.TaggedError<AgentRefusal>()("AgentRefusal", { fault: AgentFault }) {
  override get message(): string {
    return this.fault.message
  }
}

const makeClient = (
  vsock: Vsock["Type"],
  fs: FileSystem.FileSystem,
  shim: Assets["Type"]["shim"],
  vsockPath: string,
  exited: Effect.Effect<ExitRecord, unknown>
): AgentClient => {
  /** A request that is a function is made when the guest is there to hear it: what it says of the time is not late by a machine's start. */
  const operate = Effect.fnUntraced(function* (request: AgentRequest | (() => AgentRequest)) {
    const encode = (request: AgentRequest) => encodeFrame(FrameType.request, Buffer.from(encodeRequest(request)))
    if (typeof request !== "function") {
      return yield* begun(yield* Effect.mapError(vsock.dial(vsockPath, agentPort, encode(request)), unavailable))
    }
    const connection = yield* Effect.mapError(vsock.dial(vsockPath, agentPort), unavailable)
    yield* Effect.mapError(connection.write(encode(request())), unavailable)
    return yield* begun(connection)
  })

  /** An operation that has been asked for on this connection. */
  const begun = Effect.fnUntraced(function* (connection: Pick<Connection, "end" | "read" | "write">) {
    const next = frameReader(connection.read, exited)
    const first = yield* next
    const alreadyEnded = first.type === FrameType.end
    if (!alreadyEnded && first.type !== FrameType.started) {
      return yield* protocolError(`the agent began with a frame of type ${first.type}`)
    }
    const result = yield* Deferred.make<unknown, ExecError | AgentRefusal>()
    const credit = yield* Effect.makeSemaphore(inputWindow)
    // no generator goes round here: a guest that sends nothing but credit would make each wait for the next
    const step = (frame: Frame): Operation["frame"] =>
      frame.type === FrameType.credit
        ? Effect.zipRight(
            credit.release(Buffer.from(frame.payload).readUInt32BE()),
            Effect.suspend(() => stepped)
          )
        : taken(frame)
    const taken: (frame: Frame) => Operation["frame"] = Effect.fnUntraced(function* (frame) {
      if (frame.type !== FrameType.end) return frame
      yield* Deferred.complete(result, parseJson(frame.payload))
      // the guest waits for our end before it lets the machine go, and the shim for both
      yield* connection.end
      return yield* Effect.fail(Option.none())
    })
    const stepped: Operation["frame"] = alreadyEnded
      ? step(first)
      : Effect.flatMap(Effect.mapError(next, Option.some), step)
    const frame = stepped.pipe(
      Effect.tapError(Option.match({ onNone: () => Effect.void, onSome: (error) => Deferred.fail(result, error) }))
    )
    const operation: Operation = {
      started: alreadyEnded ? {} : yield* decodeStarted(first.payload),
      frame,
      frames: Stream.repeatEffectOption(frame),
      result: Deferred.await(result),
      isOver: Deferred.isDone(result),
      send: connection.write,
      sendInput: (bytes) =>
        Effect.forEach(
          pieces(bytes, inputPiece),
          (piece) => Effect.zipRight(credit.take(piece.length), connection.write(encodeFrame(FrameType.data, piece))),
          { discard: true }
        )
    }
    return operation
  })

  /** For operations whose only answer is their result. */
  const ask = (request: AgentRequest | (() => AgentRequest)) =>
    Effect.scoped(
      Effect.gen(function* () {
        const { frame, result } = yield* operate(request)
        yield* forEachOf(frame, () => Effect.void)
        return yield* result
      })
    )

  /** Asks what tells the guest the time, which is late there by as long as it was under way: the answer's delay bounds that. */
  const tell = Effect.fnUntraced(function* (request: () => AgentRequest) {
    let sentMs = 0
    const json = yield* ask(() => {
      sentMs = Date.now()
      return request()
    })
    return { json, lateMs: Date.now() - sentMs }
  })

  const tellTime = tell(() => ({ op: "clock", nowMs: Date.now() }))

  /** Sends bytes as data frames, then eof. A peer that is gone ends it quietly: the other half tells why. */
  const sendAll = <E>(
    send: Connection["write"],
    bytes: Stream.Stream<Uint8Array, E>,
    sendData: Connection["write"] = (piece) => send(encodeFrame(FrameType.data, piece))
  ) =>
    bytes.pipe(
      Stream.mapConcat((bytes) => pieces(bytes)),
      Stream.runForEachWhile((piece) => Effect.isSuccess(sendData(piece))),
      Effect.zipRight(Effect.ignore(send(encodeFrame(FrameType.eof, new Uint8Array(0)))))
    )

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
        ...(cwd === undefined ? {} : { cwd }),
        ...(user === undefined ? {} : { user }),
        ...(secrets === undefined ? {} : { secrets })
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

  /** For operations that keep the guest still from their first answer on; the stream is the scope's: whatever ends it lets go. */
  const held = Effect.fnUntraced(function* (request: AgentRequest) {
    const { frame, send, started } = yield* Effect.mapError(operate(request), toExecError)
    yield* Effect.addFinalizer(() =>
      send(encodeFrame(FrameType.eof, new Uint8Array(0))).pipe(
        Effect.zipRight(forEachOf(frame, () => Effect.void)),
        Effect.interruptible,
        Effect.timeout("2 seconds"),
        Effect.ignore
      )
    )
    return started
  })

  /** A tree between host and guest: a child has the connection, and its data do not pass through here. */
  const copy = (
    request: AgentRequest,
    guestPath: string,
    hostPath: string,
    start: (connection: Connection, request: string) => Effect.Effect<tar.Courier, Error, Scope.Scope>
  ) =>
    Effect.scoped(
      Effect.gen(function* () {
        const connection = yield* Effect.mapError(vsock.dial(vsockPath, agentPort), toFilesError(guestPath))
        const { answers, succeeded } = yield* Effect.mapError(
          start(connection, encodeRequest(request)),
          hostIo(hostPath)
        )
        const answered = yield* Effect.exit(
          Effect.gen(function* () {
            const { frame, result } = yield* begun({ read: answers, write: connection.write, end: Effect.void })
            yield* forEachOf(frame, () => Effect.void)
            yield* result
          })
        )
        // what went wrong at this end first: the guest's answer is missing then
        yield* Effect.mapError(succeeded, (cause) =>
          cause instanceof tar.PulledTooMuch
            ? new FilesError({
                code: "FILES_TOO_LARGE",
                message: `${guestPath} is larger than allowed: ${cause.message}`,
                hint: "allow more (`maxBytes`), or leave something out (`excludes`)",
                cause
              })
            : hostIo(hostPath)(cause)
        )
        yield* Effect.mapError(answered, toFilesError(guestPath))
      })
    )

  const receive = (request: AgentRequest, guestPath: string) =>
    Stream.unwrapScoped(Effect.map(operate(request), ({ frames }) => Stream.filterMap(frames, toData))).pipe(
      Stream.mapError(toFilesError(guestPath))
    )

  const stat = Effect.fn("Agent.stat")(function* (
    path: string,
    { follow = false }: { readonly follow?: boolean } = {}
  ) {
    const json = yield* Effect.mapError(ask({ op: "stat", path, follow }), toFilesError(path))
    return yield* Effect.mapError(decodeStat(json), toFilesError(path))
  })

  return {
    ...Terminal.make({
      open: (request) =>
        Effect.map(Effect.mapError(operate(request), toExecError), ({ frames, result, send, sendInput, started }) => ({
          pid: started.pid ?? 0,
          frames: Stream.mapError(frames, toExecError),
          result: Effect.mapError(result, toExecError),
          send,
          sendInput
        })),
      ask: (request) => Effect.mapError(ask(request), toExecError)
    }),
    ...Tunnel.make(operate),
    ...SecretStore.make(ask),
    ...FileTree.make(operate, ask, toFilesError),
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
    startMainDetached: ask({ op: "main", stdin: false, detach: true }).pipe(
      Effect.mapError(toExecError),
      Effect.asVoid
    ),
    writeFile: Effect.fn("Agent.writeFile")(
      function* (path, contents, options = {}) {
        const { mode } = options
        const { frame, result, send } = yield* operate({
          op: "write",
          path,
          append: options.append ?? false,
          recursive: options.recursive ?? true,
          ...(mode === undefined ? {} : { mode })
        })
        const receiving = forEachOf(frame, () => Effect.void)
        yield* Effect.all([sendAll(send, toStream(contents)), receiving], { concurrency: 2, discard: true })
        yield* result
      },
      (effect, path) => Effect.mapError(Effect.scoped(effect), toFilesError(path))
    ),
    readFile: (path, range = {}) =>
      Stream.unwrap(Effect.as(checkRange(range), receive({ op: "read", path, ...range }, path))),
    image: (options) => receive({ op: "image", ...options }, "/"),
    push: Effect.fn("Agent.push")(function* (hostPath, guestPath, { excludes = [], follow = true } = {}) {
      const isLink = !follow && Option.isSome(yield* Effect.option(fs.readLink(hostPath)))
      const info = isLink ? undefined : yield* Effect.mapError(fs.stat(hostPath), nothingToPush(hostPath))
      const file = info?.type !== "Directory"
      const archiver = yield* Effect.mapError(shim, hostIo(hostPath))
      const pushed = { path: hostPath, name: path.posix.basename(guestPath), follow, excludes }
      yield* copy({ op: "push", path: guestPath, file }, guestPath, hostPath, (connection, request) =>
        tar.push(archiver, connection, request, pushed)
      )
    }),
    pull: Effect.fn("Agent.pull")(function* (guestPath, hostPath, { excludes = [], follow = true, maxBytes } = {}) {
      const kind = (yield* stat(guestPath, { follow })).kind === "directory" ? "directory" : "file"
      const archiver = yield* Effect.mapError(shim, hostIo(hostPath))
      const pulled = { kind, path: hostPath, ...(maxBytes === undefined ? {} : { maxBytes }) } as const
      const request = { op: "pull", path: guestPath, follow, excludes } as const
      yield* copy(request, guestPath, hostPath, (connection, request) =>
        tar.pull(archiver, connection, request, pulled)
      )
    }),
    stat,
    freeze: Effect.fn("Agent.freeze")(function* ({ lazyUmount, sync, timeout }) {
      yield* held({ op: "freeze", sync, lazyUmount, timeoutMs: Duration.toMillis(timeout) })
    }),
    dump: Effect.fn("Agent.dump")(function* ({ tcpClose, timeout }) {
      const { frozenMs = 0 } = yield* held({ op: "dump", tcpClose, timeoutMs: Duration.toMillis(timeout) })
      return frozenMs
    }),
    rejuvenate: Effect.fn("Agent.rejuvenate")(function* (identity) {
      const { json, lateMs } = yield* tell(() => ({ op: "rejuvenate", ...renewed(identity) }))
      // on a host so busy that the copy's clock may be far behind, it is told again, which takes less
      if (lateMs > maxLateMs) {
        yield* Effect.repeat(tellTime, { until: ({ lateMs }) => lateMs <= maxLateMs, times: 2 })
      }
      return yield* decodeRejuvenation(json)
    }, Effect.mapError(toAnswerError)),
    revive: Effect.fn("Agent.revive")(
      (identity, { lazy }) =>
        Effect.flatMap(
          ask(() => ({ op: "revive", lazy, ...renewed(identity) })),
          decodeRejuvenation
        ),
      Effect.mapError(toAnswerError)
    ),
    setClock: Effect.asVoid(Effect.mapError(tellTime, toAnswerError)),
    stats: ask({ op: "stats" }).pipe(Effect.flatMap(decodeStats), Effect.mapError(toAnswerError))
  }
}

const toAnswerError = (error: ExecError | AgentRefusal | ParseResult.ParseError) =>
  error._tag === "ParseError" ? protocolError("unreadable answer", error) : toExecError(error)

/** More than a copy's first answer takes on a host that has time for it (about 45 ms, TCG). */
const maxLateMs = 80

/** What must not be the same twice, made at the last moment. */
const renewed = ({ config, env, generation, hostname, mac }: Identity) => ({
  seed: randomBytes(32).toString("hex"),
  nowMs: Date.now(),
  hostname,
  machineId: randomBytes(16).toString("hex"),
  generation,
  ...(mac === undefined ? {} : { mac }),
  env,
  ...(config === undefined ? {} : { config })
})

/** How long after a connection the VM's own end may be seen: the shim clears up in between. */
const endsWithin = "5 seconds"

/** Reads one frame at a time; an error frame, a violation and an end before the last frame fail, that with the VM's end where that is the reason. */
const frameReader = (read: Connection["read"], exited: Effect.Effect<ExitRecord, unknown>) => {
  const decoder = new FrameDecoder()
  const pending: Array<Frame> = []
  const explained = (broken: ExecError) =>
    Effect.disconnect(exited).pipe(
      Effect.timeout(endsWithin),
      Effect.matchEffect({ onFailure: () => broken, onSuccess: (exit) => vmEnded(exit) })
    )
  const more = read.pipe(
    Effect.catchAll(
      Option.match({
        onNone: () => explained(protocolError("the connection to the guest ended in the middle", new StreamEnded())),
        onSome: (cause) => explained(lostConnection(cause))
      })
    ),
    Effect.flatMap((piece) =>
      Effect.try({
        try: () => void pending.push(...decoder.push(piece)),
        catch: (cause) => protocolError("the agent's answer cannot be read", cause)
      })
    )
  )
  const next: Effect.Effect<Frame, ExecError | AgentRefusal> = Effect.suspend(() => {
    const frame = pending.shift()
    if (frame === undefined) return Effect.zipRight(more, next)
    return frame.type === FrameType.error
      ? Effect.flatMap(decodeFault(frame.payload), (fault) => new AgentRefusal({ fault }))
      : Effect.succeed(frame)
  })
  return next
}

/** Asks for one after the other until there is none. A stream would say the same and costs 0.4 ms to set up, in an operation that takes 2. */
const forEachOf = <A, E, R>(next: Effect.Effect<A, Option.Option<E>>, use: (a: A) => Effect.Effect<unknown, E, R>) =>
  next.pipe(
    Effect.flatMap((a) => Effect.mapError(use(a), Option.some)),
    Effect.forever,
    Effect.catchAll(Option.match({ onNone: () => Effect.void, onSome: Effect.fail }))
  )

/** How much of a command's output is kept for a reader that comes after `exit` was asked for, in bytes. */
const maxUnread = 1024 * 1024
/** How much of a command's output a result holds unless its caller says otherwise, in bytes. */
const defaultMaxOutput = 256 * 1024 * 1024

const outputTooLarge = (command: Commandlike, bytes: number) =>
  new ExecError({
    code: "EXEC_OUTPUT_TOO_LARGE",
    message: `the command printed more than ${bytes} bytes and was killed: ${shown(command)}`,
    hint: "read its output as it comes (`vm.start`), keep less of it (`keep`), or allow more (`maxOutputBytes`)"
  })

/**
 * Output that somebody may read. `drained` reads it for as long as nobody else does, so that its end comes; a reader that begins later gets first what
 * was kept, and one that leaves lets `drained` go on. `over`: the end has come, or there will be none.
 */
const drainable = Effect.fnUntraced(function* (
  next: Running["piece"],
  over: Effect.Effect<boolean>,
  ended: Effect.Effect<unknown, ExecError>
) {
  const turns = yield* Effect.makeSemaphore(1)
  const unread = yield* Effect.makeLatch(true)
  const kept: Array<CommandOutput> = []
  let [isRead, isDraining, isCut, bytes] = [false, false, false, 0]
  const dropped = new ExecError({
    code: "EXEC_OUTPUT_TOO_LARGE",
    message: `nobody read the command's output while its end was awaited, and only ${maxUnread} bytes of it were kept`,
    hint: "begin to read `output` before `exit` is awaited"
  })
  const keep = (piece: CommandOutput) => {
    isCut = isCut || bytes + piece.bytes.length > maxUnread
    if (isCut) return
    bytes += piece.bytes.length
    kept.push({ ...piece, bytes: Buffer.from(piece.bytes) })
  }
  const afterKept: Running["piece"] = Effect.suspend(() => {
    const first = kept.shift()
    if (first !== undefined) return Effect.succeed(first)
    if (isCut) return Effect.fail(Option.some(dropped))
    const end = Effect.zipRight(Effect.mapError(ended, Option.some), Effect.fail(Option.none()))
    return Effect.if(over, { onTrue: () => end, onFalse: () => next })
  })
  const piece: Running["piece"] = Effect.suspend(() => {
    isRead = true
    return isDraining ? turns.withPermits(1)(afterKept) : next
  })
  const turn = turns.withPermits(1)(
    Effect.if(over, {
      onTrue: () => Effect.fail(Option.none()),
      onFalse: () => (isRead ? Effect.void : Effect.map(next, keep))
    })
  )
  const drained = Effect.suspend(() => {
    isDraining = true
    // why there is no more is the result's to tell
    return Effect.ignore(Effect.forever(unread.whenOpen(turn)))
  }).pipe(Effect.unlessEffect(over))
  const output = Stream.unwrap(Effect.as(unread.close, Stream.repeatEffectOption(piece))).pipe(
    Stream.ensuring(
      Effect.zipRight(
        Effect.sync(() => {
          isRead = false
        }),
        unread.open
      )
    )
  )
  return { drained, output, piece }
})

const checkRange = (range: FileRange): Effect.Effect<void, FilesError> =>
  Object.values(range).every((n) => Number.isSafeInteger(n) && n >= 0)
    ? Effect.void
    : new FilesError({
        code: "FILES_RANGE_INVALID",
        message: `${JSON.stringify(range)} is not a part of a file`,
        hint: "offset and length are whole numbers of bytes"
      })

const toStream = (contents: Stream.Stream<Uint8Array> | Uint8Array | string): Stream.Stream<Uint8Array> =>
  typeof contents === "string"
    ? Stream.make(Buffer.from(contents))
    : contents instanceof Uint8Array
      ? Stream.make(contents)
      : contents

const toCommand = (command: Commandlike): CommandSpec =>
  typeof command === "string" ? { argv: ["sh", "-c", command] } : command

/** A command as an error names it. */
const shown = (command: Commandlike): string =>
  (typeof command === "string" ? command : command.argv.join(" ")).slice(0, 200)

/** How much of a failed command's stderr goes into its error, in bytes. */
const stderrTail = 64 * 1024

const parseJson = (payload: Uint8Array): Effect.Effect<unknown, ExecError> =>
  Effect.try({
    try: () => JSON.parse(Buffer.from(payload).toString()),
    catch: (cause) => protocolError("the agent sent broken JSON", cause)
  })

const decodeWith =
  <A, I>(schema: Schema.Schema<A, I>) =>
  (payload: Uint8Array) =>
    Effect.flatMap(parseJson(payload), (json) =>
      Effect.mapError(Schema.decodeUnknown(schema)(json), (cause) =>
        protocolError("the agent sent something else than the protocol says", cause)
      )
    )
const decodeFault = decodeWith(AgentFault)
const decodeStarted = decodeWith(AgentStarted)
const decodeExit = Schema.decodeUnknown(ExitStatus)
const decodeStat = Schema.decodeUnknown(FileStat)
const decodeRejuvenation = Schema.decodeUnknown(Rejuvenation)
const decodeStats = Schema.decodeUnknown(GuestStats)

const toOutput = (frame: Frame): Option.Option<CommandOutput> =>
  frame.type === FrameType.stdout
    ? Option.some({ channel: "stdout", bytes: frame.payload })
    : frame.type === FrameType.stderr
      ? Option.some({ channel: "stderr", bytes: frame.payload })
      : Option.none()

const toData = (frame: Frame): Option.Option<Uint8Array> =>
  frame.type === FrameType.data ? Option.some(frame.payload) : Option.none()

const unavailable = (cause: unknown) =>
  new ExecError({
    code: "EXEC_AGENT_UNAVAILABLE",
    message: "the guest agent cannot be reached",
    hint: "the VM may have ended: `machinen ls` shows what is running",
    cause
  })

/** Not a VM whose socket is gone, and it with it. */
const mayBeReachedLater = ({ cause, code }: ExecError): boolean =>
  code === "EXEC_AGENT_UNAVAILABLE" &&
  !(
    cause instanceof VsockUnreachable &&
    cause.cause instanceof Error &&
    "code" in cause.cause &&
    cause.cause.code === "ENOENT"
  )

const lostConnection = (cause: unknown) =>
  new ExecError({ code: "EXEC_AGENT_UNAVAILABLE", message: "the connection to the guest broke", cause })

const vmEnded = (exit: ExitRecord) =>
  new ExecError({
    code: hasFailed(exit) ? "EXEC_VM_FAILED" : "EXEC_VM_ENDED",
    message: `${howEnded(exit)} while the command was running`,
    hint: "`machinen ls` shows what is running"
  })

/** The guest, or its shim, has gone: nobody broke the protocol. */
class StreamEnded extends Error {}

const protocolError = (message: string, cause?: unknown) => new ExecError({ code: "EXEC_PROTOCOL", message, cause })

const executableHint = (errno: string | undefined) => {
  switch (errno) {
    case "ENOEXEC":
      return "a shell script begins with `#!/bin/sh`; a program has to be made for this processor"
    case "ENOENT":
      return "install what runs it, or mend its first line"
    default:
      return "check its mode, and those of the directories above it"
  }
}

const toExecError = (error: ExecError | AgentRefusal): ExecError => {
  if (error._tag === "ExecError") return error
  const { code, errno, message } = error.fault
  const cause = errno === undefined ? undefined : new Error(errno)
  switch (code) {
    case "AGENT_NOT_FOUND":
      return new ExecError({
        code: "EXEC_COMMAND_NOT_FOUND",
        message,
        hint: "is it installed in the image, and on its PATH?",
        cause
      })
    case "AGENT_NOT_EXECUTABLE":
      return new ExecError({ code: "EXEC_NOT_EXECUTABLE", message, hint: executableHint(errno), cause })
    case "AGENT_CWD_INVALID":
      return new ExecError({
        code: "EXEC_CWD_INVALID",
        message,
        hint:
          errno === "EACCES"
            ? "let the command's user into the directory, or name another"
            : "create the directory first",
        cause
      })
    case "AGENT_TIMEOUT":
      return new ExecError({ code: "EXEC_AGENT_TIMEOUT", message, cause })
    case "AGENT_MOUNT_BUSY":
      return new ExecError({ code: "EXEC_MOUNT_BUSY", message, cause })
    case "AGENT_ARGUMENTS_TOO_LARGE":
      return new ExecError({
        code: "EXEC_ARGUMENTS_TOO_LARGE",
        message,
        hint: "pass large data on stdin or in a file",
        cause
      })
    case "AGENT_SECRET_UNKNOWN":
      return new ExecError({
        code: "EXEC_SECRET_UNKNOWN",
        message,
        hint: "give it to the VM first; a copy has none of its source's",
        cause
      })
    case "AGENT_SESSION_NOT_FOUND":
      return new ExecError({
        code: "EXEC_SESSION_NOT_FOUND",
        message,
        hint: "`machinen sessions VM` lists those there are",
        cause
      })
    case "AGENT_SESSION_IN_USE":
      return new ExecError({
        code: "EXEC_SESSION_IN_USE",
        message,
        hint: "detach there, or take it with `steal` (`--steal`)",
        cause
      })
    case "AGENT_BAD_REQUEST":
      return new ExecError({ code: "EXEC_ARGUMENT_INVALID", message, cause })
    default:
      return new ExecError({ code: "EXEC_FAILED", message, cause })
  }
}

const toFilesError =
  (guestPath: string) =>
  (error: unknown): FilesError => {
    if (error instanceof FilesError) return error
    if (error instanceof AgentRefusal) {
      const { code, errno, message } = error.fault
      const cause = errno === undefined ? undefined : new Error(errno)
      switch (code) {
        case "AGENT_NOT_FOUND":
          return new FilesError({ code: "FILES_NOT_FOUND", message, cause })
        case "AGENT_NO_SPACE":
          return new FilesError({
            code: "FILES_NO_SPACE",
            message,
            hint: "boot with a larger root disk (`--disk`, rootDiskSizeBytes)",
            cause
          })
        case "AGENT_WATCH_LIMIT":
          return new FilesError({
            code: "FILES_WATCH_LIMIT",
            message,
            hint: "raise that limit in the guest (sysctl), or watch less",
            cause
          })
        case "AGENT_BAD_REQUEST":
          return new FilesError({ code: "FILES_PATH_INVALID", message, cause })
        default:
          return new FilesError({ code: "FILES_GUEST_IO", message, cause })
      }
    }
    const isViolation =
      error instanceof ExecError && error.code === "EXEC_PROTOCOL" && !(error.cause instanceof StreamEnded)
    if (isViolation || error instanceof ParseResult.ParseError) {
      return new FilesError({
        code: "FILES_PROTOCOL",
        message: `the guest agent's answer about ${guestPath} is not what the protocol says: ${error.message}`,
        hint: "run `machinen install`: kernel and guest binary must come from the same release",
        cause: error
      })
    }
    return new FilesError({
      code: "FILES_AGENT_UNAVAILABLE",
      message: `the guest agent cannot be reached for ${guestPath}`,
      hint: "the VM may have ended: `machinen ls` shows what is running",
      cause: error
    })
  }

const nothingToPush = (hostPath: string) => (cause: unknown) =>
  new FilesError({
    code: "FILES_HOST_DIR_NOT_FOUND",
    message: `there is no file or directory ${hostPath} on the host`,
    cause
  })

const hostIo = (hostPath: string) => (cause: unknown) =>
  cause instanceof FilesError
    ? cause
    : new FilesError({
        code: "FILES_HOST_IO",
        message: `${hostPath} cannot be read or written: ${cause instanceof Error ? cause.message : String(cause)}`,
        cause
      })
