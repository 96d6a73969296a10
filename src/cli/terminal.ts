import { Deferred, Effect, Ref, type Scope, Stream } from "effect"
import { ExecError } from "../errors.ts"
import type { Terminal, TerminalSize } from "../guest/Terminal.ts"
import { leaveOutputAlone } from "../platform/tty.ts"
import { DetachKeys } from "../terminal/DetachKeys.ts"
import { tellOutOfMemory } from "./exit.ts"
import * as stdio from "./stdio.ts"

/** Fails with EXEC_NO_TERMINAL when stdin is not a terminal. */
export const required: Effect.Effect<void, ExecError> = Effect.suspend(() =>
  process.stdin.isTTY === true
    ? Effect.void
    : new ExecError({
        code: "EXEC_NO_TERMINAL",
        message: "the input device is not a TTY",
        hint: "run it from a terminal; `exec -i` passes a pipe on"
      })
)

/** The window's size; a common size when the terminal does not report one. */
export const size = (): TerminalSize => {
  const { columns, rows } = process.stdout
  return { columns: columns || 80, rows: rows || 24 }
}

/** The TERM variable of this terminal, for the guest's command. */
export const environment = (): Readonly<Record<string, string>> => {
  const term = process.env["TERM"]
  return term === undefined || term === "" ? {} : { TERM: term }
}

/** Sets raw mode until the scope closes: keys arrive as they are pressed, also ctrl-c, without echo, and output is not processed. */
const raw: Effect.Effect<void, never, Scope.Scope> = Effect.acquireRelease(
  Effect.sync(() => {
    process.stdin.setRawMode(true)
    leaveOutputAlone(process.stdin.fd)
  }),
  () => Effect.sync(() => void process.stdin.setRawMode(false))
)

/** The window's size, now and whenever it changes. */
const sizes: Stream.Stream<TerminalSize> = Stream.asyncPush<TerminalSize>(
  (emit) =>
    Effect.acquireRelease(
      Effect.sync(() => {
        const tell = () => void emit.single(size())
        process.stdout.on("resize", tell)
        // the size may have changed before we listened
        tell()
        return tell
      }),
      (tell) => Effect.sync(() => void process.stdout.off("resize", tell))
    ),
  { bufferSize: 1, strategy: "sliding" }
)

/**
 * Resets what a program may have changed in the terminal: normal screen, attributes, cursor, keys, mouse and paste modes, scroll region. Then goes
 * to the last line.
 */
const reset =
  "\x1b[?47l\x1b[m\x1b[?25h\x1b[?1l\x1b>\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[r\x1b[999;1H\r\n"

/**
 * Connects this terminal to the guest's until the command ends. Returns the exit code, or `detached` when the detach keys were pressed (with
 * `detachKeys`) or this terminal has gone.
 */
export const relay = (
  open: Effect.Effect<Terminal, ExecError, Scope.Scope>,
  options: { readonly detachKeys: boolean }
): Effect.Effect<number | "detached", ExecError> =>
  Effect.gen(function* () {
    const input = yield* stdio.stdin
    const terminal = yield* open
    yield* raw
    const isOver = yield* Ref.make(false)
    yield* Effect.addFinalizer(() =>
      Effect.unlessEffect(Effect.ignore(stdio.tryWrite("stdout")(reset)), Ref.get(isOver))
    )
    const leave = yield* Deferred.make<"detached">()
    const keys = new DetachKeys()
    const typed = (bytes: Uint8Array) => (options.detachKeys ? keys.push(bytes) : { forward: bytes, detached: false })

    yield* input.pipe(
      Stream.map(typed),
      Stream.runForEachWhile(({ detached, forward }) => Effect.as(terminal.write(forward), !detached)),
      // the output of a terminal that takes no more keys says why
      Effect.matchEffect({ onFailure: () => Effect.void, onSuccess: () => Deferred.succeed(leave, "detached") }),
      Effect.forkScoped
    )
    yield* Effect.forkScoped(Effect.ignore(Stream.runForEach(sizes, terminal.resize)))
    const shown = terminal.output.pipe(
      Stream.runForEach(stdio.tryWrite("stdout")),
      Effect.zipRight(terminal.exit),
      Effect.zipLeft(Ref.set(isOver, true)),
      // the output cannot be written any more: this terminal has gone
      Effect.catchAll(
        (error): Effect.Effect<"detached", ExecError> =>
          error instanceof ExecError ? Effect.fail(error) : Effect.succeed("detached")
      )
    )
    return yield* Effect.raceFirst(shown, Deferred.await(leave))
  }).pipe(
    Effect.scoped,
    Effect.tap((end) => (end === "detached" ? Effect.void : tellOutOfMemory(end))),
    Effect.map((end) => (end === "detached" ? end : end.code))
  )
