import { Effect, Option } from "effect"

/**
 * Runs an effect until it has succeeded once with a value to `keep` (default: any), then gives that value to all. `Effect.cached` would keep
 * a failure or an interruption of the first caller as the answer for everybody. Callers at the same time wait for one run; when that is
 * interrupted, the next caller runs it.
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
