import * as os from "node:os"
import { format } from "node:util"
import * as NodeStream from "@effect/platform-node/NodeStream"
import { Cause, type Console, Data, Effect, Option, type Scope, Stream } from "effect"

/**
 * The program's stdin. Reading stops when the scope closes, so that an idle terminal does not keep the program alive, and not before: Node can
 * leave raw mode only while the stream is open.
 */
export const stdin: Effect.Effect<Stream.Stream<Uint8Array>, never, Scope.Scope> = Effect.acquireRelease(
  Effect.sync(() => process.stdin),
  (input) => Effect.sync(() => void input.destroy())
).pipe(
  // not by the stream's async iterator, which cannot be interrupted while it waits for input
  Effect.map((input) =>
    NodeStream.fromReadable<unknown, Uint8Array>(
      () => input,
      (error) => error,
      { closeOnDone: false }
    )
  ),
  Effect.map(Stream.orElse(() => Stream.empty))
)

type Channel = "stdout" | "stderr"

/** Output cannot be written: the reader has gone (EPIPE), the disk is full, or the terminal is gone. */
export class OutputError extends Data.TaggedError("OutputError")<{
  readonly channel: Channel
  readonly cause: NodeJS.ErrnoException
}> {
  override get message(): string {
    const { code = "", errno, message } = this.cause
    const reason = errno === undefined ? message : (reasons.get(errno) ?? message)
    return `${this.channel} cannot be written to: ${reason}${code === "" ? "" : ` (${code})`}`
  }
  /** The reader of a pipe has gone, like `| head`: there is nothing to report. */
  get readerHasLeft(): boolean {
    return ["EPIPE", "ECONNRESET", "ERR_STREAM_DESTROYED"].includes(this.cause.code ?? "")
  }
}

const reasons = new Map<number, string>([
  [-os.constants.errno.ENOSPC, "no space left on its device"],
  [-os.constants.errno.EIO, "its terminal or device is gone"],
  [-os.constants.errno.EFBIG, "the file would become too large"],
  [-os.constants.errno.EDQUOT, "the disk quota is exceeded"]
])

// The writer gets the error of a failed write; without a listener the same error would also end the process.
for (const channel of ["stdout", "stderr"] as const) process[channel].on("error", () => {})

/** Writes with the backpressure of the pipe or terminal behind it. */
export const tryWrite =
  (channel: Channel) =>
  (bytes: Uint8Array | string): Effect.Effect<void, OutputError> =>
    Effect.async((resume) => {
      process[channel].write(bytes, (cause) =>
        resume(cause == null ? Effect.void : new OutputError({ channel, cause }))
      )
    })

/** As `tryWrite`, for verbs that are pointless without output: a failed write ends the program, through its scopes. */
export const write =
  (channel: Channel) =>
  (bytes: Uint8Array | string): Effect.Effect<void> =>
    Effect.orDie(tryWrite(channel)(bytes))

/** The failed write that ended a program, if one did. */
export const outputErrorOf = (cause: Cause.Cause<unknown>): OutputError | undefined =>
  Option.getOrUndefined(
    Cause.find(cause, (part) => {
      const error = Cause.isDieType(part) ? part.defect : Cause.isFailType(part) ? part.error : undefined
      return error instanceof OutputError ? Option.some(error) : Option.none()
    })
  )

/** Lets a failed write of `Console.log` and `Console.error` end the program, as of all other output. */
export const withConsole = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
  Effect.consoleWith((console) => {
    const line =
      (channel: Channel) =>
      (...args: ReadonlyArray<unknown>) =>
        write(channel)(`${format(...args)}\n`)
    return Effect.withConsole(effect, {
      ...console,
      log: line("stdout"),
      error: line("stderr")
    } satisfies Console.Console)
  })

/** Waits until what was written has left the process. */
export const flush: Effect.Effect<void> = Effect.ignore(Effect.zip(tryWrite("stdout")(""), tryWrite("stderr")("")))
