import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber } from "effect"
import { memoizeSuccess } from "../../../src/platform/memoizeSuccess.ts"

describe("memoizeSuccess", () => {
  it.effect("runs once for all callers, those at the same time too", () =>
    Effect.gen(function* () {
      let runs = 0
      const go = yield* Deferred.make<void>()
      const answer = yield* memoizeSuccess(
        Effect.zipRight(
          Deferred.await(go),
          Effect.sync(() => ++runs)
        )
      )
      const early = yield* Effect.fork(Effect.replicateEffect(answer, 3, { concurrency: "unbounded" }))
      yield* Effect.yieldNow()
      yield* Deferred.succeed(go, undefined)
      assert.deepStrictEqual(yield* Fiber.join(early), [1, 1, 1])
      assert.strictEqual(yield* answer, 1)
    })
  )

  it.effect("forgets a failure, an interruption and a value that is not to be kept", () =>
    Effect.gen(function* () {
      const outcomes = [Effect.fail("no"), Effect.interrupt, Effect.succeed(1), Effect.succeed(2), Effect.succeed(3)]
      const answer = yield* memoizeSuccess(
        Effect.suspend(() => outcomes.shift() ?? Effect.dieMessage("asked too often")),
        (value) => value > 1
      )
      assert.deepStrictEqual(yield* Effect.exit(answer), Exit.fail("no"))
      assert.isTrue(Exit.isInterrupted(yield* Effect.exit(answer)))
      assert.strictEqual(yield* answer, 1)
      assert.strictEqual(yield* answer, 2)
      assert.strictEqual(yield* answer, 2)
    })
  )

  it.effect("lets the next caller run it when the first is interrupted", () =>
    Effect.gen(function* () {
      let runs = 0
      const answer = yield* memoizeSuccess(Effect.suspend(() => (++runs === 1 ? Effect.never : Effect.succeed(runs))))
      const first = yield* Effect.fork(answer)
      yield* Effect.yieldNow()
      const second = yield* Effect.fork(answer)
      yield* Fiber.interrupt(first)
      assert.strictEqual(yield* Fiber.join(second), 2)
    })
  )
})
