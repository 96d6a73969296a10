import { FileSystem } from "@effect/platform"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer, Scope } from "effect"
import * as Fake from "../../backends/fake/Fake.ts"
import { Machinen } from "../../src/Machinen.ts"
import { Registry } from "../../src/machine/Registry.ts"
import { Shim } from "../../src/machine/Shim.ts"
import { Settings } from "../../src/Settings.ts"
import { temporaryHome } from "../fixtures.ts"

/** The facade over fakes, built in a context that is not its users'. */
const machinen = (home: string) =>
  Machinen.layer.pipe(
    Layer.provide(Fake.layer),
    Layer.provide(Shim.layer),
    Layer.provide(Registry.layer),
    Layer.provide(Settings.layerTest(home)),
    Layer.provide(NodeContext.layer)
  )

class Theirs extends Context.Tag("test/Theirs")<Theirs, string>() {}
/** Files of the caller's that only the caller may see. */
const theirFiles = FileSystem.layerNoop({ exists: () => Effect.succeed(true) })

describe("Machinen", () => {
  it.effect("runs on its own services, whatever the caller's context holds", () =>
    Effect.gen(function* () {
      const { boot } = yield* Machinen
      const scope = yield* Scope.make()
      const { vm } = yield* boot({ name: "web" }).pipe(Scope.extend(scope), Effect.provide(theirFiles))
      assert.strictEqual(vm.name, "web")
      // the caller's scope owns it, not the one that the layer was built in
      const waiting = yield* Effect.fork(vm.wait)
      yield* Scope.close(scope, yield* Effect.exit(Effect.void))
      assert.strictEqual((yield* waiting.await)._tag, "Success")
    }).pipe(Effect.provide(machinen(temporaryHome())))
  )

  it.effect("gives a build's hook the caller's services", () =>
    Effect.gen(function* () {
      const { provision } = yield* Machinen
      const seen: Array<unknown> = []
      const out = `${temporaryHome()}/image.tar`
      const install = () =>
        Effect.gen(function* () {
          const fs = yield* FileSystem.FileSystem
          seen.push(yield* Theirs, yield* fs.exists("/no/such/file"))
        })
      const error = yield* Effect.flip(provision({ base: "micro", out, install })).pipe(
        Effect.provideService(Theirs, "theirs"),
        Effect.provide(theirFiles)
      )
      assert.deepStrictEqual(seen, ["theirs", true])
      // a fake guest has no root filesystem to give: the build was on our own files until then
      assert.strictEqual(error.code, "PROVISION_INSTALL_HOOK_FAILED")
    }).pipe(Effect.provide(machinen(temporaryHome())))
  )

  it.effect("refuses options that no operation has", () =>
    Effect.gen(function* () {
      const { boot, fork, restore, snapshot } = yield* Machinen
      const { vm } = yield* boot({})
      const [dir, kept] = [{ dir: "/tmp/bundle" }, { outDir: "/tmp/bundle", keepAlive: true }] as const
      // biome-ignore lint/suspicious/noExplicitAny: what JavaScript lets a caller do
      const wrong = (options: object) => options as any
      const errors = [
        yield* Effect.flip(snapshot(vm, wrong(dir))),
        yield* Effect.flip(snapshot(vm, wrong({}))),
        yield* Effect.flip(snapshot(vm, wrong(kept))),
        yield* Effect.flip(fork(vm, wrong({ newName: "x" }))),
        yield* Effect.flip(restore(wrong({ dir: "/tmp/bundle" }))),
        yield* Effect.flip(restore(wrong({})))
      ]
      assert.deepStrictEqual(
        errors.map(({ code, hint }) => [code, hint !== undefined]),
        [
          ["SNAPSHOT_OPTION_INVALID", true],
          ["SNAPSHOT_OPTION_INVALID", true],
          ["SNAPSHOT_OPTION_INVALID", true],
          ["BOOT_OPTION_INVALID", true],
          ["BOOT_OPTION_INVALID", true],
          ["BOOT_OPTION_INVALID", true]
        ]
      )
    }).pipe(Effect.scoped, Effect.provide(machinen(temporaryHome())))
  )
})
