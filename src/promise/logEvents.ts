import { Effect } from "effect"
import type { LogEvent, OnLog, PhaseLogEvent } from "./types.ts"

/** Receives events. */
export type Log = (event: LogEvent) => Effect.Effect<void>

/** Sends events to the caller's `onLog`. An error that it throws is logged, and does not fail the operation. */
export const logger = (onLog: OnLog | undefined): Log =>
  onLog === undefined
    ? () => Effect.void
    : (event) =>
        Effect.try(() => onLog(event)).pipe(
          Effect.catchAll((error) => Effect.logDebug("onLog threw", error)),
          Effect.annotateLogs({ service: "promise" })
        )

/** Sends each event to two places. */
export const both =
  (one: Log, other: Log): Log =>
  (event) =>
    Effect.zipRight(one(event), other(event))

export const phaseEvent = (
  kind: PhaseLogEvent["kind"],
  phases: ReadonlyMap<string, number>,
  totalMs: number
): PhaseLogEvent => ({ source: "phase", kind, phases, totalMs })
