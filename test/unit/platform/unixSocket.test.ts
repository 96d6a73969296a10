import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Chunk, Deferred, Effect, Fiber, Option, Scope, Stream } from "effect"
import * as UnixSocket from "../../../src/platform/UnixSocket.ts"
import { temporaryDirectory } from "../../sourceTree.ts"

const text = (bytes: Uint8Array) => Buffer.from(bytes).toString()

/** Both ends of a connection. */
const pair = Effect.gen(function* () {
  const file = path.join(yield* temporaryDirectory, "s")
  const accept = yield* UnixSocket.listenOnce(file)
  const [ours, theirs] = yield* Effect.all([UnixSocket.connect(file), accept], { concurrency: 2 })
  return { ours, theirs }
})

describe("a connection", () => {
  it.scopedLive("gives what the peer sends, then its end, then its end again", () =>
    Effect.gen(function* () {
      const { ours, theirs } = yield* pair
      yield* theirs.write(Buffer.from("a"))
      assert.strictEqual(text(yield* ours.read), "a")
      yield* theirs.write(Buffer.from("b"))
      yield* theirs.end
      assert.strictEqual(text(Buffer.concat(Chunk.toArray(yield* Stream.runCollect(ours.bytes)))), "b")
      assert.deepStrictEqual(yield* Effect.flip(ours.read), Option.none())
    })
  )

  it.scopedLive("loses nothing to a reader that is interrupted", () =>
    Effect.gen(function* () {
      const { ours, theirs } = yield* pair
      for (let round = 0; round < 50; round++) {
        const given = yield* Effect.fork(ours.read)
        yield* Effect.yieldNow()
        yield* theirs.write(Buffer.from([round]))
        // some of these find the reader waiting, some with the bytes in its hands
        if (round % 2 === 1) yield* Effect.async<void>((resume) => void setImmediate(() => resume(Effect.void)))
        const exit = yield* Fiber.interrupt(given)
        const bytes = exit._tag === "Success" ? exit.value : yield* ours.read
        assert.deepStrictEqual([...bytes], [round])
      }
    })
  )

  it.scopedLive("is made in a region that must not be interrupted, though an interruption waits", () =>
    Effect.gen(function* () {
      const file = path.join(yield* temporaryDirectory, "s")
      const accept = yield* UnixSocket.listenOnce(file)
      const begun = yield* Deferred.make<void>()
      let isConnected = false
      const fiber = yield* Deferred.succeed(begun, undefined).pipe(
        Effect.zipRight(Effect.sleep("20 millis")),
        Effect.zipRight(UnixSocket.connect(file)),
        Effect.tap(() =>
          Effect.sync(() => {
            isConnected = true
          })
        ),
        Effect.uninterruptible,
        Effect.fork
      )
      yield* Deferred.await(begun)
      yield* Fiber.interrupt(fiber)
      assert.isTrue(isConnected)
      yield* Effect.timeout(accept, "5 seconds")
    })
  )

  it.scopedLive("ends for a reader that waits when the peer goes", () =>
    Effect.gen(function* () {
      const { ours, theirs } = yield* pair
      const reading = yield* Effect.fork(ours.read)
      yield* Effect.yieldNow()
      theirs.socket.destroy()
      assert.isTrue(Option.isNone(yield* Effect.flip(Fiber.join(reading))))
    })
  )

  it.scopedLive("that came before it was asked for is handed out, with what it has sent", () =>
    Effect.gen(function* () {
      const file = path.join(yield* temporaryDirectory, "s")
      const accept = yield* UnixSocket.listenOnce(file)
      const ours = yield* UnixSocket.connect(file)
      yield* ours.write(Buffer.from("early"))
      // by then the server has accepted it
      yield* Effect.sleep("50 millis")
      const theirs = yield* Effect.timeout(accept, "5 seconds")
      assert.strictEqual(text(yield* theirs.read), "early")
    })
  )

  it.scopedLive("that was not accepted ends with the listener's scope", () =>
    Effect.gen(function* () {
      const file = path.join(yield* temporaryDirectory, "s")
      const outer = yield* Effect.scope
      const ours = yield* Effect.scoped(
        Effect.gen(function* () {
          yield* UnixSocket.listenOnce(file)
          const ours = yield* UnixSocket.connect(file).pipe(Scope.extend(outer))
          yield* Effect.sleep("50 millis")
          return ours
        })
      )
      assert.deepStrictEqual(yield* Effect.flip(Effect.timeout(ours.read, "5 seconds")), Option.none())
    })
  )
})
