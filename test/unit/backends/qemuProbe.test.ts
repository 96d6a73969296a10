import { existsSync } from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Fiber, Layer, Option, TestClock, TestServices } from "effect"
import * as Fake from "../../../backends/fake/Fake.ts"
import * as QemuProbe from "../../../backends/qemu/QemuProbe.ts"
import { HostProbe } from "../../../src/machine/HostProbe.ts"
import { Registry } from "../../../src/machine/Registry.ts"
import { Shim } from "../../../src/machine/Shim.ts"
import { Settings } from "../../../src/Settings.ts"
import { eventually, fakeVmm, hang, temporaryHome } from "../../fixtures.ts"

const probing = (home: string, vmm: string) =>
  QemuProbe.layer.pipe(
    Layer.provide(Fake.layer),
    Layer.provide(Shim.layer),
    Layer.provide(Registry.layer),
    Layer.provide(Settings.layerTest(home, { vmm: Option.some(vmm) })),
    Layer.provide(NodeContext.layer)
  )

describe("the version of a VMM", () => {
  it.effect("fails after a time limit when the VMM does not answer", () => {
    const home = temporaryHome()
    const asked = path.join(home, "asked")
    const vmm = fakeVmm(home, "silent", `: >"${asked}"; ${hang(home)}`)
    return Effect.gen(function* () {
      const { vmmVersion } = yield* HostProbe
      const asking = yield* Effect.fork(Effect.flip(vmmVersion))
      yield* TestServices.provideLive(eventually("the question", () => existsSync(asked)))
      yield* TestClock.adjust("10 seconds")
      const error = yield* Fiber.join(asking)
      assert.strictEqual(error.code, "BOOT_VMM_MISSING")
      assert.include(error.message, `${vmm} does not tell its version: it did not answer within 10 seconds`)
    }).pipe(Effect.provide(probing(home, vmm)))
  })
})
