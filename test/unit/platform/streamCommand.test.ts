import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber } from "effect"
import * as processes from "../../../src/platform/processes.ts"
import * as streamCommand from "../../../src/platform/streamCommand.ts"

const collect = () => {
  const lines: Array<string> = []
  return { lines, onLine: (line: string) => Effect.sync(() => void lines.push(line)) }
}

describe("streamCommand", () => {
  it.live("reports the lines of both streams and the exit code", () =>
    Effect.gen(function* () {
      const { lines, onLine } = collect()
      const ended = yield* streamCommand.run(["sh", "-c", "echo out; echo err >&2; exit 3"], { onLine })
      assert.deepStrictEqual(lines, ["out", "err"])
      assert.deepStrictEqual(ended, { code: 3, tail: ["out", "err"] })
    }).pipe(Effect.provide(NodeContext.layer))
  )

  it.live("gives the command an empty stdin and the directory and variables asked for", () =>
    Effect.gen(function* () {
      const { lines, onLine } = collect()
      yield* streamCommand.run(["sh", "-c", 'cat; pwd; echo "$A"'], { onLine, cwd: "/usr", env: { A: "b" } })
      assert.deepStrictEqual(lines, ["/usr", "b"])
    }).pipe(Effect.provide(NodeContext.layer))
  )

  it.live("interruption ends it with its children, even one that ignores SIGHUP", () =>
    Effect.gen(function* () {
      const child = yield* Deferred.make<number>()
      const fiber = yield* Effect.fork(
        streamCommand.run(["sh", "-c", "trap '' HUP; sleep 1000 & echo $!; wait"], {
          onLine: (line) => Deferred.succeed(child, Number(line))
        })
      )
      const pid = yield* Deferred.await(child)
      const identity = yield* Effect.flatten(processes.identify(pid))
      yield* Fiber.interrupt(fiber)
      yield* gone(identity)
    }).pipe(Effect.provide(NodeContext.layer))
  )

  it.live("what it started and left behind ends with it", () =>
    Effect.gen(function* () {
      const { lines, onLine } = collect()
      yield* streamCommand.run(["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"], { onLine })
      const found = yield* processes.identify(Number(lines[0]))
      if (found._tag === "Some") yield* gone(found.value)
    }).pipe(Effect.provide(NodeContext.layer))
  )
})

/** The kernel needs a moment between the signal and the end. */
const gone = (who: Parameters<typeof processes.isAlive>[0]) =>
  processes
    .isAlive(who)
    .pipe(
      Effect.repeat({ while: (alive) => alive }),
      Effect.timeoutFail({ duration: "3 seconds", onTimeout: () => new Error(`process ${who.pid} is still there`) })
    )
