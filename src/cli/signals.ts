import * as os from "node:os"
import { Effect, type Scope } from "effect"

/** Signals a terminal or a supervisor sends to end or steer a program. */
const forwarded = ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"] as const
export type Forwarded = (typeof forwarded)[number]

export const signalNumber = (name: Forwarded): number => os.constants.signals[name]

type Handler = (signal: Forwarded) => void
const handlers: Array<Handler> = []

/** Until the scope closes, signals go to this handler instead of ending the program. */
export const intercept = (handler: Handler): Effect.Effect<void, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.sync(() => void handlers.push(handler)),
    () => Effect.sync(() => void handlers.splice(handlers.indexOf(handler), 1))
  )

/** Installs the process's handlers; `fallback` gets what nobody intercepts. */
export const install = (fallback: Handler): void => {
  for (const signal of forwarded) process.on(signal, () => (handlers.at(-1) ?? fallback)(signal))
}
