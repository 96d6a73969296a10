import { Effect } from "effect"

/** Measures the phases of one operation: wall-clock milliseconds by name, in the order in which the phases began. */
export interface PhaseTimer {
  /** Measures an effect, also one that fails, and makes it a span `phase.<name>`. */
  readonly phase: (name: string) => <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>
  readonly phases: () => ReadonlyMap<string, number>
  /** Milliseconds since the timer was made. */
  readonly totalMs: () => number
}

export const make: Effect.Effect<PhaseTimer> = Effect.sync(() => {
  const began = performance.now()
  const measured = new Map<string, number>()
  return {
    phase: (name) => (effect) =>
      Effect.suspend(() => {
        const start = performance.now()
        measured.set(name, 0)
        return Effect.ensuring(
          effect,
          Effect.sync(() => measured.set(name, performance.now() - start))
        )
      }).pipe(Effect.withSpan(`phase.${name}`)),
    phases: () => new Map(measured),
    totalMs: () => performance.now() - began
  }
})
