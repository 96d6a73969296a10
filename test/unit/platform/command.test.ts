import { existsSync, readFileSync } from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Fiber } from "effect"
import * as command from "../../../src/platform/command.ts"
import * as processes from "../../../src/platform/processes.ts"
import { eventually, hang, temporaryHome } from "../../fixtures.ts"

describe("a host program", () => {
  it.live("that ignores SIGTERM is killed when it is interrupted", () =>
    Effect.gen(function* () {
      const dir = temporaryHome()
      const started = path.join(dir, "started")
      const script = `trap '' TERM; echo $$ >"${started}.draft"; mv "${started}.draft" "${started}"; ${hang(dir)}`
      const fiber = yield* Effect.fork(command.run(["sh", "-c", script]))
      yield* eventually("the start", () => existsSync(started))
      const identity = yield* Effect.flatten(processes.identify(Number(readFileSync(started, "utf8"))))
      yield* Fiber.interrupt(fiber)
      assert.isFalse(yield* processes.isAlive(identity))
    }).pipe(Effect.provide(NodeContext.layer))
  )
})
