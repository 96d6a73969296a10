import { Effect, Schema } from "effect"
import type { ExecError } from "../errors.ts"
import { type AgentRequest, GuestStats } from "./AgentProtocol.ts"
import { toAnswerError } from "./agentErrors.ts"
import type { Operations } from "./operation.ts"

/** The guest's clock and statistics. */
export interface GuestSystem {
  /** Sets the guest's wall clock to the host's, after a standstill of the machine. Works while commands are frozen. */
  readonly setClock: Effect.Effect<void, ExecError>
  readonly stats: Effect.Effect<GuestStats, ExecError>
}

export const make = (operations: Operations): GuestSystem => ({
  setClock: sendTime(operations).pipe(Effect.mapError(toAnswerError), Effect.asVoid, Effect.withSpan("Agent.setClock")),
  stats: operations
    .ask({ op: "stats" })
    .pipe(Effect.flatMap(decodeStats), Effect.mapError(toAnswerError), Effect.withSpan("Agent.stats"))
})

/**
 * Sends a request that holds the time. The guest's clock is late by the transport time; `lateMs`, the delay of the answer, bounds that. Fails as
 * `ask` does.
 */
export const askWithTime = Effect.fnUntraced(function* ({ ask }: Operations, request: () => AgentRequest) {
  let sentMs = 0
  const json = yield* ask(() => {
    sentMs = Date.now()
    return request()
  })
  return { json, lateMs: Date.now() - sentMs }
})

/** Sends the guest the time, and returns by how much its clock may be late. */
export const sendTime = (operations: Operations) =>
  Effect.map(
    askWithTime(operations, () => ({ op: "clock", nowMs: Date.now() })),
    ({ lateMs }) => lateMs
  )

const decodeStats = Schema.decodeUnknown(GuestStats)
