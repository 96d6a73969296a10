import { Effect } from "effect"

/** Where the time of one operation went: wall-clock milliseconds by phase name, in the order the phases began. */
export interface PhaseTimer {
  /** Measures an effect, also when it fails; it becomes a span `phase.<name>`. */
  readonly phase: (name: string) => <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>
  readonly phases: () => ReadonlyMap<string, number>
  /** Since the timer was made. */
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
