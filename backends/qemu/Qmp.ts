import { randomUUID } from "node:crypto"
import { type Duration, Effect, Option, Schema, type Scope } from "effect"
import { VmmControlFailed } from "../../src/machine/Vmm.ts"
import { lineByLine } from "../../src/platform/connectionLines.ts"
import * as UnixSocket from "../../src/platform/UnixSocket.ts"

/** A session with QEMU's monitor. Commands run one at a time; QEMU serves one session at a time. */
export interface Qmp {
  readonly execute: (
    command: string,
    args?: Readonly<Record<string, unknown>>
  ) => Effect.Effect<unknown, VmmControlFailed>
}

const Message = Schema.parseJson(
  Schema.Struct({
    QMP: Schema.optional(Schema.Unknown),
    return: Schema.optional(Schema.Unknown),
    error: Schema.optional(Schema.Struct({ class: Schema.String, desc: Schema.String })),
    event: Schema.optional(Schema.String),
    id: Schema.optional(Schema.Unknown)
  })
)

/**
 * Opens a session: waits for the greeting, then negotiates capabilities (QMP specification, docs/interop/qmp-spec.rst in QEMU). The deadline is
 * needed because a second session gets no greeting until the first one is closed.
 */
export const connect = (
  path: string,
  deadline: Duration.DurationInput
): Effect.Effect<Qmp, VmmControlFailed, Scope.Scope> =>
  Effect.gen(function* () {
    const connection = yield* Effect.mapError(UnixSocket.connect(path), (cause) =>
      failed("QEMU's monitor is not there", cause)
    )
    const next = (yield* lineByLine(connection)).pipe(
      Effect.mapError(
        Option.match({
          onNone: () => failed("QEMU closed its monitor"),
          onSome: (cause) => failed("QEMU's monitor broke", cause)
        })
      ),
      Effect.flatMap((line) =>
        Effect.mapError(Schema.decode(Message)(line), (cause) =>
          failed("QEMU's monitor sent something unreadable", cause)
        )
      )
    )
    /** Waits for the answer to a command. Skips events, and answers to commands of an earlier session, which QEMU may send to this one. */
    const answer = (id: string): Effect.Effect<unknown, VmmControlFailed> =>
      Effect.flatMap(next, (message) => {
        if (message.event !== undefined || message.id !== id) return answer(id)
        return message.error === undefined
          ? Effect.succeed(message.return)
          : Effect.fail(failed(`QEMU refused: ${message.error.desc} (${message.error.class})`))
      })
    const one = yield* Effect.makeSemaphore(1)
    const execute: Qmp["execute"] = (command, args = {}) => {
      const id = randomUUID()
      return connection.write(Buffer.from(`${JSON.stringify({ execute: command, arguments: args, id })}\n`)).pipe(
        Effect.mapError((cause) => failed("QEMU's monitor broke", cause)),
        Effect.zipRight(answer(id)),
        one.withPermits(1),
        Effect.withSpan("Qmp.execute", { attributes: { command } })
      )
    }
    yield* Effect.timeoutFail(next, {
      duration: deadline,
      onTimeout: () => failed("QEMU's monitor did not greet: another session holds it, or QEMU hangs")
    })
    yield* execute("qmp_capabilities")
    return { execute }
  })

const failed = (message: string, cause?: unknown) => new VmmControlFailed({ message, cause })
