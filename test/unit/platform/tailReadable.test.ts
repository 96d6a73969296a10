import { assert, describe, it } from "@effect/vitest"
import { Effect, Fiber } from "effect"
import { Tail } from "../../../src/platform/Tail.ts"
import { TailReadable } from "../../../src/platform/TailReadable.ts"

describe("a tail", () => {
  it("is the end of all that was pushed, however it was cut", () => {
    for (const sizes of [[1], [3, 50, 7], [99, 1, 100, 101], [250], [0, 10, 0]]) {
      const tail = new Tail(100)
      let all = Buffer.alloc(0)
      for (let turn = 0; turn < 60; turn++) {
        const piece = Buffer.alloc(sizes[turn % sizes.length] ?? 0, turn)
        tail.push(piece)
        piece.fill(255) // it is copied
        all = Buffer.concat([all, Buffer.alloc(piece.length, turn)])
        assert.deepStrictEqual(tail.bytes, all.subarray(-100))
      }
    }
  })
})

describe("an outlet", () => {
  const read = async (outlet: TailReadable) => Buffer.concat(await outlet.toArray()).toString()

  it.effect("keeps the end for a late reader, and does not block the writer", () =>
    Effect.gen(function* () {
      const outlet = new TailReadable(10)
      for (const text of ["0123456789", "abc", "def"]) yield* outlet.write(Buffer.from(text))
      yield* outlet.end
      assert.strictEqual(outlet.tail.toString(), "6789abcdef")
      assert.strictEqual(yield* Effect.promise(() => read(outlet)), "6789abcdef")
    })
  )

  it.effect("gives a reader everything", () =>
    Effect.gen(function* () {
      const outlet = new TailReadable(10)
      const reading = read(outlet)
      for (let turn = 0; turn < 1000; turn++) yield* outlet.write(Buffer.from(`${turn},`))
      yield* outlet.end
      const wanted = Array.from({ length: 1000 }, (_, turn) => `${turn},`).join("")
      assert.strictEqual(yield* Effect.promise(() => reading), wanted)
    })
  )

  /** Somebody has read and reads no more; what they left is in the way. */
  const stalled = Effect.gen(function* () {
    const outlet = new TailReadable(10)
    outlet.once("data", () => outlet.pause())
    yield* outlet.write(Buffer.from("first"))
    yield* Effect.promise(() => new Promise((resolve) => outlet.once("pause", resolve)))
    let written = 0
    const writing = yield* Effect.fork(
      Effect.forEach(Array.from({ length: 8 }), () =>
        Effect.tap(outlet.write(Buffer.alloc(32 * 1024)), () => Effect.sync(() => void written++))
      )
    )
    yield* Effect.yieldNow()
    return { outlet, writing, written: () => written }
  })

  const ways: ReadonlyArray<readonly [string, (outlet: TailReadable) => Effect.Effect<void>]> = [
    ["goes on", (outlet) => Effect.sync(() => void outlet.resume())],
    ["leaves", (outlet) => Effect.sync(() => void outlet.destroy())],
    ["is not waited for any more", (outlet) => outlet.unlimit]
  ]
  for (const [what, act] of ways) {
    it.effect(`waits for a reader that stalls, until it ${what}`, () =>
      Effect.gen(function* () {
        const { outlet, writing, written } = yield* stalled
        assert.isBelow(written(), 8)
        yield* act(outlet)
        yield* Fiber.join(writing)
        assert.strictEqual(written(), 8)
      })
    )
  }
})
