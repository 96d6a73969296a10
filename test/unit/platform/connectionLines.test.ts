import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Option, Stream } from "effect"
import { firstLine, lineByLine } from "../../../src/platform/connectionLines.ts"
import * as UnixSocket from "../../../src/platform/UnixSocket.ts"
import { temporaryDirectory } from "../../sourceTree.ts"

/** A connection to a peer that sends these pieces, each on its own, and ends. */
const sending = (...pieces: ReadonlyArray<string>) =>
  Effect.gen(function* () {
    const file = path.join(yield* temporaryDirectory, "s")
    const accept = yield* UnixSocket.listenOnce(file)
    const [ours, theirs] = yield* Effect.all([UnixSocket.connect(file), accept], { concurrency: 2 })
    const send = Effect.forEach(pieces, (piece) => Effect.zipRight(theirs.write(Buffer.from(piece)), Effect.sleep(5)))
    yield* Effect.forkScoped(Effect.zipRight(send, theirs.end))
    return ours
  })
const failures = { ended: () => "ended" as const, maxBytes: 8, tooLong: () => "too long" as const }

describe("the first line of a connection", () => {
  it.scopedLive("is given without its newline, with all that follows, in whatever pieces they come", () =>
    Effect.gen(function* () {
      for (const pieces of [["OK 1\nrest"], ["O", "K 1", "\n", "re", "st"], ["OK", " 1\nre", "st"]]) {
        const { after, line } = yield* firstLine(yield* sending(...pieces), failures)
        assert.strictEqual(line, "OK 1")
        assert.strictEqual(yield* Stream.mkString(Stream.decodeText(after.bytes)), "rest")
      }
    })
  )

  it.scopedLive("is refused when the peer ends before it, or never ends it", () =>
    Effect.gen(function* () {
      assert.strictEqual(yield* Effect.flip(firstLine(yield* sending("OK 1"), failures)), "ended")
      assert.strictEqual(yield* Effect.flip(firstLine(yield* sending("endless, endless"), failures)), "too long")
    })
  )
})

describe("a connection read line by line", () => {
  it.scopedLive("gives each line, then its end", () =>
    Effect.gen(function* () {
      const next = yield* lineByLine(yield* sending("one\ntw", "o\nthree\n"))
      for (const line of ["one", "two", "three"]) assert.strictEqual(yield* next, line)
      assert.deepStrictEqual(yield* Effect.flip(next), Option.none())
    })
  )
})
