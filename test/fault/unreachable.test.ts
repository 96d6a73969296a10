import { renameSync } from "node:fs"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Fiber } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import * as processes from "../../src/platform/processes.ts"
import { assertNothingLeft, cli, collectGarbage, live, settled, temporaryHome } from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

/** A VM that outlives its starter; where a test fails, its supervisor is told to stop it. */
const detached = Effect.acquireRelease(
  Effect.gen(function* () {
    const machinen = yield* Machinen
    const { vm } = yield* Effect.scoped(machinen.boot({ image: "micro", name: "mute", detached: true }))
    return yield* machinen.attach(vm.id)
  }),
  ({ machine }) =>
    Effect.flatMap(processes.isAlive(machine.shim), (alive) =>
      Effect.sync(() => void (alive && process.kill(machine.shim.pid, "SIGTERM")))
    )
)

describe("a supervisor that cannot be reached", () => {
  it.scopedLive("is not taken for a VM that is gone", () =>
    Effect.gen(function* () {
      const vm = yield* detached
      const socket = vm.entry.controlPath
      renameSync(socket, `${socket}.away`)
      for (const asked of [vm.stop(), vm.kill, vm.wait]) {
        const error = yield* Effect.flip(asked)
        assert.strictEqual(error.code, "REGISTRY_VM_UNREACHABLE")
        assert.isTrue(error.retryable)
        assert.include(error.hint ?? "", String(vm.machine.shim.pid))
      }
      const stopped = yield* cli(home, ["stop", "mute"])
      assert.deepStrictEqual({ code: stopped.code, stdout: stopped.stdout }, { code: 1, stdout: "" })
      assert.include(stopped.stderr, "REGISTRY_VM_UNREACHABLE")
      assert.include((yield* cli(home, ["ls"])).stdout, "mute")
      renameSync(`${socket}.away`, socket)
      assert.isTrue((yield* vm.stop()).orderly)
      assertNothingLeft(home)
    }).pipe(Effect.provide(live(home)))
  )

  it.live("ends its VM when the starter closes the pipe", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      yield* Effect.scoped(
        Effect.gen(function* () {
          const { vm } = yield* machinen.boot({ image: "micro" })
          const socket = vm.entry.controlPath
          renameSync(socket, `${socket}.away`)
          const { orderly, reason } = yield* Effect.timeout(vm.stop(), "20 seconds")
          assert.deepStrictEqual({ orderly, reason }, { orderly: true, reason: "owner-lost" })
        })
      )
      assertNothingLeft(home)
    }).pipe(Effect.provide(live(home)))
  )

  it.scopedLive("and is killed ends a wait at once", () =>
    Effect.gen(function* () {
      const vm = yield* detached
      const waiting = yield* Effect.fork(vm.wait)
      yield* Effect.yieldNow()
      process.kill(vm.machine.shim.pid, "SIGKILL")
      const exit = yield* Effect.timeout(Fiber.await(waiting), "10 seconds")
      assert.deepInclude(Exit.getOrElse(exit, () => undefined) ?? {}, { orderly: false, reason: "shim-lost" })
      const collected = JSON.parse((yield* collectGarbage(home)).stdout) as ReadonlyArray<{
        removedPaths: Array<string>
      }>
      // its directory and its name
      assert.lengthOf(
        collected.flatMap(({ removedPaths }) => removedPaths),
        2
      )
    }).pipe(Effect.provide(live(home)))
  )
})
