import { existsSync, readdirSync } from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Fiber, Layer, TestClock } from "effect"
import * as Fake from "../../../backends/fake/Fake.ts"
import { boot } from "../../../src/boot/boot.ts"
import { Registry } from "../../../src/machine/Registry.ts"
import { Settings } from "../../../src/Settings.ts"
import { temporaryHome } from "../../fixtures.ts"

const withFakes = (home: string) =>
  Effect.provide(
    Fake.layer.pipe(
      Layer.provideMerge(Registry.layer),
      Layer.provideMerge(Settings.layerTest(home)),
      Layer.provideMerge(NodeContext.layer)
    )
  )

const left = (home: string) =>
  ["vms", "names"].flatMap((dir) => (existsSync(path.join(home, dir)) ? readdirSync(path.join(home, dir)) : []))

const failing: ReadonlyArray<readonly [Fake.Step, string]> = [
  ["kernel", "ASSET_MISSING"],
  ["init", "ASSET_MISSING"],
  ["image", "BOOT_IMAGE_NOT_FOUND"],
  ["upper", "ROOTFS_IMG_NO_SPACE"],
  ["listen", "EXEC_AGENT_UNAVAILABLE"],
  ["launch", "BOOT_VMM_FAILED"],
  ["doorbell", "EXEC_PROTOCOL"]
]

describe("boot", () => {
  it.effect("acquires in order and releases in reverse", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      const fake = yield* Fake.Fake
      yield* Effect.scoped(
        Effect.gen(function* () {
          const { phases, vm } = yield* boot({ name: "web", memoryMib: 128 })
          assert.deepStrictEqual(yield* fake.events, ["listen+", "launch+"])
          assert.strictEqual(vm.name, "web")
          assert.deepStrictEqual(
            [...phases.keys()],
            ["validate", "claim", "rootdisk-materialize", "initramfs-pack", "vmm-spawn", "guest-ready"]
          )
          const [machine] = yield* fake.launched
          assert.deepStrictEqual(
            machine?.spec.disks.map(({ id, readOnly }) => ({ id, readOnly })),
            [
              { id: "root", readOnly: true },
              { id: "upper", readOnly: false }
            ]
          )
          assert.deepStrictEqual(machine?.supervision.cleanup, [path.join(home, "names", "web")])
          const start = machine?.spec.start
          assert.isTrue(start?._tag === "Kernel" && existsSync(start.initrd))
        })
      )
      assert.deepStrictEqual(yield* fake.events, ["listen+", "launch+", "launch-", "listen-"])
      assert.deepStrictEqual(left(home), [])
    }).pipe(withFakes(home))
  })

  for (const [step, code] of failing) {
    it.effect(`a failure at ${step} releases what came before, with its own error`, () => {
      const home = temporaryHome()
      return Effect.gen(function* () {
        const fake = yield* Fake.Fake
        yield* fake.when(step, "fail")
        const error = yield* Effect.flip(Effect.scoped(boot({ name: "web" })))
        assert.strictEqual(error.code, code)
        const events = yield* fake.events
        for (const event of events.filter((e) => e.endsWith("+"))) assert.include(events, event.replace("+", "-"))
        assert.deepStrictEqual(left(home), [])
      }).pipe(withFakes(home))
    })

    it.effect(`a failure at ${step} leaves the name and the scope to a second try`, () => {
      const home = temporaryHome()
      return Effect.gen(function* () {
        const fake = yield* Fake.Fake
        yield* Effect.scoped(
          Effect.gen(function* () {
            yield* fake.when(step, "fail")
            assert.strictEqual((yield* Effect.flip(Effect.asVoid(boot({ name: "web", prepared: false })))).code, code)
            assert.deepStrictEqual(left(home), [])
            yield* fake.when(step, "work")
            const { vm } = yield* boot({ name: "web", prepared: false })
            assert.deepStrictEqual(left(home).sort(), [vm.id, "web"].sort())
          })
        )
        assert.deepStrictEqual(left(home), [])
      }).pipe(withFakes(home))
    })

    it.effect(`an interruption at ${step} releases what came before`, () => {
      const home = temporaryHome()
      return Effect.gen(function* () {
        const fake = yield* Fake.Fake
        yield* fake.when(step, "hang")
        const fiber = yield* Effect.fork(Effect.scoped(boot({ name: "web" })))
        yield* fake.reached(step)
        const exit = yield* Fiber.interrupt(fiber)
        assert.isTrue(Exit.isInterrupted(exit))
        const events = yield* fake.events
        for (const event of events.filter((e) => e.endsWith("+"))) assert.include(events, event.replace("+", "-"))
        assert.deepStrictEqual(left(home), [])
      }).pipe(withFakes(home))
    })
  }

  it.effect("a guest that panics is told from a VMM that fails, with the console's last lines", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      const fake = yield* Fake.Fake
      yield* fake.when("doorbell", "hang")
      const fiber = yield* Effect.fork(Effect.flip(Effect.scoped(boot({}))))
      yield* fake.reached("doorbell")
      yield* fake.crash("[0.3] Kernel panic - not syncing: No init\n")
      const error = yield* Fiber.join(fiber)
      assert.strictEqual(error.code, "BOOT_GUEST_FAILED")
      assert.include(error.message, "Kernel panic - not syncing: No init")
      assert.include(error._tag === "BootError" ? error.console : "", "No init")
      assert.deepStrictEqual(left(home), [])
    }).pipe(withFakes(home))
  })

  it.effect("a guest that never rings is ended at the deadline, on the test clock", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      const fake = yield* Fake.Fake
      yield* fake.when("doorbell", "hang")
      const fiber = yield* Effect.fork(Effect.flip(Effect.scoped(boot({}))))
      yield* fake.reached("doorbell")
      yield* TestClock.adjust("61 seconds")
      const error = yield* Fiber.join(fiber)
      assert.strictEqual(error.code, "BOOT_READY_TIMEOUT")
      assert.isTrue(error._tag === "BootError" && error.retryable)
      assert.include(yield* fake.events, "kill")
      assert.deepStrictEqual(left(home), [])
    }).pipe(withFakes(home))
  })

  it.effect("a VM that is to be detached is launched attached, and detached when it is ready", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      const fake = yield* Fake.Fake
      const { vm } = yield* Effect.scoped(boot({ detached: true }))
      assert.isTrue(vm.entry.detached)
      assert.deepStrictEqual(
        (yield* fake.launched).map(({ supervision }) => supervision.entry.detached),
        [false]
      )
      assert.deepStrictEqual((yield* fake.events).slice(0, 3), ["listen+", "launch+", "detach"])
    }).pipe(withFakes(home))
  })

  it.effect("a VM that cannot be detached is ended", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      const fake = yield* Fake.Fake
      yield* fake.when("detach", "fail")
      const error = yield* Effect.flip(Effect.scoped(boot({ detached: true })))
      assert.strictEqual(error.code, "BOOT_DETACHED_READINESS_FAILED")
      assert.includeMembers([...(yield* fake.events)], ["launch+", "launch-"])
      assert.deepStrictEqual(left(home), [])
    }).pipe(withFakes(home))
  })

  for (const [what, mood] of [
    ["rings wrongly", "fail"],
    ["is waited for in vain", "hang"]
  ] as const) {
    it.effect(`a guest that ${what} is not detached`, () => {
      const home = temporaryHome()
      return Effect.gen(function* () {
        const fake = yield* Fake.Fake
        yield* fake.when("doorbell", mood)
        const fiber = yield* Effect.fork(Effect.scoped(boot({ detached: true })))
        yield* fake.reached("doorbell")
        if (mood === "hang") yield* Fiber.interrupt(fiber)
        assert.isTrue(Exit.isFailure(yield* Fiber.await(fiber)))
        const events = yield* fake.events
        assert.includeMembers([...events], ["launch+", "launch-"])
        assert.notInclude(events, "detach")
        assert.deepStrictEqual(left(home), [])
      }).pipe(withFakes(home))
    })
  }

  for (const [end, retryable] of [
    ["panics", false],
    ["is late", true]
  ] as const) {
    it.effect(`a detached guest that ${end} has the code of its kind, and may be retried or not`, () => {
      const home = temporaryHome()
      return Effect.gen(function* () {
        const fake = yield* Fake.Fake
        yield* fake.when("doorbell", "hang")
        const booting = yield* Effect.fork(Effect.flip(Effect.scoped(boot({ detached: true }))))
        yield* fake.reached("doorbell")
        if (retryable) yield* TestClock.adjust("61 seconds")
        else yield* fake.crash("[0.3] Kernel panic - not syncing: No init\n")
        const error = yield* Fiber.join(booting)
        assert.strictEqual(error.code, "BOOT_DETACHED_READINESS_FAILED")
        assert.strictEqual(error._tag === "BootError" && error.retryable, retryable)
      }).pipe(withFakes(home))
    })
  }

  it.effect("an option it does not know is refused by its name", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      const misspelt = { image: "micro", memory: 256 }
      const error = yield* Effect.flip(Effect.scoped(boot(misspelt)))
      assert.strictEqual(error.code, "BOOT_OPTION_INVALID")
      assert.include(error.message, '"memory"')
      assert.include(error._tag === "BootError" ? error.hint : "", "memoryMib")
      assert.deepStrictEqual(left(home), [])
    }).pipe(withFakes(home))
  })

  it.effect("a state directory too long for sockets is refused before anything is made", () => {
    const home = path.join(temporaryHome(), "x".repeat(80))
    return Effect.gen(function* () {
      const error = yield* Effect.flip(Effect.scoped(boot({})))
      assert.strictEqual(error.code, "BOOT_STATE_DIR_UNUSABLE")
      assert.isFalse(existsSync(home))
    }).pipe(withFakes(home))
  })
})
