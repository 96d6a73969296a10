import { Effect, Option } from "effect"

/**
 * Runs an effect until it has succeeded with a value to `keep` (default: any value), then gives that value to every caller. `Effect.cached`
 * would also keep a failure, or the interruption of the first caller. Concurrent callers wait for one run; when that run is interrupted, the
 * next caller runs the effect.
 */
export const memoizeSuccess = <A, E, R>(
  effect: Effect.Effect<A, E, R>,
  keep: (value: A) => boolean = () => true
): Effect.Effect<Effect.Effect<A, E, R>> =>
  Effect.gen(function* () {
    const one = yield* Effect.makeSemaphore(1)
    let known = Option.none<A>()
    const run = Effect.tap(effect, (value) =>
      Effect.sync(() => {
        if (keep(value)) known = Option.some(value)
      })
    )
    const look = Effect.suspend(() => (Option.isSome(known) ? Effect.succeed(known.value) : run))
    return Effect.suspend(() => (Option.isSome(known) ? Effect.succeed(known.value) : one.withPermits(1)(look)))
  })
