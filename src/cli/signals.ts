import * as os from "node:os"
import { Effect, type Scope } from "effect"

/** Signals by which terminals and supervisors end or steer a program. */
const forwarded = ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"] as const
export type Forwarded = (typeof forwarded)[number]

export const signalNumber = (name: Forwarded): number => os.constants.signals[name]

type Handler = (signal: Forwarded) => void
const handlers: Array<Handler> = []
let end: Handler = () => {}

/** Passes signals to the handler until the scope closes, instead of ending the program. */
const intercept = (handler: Handler): Effect.Effect<void, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.sync(() => void handlers.push(handler)),
    () => Effect.sync(() => void handlers.splice(handlers.lastIndexOf(handler), 1))
  )

/** After so many ending signals in so short a time the program ends, though the guest ignores or cannot get them. */
const forcedEnd = { times: 3, withinMs: 5000 }
const ending: ReadonlySet<Forwarded> = new Set(["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])

/**
 * Passes signals to a guest's command until the scope closes. The third ending signal within 5 s ends the program, and through its scopes the
 * command.
 */
export const relay = (send: Handler): Effect.Effect<void, never, Scope.Scope> =>
  Effect.suspend(() => {
    let sent: ReadonlyArray<number> = []
    return intercept((signal) => {
      if (ending.has(signal)) {
        const now = performance.now()
        sent = [...sent.filter((then) => now - then < forcedEnd.withinMs), now]
        if (sent.length >= forcedEnd.times) return end(signal)
      }
      send(signal)
    })
  })

/** Installs the process's signal handlers. `fallback` gets the signals that are not intercepted, and ends the program. */
export const install = (fallback: Handler): void => {
  end = fallback
  for (const signal of forwarded) process.on(signal, () => (handlers.at(-1) ?? fallback)(signal))
}
