import type { Readable, Writable } from "node:stream"
import { Deferred, Effect, Queue, Stream } from "effect"
import { ExecError } from "../errors.ts"
import { checkSize, type TerminalSize } from "../guest/Terminal.ts"
import type { Vm } from "../vm/Vm.ts"

/** Options of `execPty`. */
export interface VsockExecPtyOptions {
  readonly cols: number
  readonly rows: number
  /** The keyboard: read at once, until the session ends. The caller sets raw mode. */
  readonly stdin: Readable
  /** Gets the terminal's output; the command waits for it. */
  readonly stdout: Writable
  /** Milliseconds in which the guest must accept the command; there is one attempt. Default 5000. */
  readonly connectTimeoutMs?: number
}

/** A session whose streams are connected. Running `result` starts the command. */
export interface PtySession {
  readonly result: Effect.Effect<{ readonly exitCode: number }, ExecError>
  /** @throws ExecError (EXEC_TERMINAL_SIZE_INVALID) */
  readonly resize: (cols: number, rows: number) => void
  readonly cancel: () => void
  /** Disconnects the streams. */
  readonly release: () => void
}

/** Chunks of input that may wait for the guest; beyond that the input stream is held back. */
const maxWaitingChunks = 16

export const openSession = (vm: () => Vm, cmd: string, options: VsockExecPtyOptions): PtySession => {
  const { cols, connectTimeoutMs = 5000, rows, stdin, stdout } = options
  const keys = Effect.runSync(Queue.unbounded<Uint8Array>())
  const sizes = Effect.runSync(Queue.sliding<TerminalSize>(1))
  const cancelled = Effect.runSync(Deferred.make<never, ExecError>())

  const wasFlowing = stdin.readableFlowing === true
  let waiting = 0
  const listen = (chunk: Buffer | string) => {
    waiting += 1
    if (waiting >= maxWaitingChunks) stdin.pause()
    keys.unsafeOffer(typeof chunk === "string" ? Buffer.from(chunk) : chunk)
  }
  const chunkSent = Effect.sync(() => {
    waiting -= 1
    if (waiting === 0) stdin.resume()
  })
  stdin.on("data", listen)

  const show = (bytes: Uint8Array) =>
    Effect.async<void, ExecError>((resume) => {
      stdout.write(bytes, (cause) => resume(cause == null ? Effect.void : outputUnwritable(cause)))
    })
  const env = { TERM: process.env["TERM"] || "xterm" }
  const result = Effect.gen(function* () {
    const opened = vm().terminal({ argv: ["sh", "-c", cmd], env }, { columns: cols, rows })
    const terminal = yield* Effect.timeoutFail(opened, { duration: connectTimeoutMs, onTimeout: startTimedOut })
    yield* Stream.fromQueue(keys).pipe(
      Stream.runForEach((bytes) => Effect.zipLeft(terminal.write(bytes), chunkSent)),
      // the output says why the terminal takes no more
      Effect.ignore,
      Effect.forkScoped
    )
    yield* Effect.forkScoped(Effect.ignore(Stream.runForEach(Stream.fromQueue(sizes), terminal.resize)))
    yield* Stream.runForEach(terminal.output, show)
    const { code } = yield* terminal.exit
    return { exitCode: code }
  }).pipe(Effect.scoped, Effect.raceFirst(Deferred.await(cancelled)))

  return {
    result,
    resize: (columns, rows) => {
      const bad = checkSize({ columns, rows })
      if (bad !== undefined) throw bad
      sizes.unsafeOffer({ columns, rows })
    },
    cancel: () => Deferred.unsafeDone(cancelled, sessionCancelled),
    release: () => {
      stdin.off("data", listen)
      // later input does not belong to this session
      if (!wasFlowing) stdin.pause()
    }
  }
}

const sessionCancelled = new ExecError({ code: "EXEC_CANCELLED", message: "the session was cancelled and is hung up" })

const startTimedOut = () =>
  new ExecError({
    code: "EXEC_AGENT_UNAVAILABLE",
    message: "the guest did not take the command in time",
    hint: "is the VM paused, or being captured?"
  })

const outputUnwritable = (cause: unknown) =>
  new ExecError({ code: "EXEC_FAILED", message: "what the terminal shows cannot be written to its stream", cause })
