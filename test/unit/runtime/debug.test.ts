import { format } from "node:util"
import { afterEach, assert, beforeEach, describe, it } from "@effect/vitest"
import createDebug from "debug"
import { Effect, LogLevel, Tracer } from "effect"
import { RegistryError } from "../../../src/errors.ts"
import * as debug from "../../../src/runtime/debug.ts"

const printed: Array<string> = []
const print = createDebug.log

beforeEach(() => {
  createDebug.log = (...parts) => void printed.push(format(...parts))
})
afterEach(() => {
  createDebug.disable()
  createDebug.log = print
  printed.length = 0
})

const work = Effect.gen(function* () {
  yield* Effect.logDebug("looked", "twice").pipe(Effect.annotateLogs({ service: "boot" }))
  yield* Effect.fn("Registry.find")(() => Effect.succeed(1))()
  yield* Effect.fn("RootfsImage.ensure")(() => Effect.succeed(1))()
  yield* Effect.ignore(Effect.fn("Registry.claim")(() => Effect.fail(new Error("taken")))())
  yield* Effect.never.pipe(Effect.withSpan("Registry.list"), Effect.raceFirst(Effect.yieldNow()))
})

describe("warnings", () => {
  const shown = (effect: Effect.Effect<void>) =>
    Effect.acquireUseRelease(
      Effect.sync(() => {
        const lines: Array<string> = []
        const write = process.stderr.write
        process.stderr.write = (text: string | Uint8Array) => lines.push(String(text)) > 0
        return { lines, write }
      }),
      ({ lines }) => Effect.as(Effect.provide(effect, debug.layer), lines),
      ({ write }) =>
        Effect.sync(() => {
          process.stderr.write = write
        })
    )
  const say = Effect.gen(function* () {
    yield* Effect.logDebug("detail")
    yield* Effect.logInfo("news")
    yield* Effect.logWarning(
      "reconcile failed",
      new RegistryError({ code: "REGISTRY_IO", message: "a file named \x1b[2J" })
    )
  })
  const warning = "machinen: warn: reconcile failed: (REGISTRY_IO): a file named \\e[2J\n"

  it.effect("are shown to a user who asked for nothing, without control characters", () =>
    Effect.gen(function* () {
      assert.deepStrictEqual(yield* shown(say), [warning])
    })
  )

  it.effect("are shown from the level that was asked for on", () =>
    Effect.gen(function* () {
      const from = (level: LogLevel.LogLevel) => shown(Effect.locally(say, debug.shownFrom, level))
      assert.deepStrictEqual(yield* from(LogLevel.Info), ["machinen: info: news\n", warning])
      assert.deepStrictEqual(yield* from(LogLevel.None), [])
    })
  )
})

describe("DEBUG", () => {
  it.effect("prints nothing when nothing is enabled", () =>
    Effect.gen(function* () {
      yield* Effect.provide(work, debug.layer)
      assert.deepStrictEqual(printed, [])
    })
  )

  for (const [namespace, line] of [
    ["machinen:boot", /machinen:boot debug looked twice$/],
    ["machinen:rootfs-image", /machinen:rootfs-image RootfsImage\.ensure took [\d.]+ ms$/]
  ] as const) {
    it.effect(`shows ${namespace} alone when that is enabled`, () =>
      Effect.gen(function* () {
        createDebug.enable(namespace)
        yield* Effect.provide(work, debug.layer)
        assert.strictEqual(printed.length, 1)
        assert.match(printed[0] ?? "", line)
      })
    )
  }

  it.effect("says why an operation failed, and keeps another tracer", () =>
    Effect.gen(function* () {
      createDebug.enable("machinen:registry")
      const ended: Array<string> = []
      const inner = yield* Effect.tracer
      const other = Tracer.make({
        context: (f, fiber) => inner.context(f, fiber),
        span: (name, ...rest) => {
          const span = inner.span(name, ...rest)
          const end = span.end.bind(span)
          span.end = (...ending) => {
            ended.push(name)
            end(...ending)
          }
          return span
        }
      })
      yield* work.pipe(Effect.provide(debug.layer), Effect.withTracer(other))
      assert.include(ended, "RootfsImage.ensure")
      assert.strictEqual(printed.length, 3)
      assert.match(printed[0] ?? "", /Registry\.find took [\d.]+ ms$/)
      assert.match(printed[1] ?? "", /Registry\.claim took [\d.]+ ms, failed: taken$/)
      assert.match(printed[2] ?? "", /Registry\.list took [\d.]+ ms, interrupted$/)
    })
  )
})
