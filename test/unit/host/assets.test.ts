import { existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber, Layer, Option, TestServices } from "effect"
import { AssetError } from "../../../src/errors.ts"
import { Assets, type BuildDirectories } from "../../../src/host/Assets.ts"
import { SourceTree } from "../../../src/host/SourceTree.ts"
import { Settings } from "../../../src/Settings.ts"
import { temporaryDirectory, write, writeSourceTree } from "../../sourceTree.ts"

const layer = (source: string, state: string) =>
  Assets.layerWithoutSource.pipe(
    Layer.provide(SourceTree.layerTest(source)),
    Layer.provide(Settings.layerTest(state)),
    Layer.provide(NodeContext.layer)
  )

/** One source tree and one state directory; `process` runs an effect as a fresh process of machinen would. */
const host = Effect.gen(function* () {
  const source = yield* temporaryDirectory
  const state = yield* temporaryDirectory
  writeSourceTree(source)
  const process = <A, E>(effect: Effect.Effect<A, E, Assets>, tree = source) =>
    Effect.provide(effect, Layer.fresh(layer(tree, state)))
  return { source, assetsDir: path.join(state, "assets"), process }
})

const fill =
  (...names: ReadonlyArray<string>) =>
  ({ out }: BuildDirectories) =>
    Effect.sync(() => {
      for (const name of names) writeFileSync(path.join(out, name), name)
    })

const buildKernel = Effect.flatMap(Assets, (assets) => assets.build("kernel", fill("vmlinux")))
const kernel = Effect.flatMap(Assets, (assets) => assets.kernel)

describe("Assets", () => {
  it.scoped("an asset that is not built is a typed failure with the way out", () =>
    Effect.gen(function* () {
      const { process } = yield* host
      const error = yield* Effect.flip(process(kernel))
      assert.instanceOf(error, AssetError)
      assert.strictEqual(error.code, "ASSET_MISSING")
      assert.include(error.hint, "npm run setup")
    })
  )

  it.scoped("a store that cannot be looked into is not taken for an empty one", () =>
    Effect.gen(function* () {
      const { assetsDir, process } = yield* host
      // a directory that its owner keeps from us is EACCES; root, who runs the tests, is kept out by a file
      writeFileSync(assetsDir, "")
      const error = yield* Effect.flip(process(kernel))
      assert.strictEqual(error.code, "ASSET_UNREADABLE")
      assert.include(error.message, "ENOTDIR")
      assert.include(error.hint, assetsDir)
    })
  )

  it.scoped("what was built is found by other processes, whole and with its manifest", () =>
    Effect.gen(function* () {
      const { assetsDir, process } = yield* host
      yield* process(buildKernel)
      const file = yield* process(kernel)
      assert.match(file, /\/assets\/kernel-[0-9a-f]{12}\/vmlinux$/)
      const found = yield* process(Effect.flatMap(Assets, (assets) => assets.find("kernel")))
      assert.strictEqual(Option.getOrThrow(found).manifest.files["vmlinux"]?.size, "vmlinux".length)
      assert.deepStrictEqual(readdirSync(path.join(assetsDir, ".building")), [])
    })
  )

  it.scoped("is not built twice, nor for a second checkout with the same inputs", () =>
    Effect.gen(function* () {
      const { process } = yield* host
      const second = yield* temporaryDirectory
      writeSourceTree(second)
      yield* process(buildKernel)
      const never = Effect.flatMap(Assets, (assets) => assets.build("kernel", () => Effect.dieMessage("built again")))
      yield* process(never)
      yield* process(never, second)
      assert.strictEqual(yield* process(kernel), yield* process(kernel, second))
    })
  )

  for (const [what, change] of [
    ["a byte of an input", (root: string) => write(root, "kernel/config", "CONFIG_A=n\n")],
    ["a new input", (root: string) => write(root, "kernel/patches/0002-b.patch", "")],
    [
      "the name of an input",
      (root: string) => {
        rmSync(path.join(root, "kernel/patches/0001-a.patch"))
        write(root, "kernel/patches/0001-b.patch", "contents of kernel/patches/0001-a.patch\n")
      }
    ]
  ] as const) {
    it.scoped(`changes with ${what}`, () =>
      Effect.gen(function* () {
        const { process, source } = yield* host
        yield* process(buildKernel)
        change(source)
        assert.strictEqual((yield* Effect.flip(process(kernel))).code, "ASSET_MISSING")
      })
    )
  }

  it.scoped("does not change with another asset's inputs, build output or tests", () =>
    Effect.gen(function* () {
      const { process, source } = yield* host
      const build = Effect.flatMap(Assets, (assets) =>
        assets.build("programs", fill("init", "machinen-shim", "machinen-share"))
      )
      yield* process(build)
      write(source, "kernel/config", "CONFIG_A=n\n")
      write(source, "native/target/release/machinen-shim", "ELF")
      write(source, "guest/tests/exec.rs", "fn main() {}")
      write(source, "README.md", "# machinen")
      assert.match(yield* process(Effect.flatMap(Assets, (assets) => assets.init)), /\/init$/)
    })
  )

  it.scoped("a build that fails leaves nothing, and the next one succeeds", () =>
    Effect.gen(function* () {
      const { assetsDir, process } = yield* host
      const failing = Effect.flatMap(Assets, (assets) =>
        assets.build("kernel", (dirs) => Effect.zipRight(fill("vmlinux")(dirs), Effect.fail("no space" as const)))
      )
      assert.strictEqual(yield* Effect.flip(process(failing)), "no space")
      assert.deepStrictEqual(readdirSync(assetsDir), [".building"])
      assert.deepStrictEqual(readdirSync(path.join(assetsDir, ".building")), [])
      yield* process(Effect.zipRight(buildKernel, kernel))
    })
  )

  it.scoped("a build during which an input changed is not kept: its hash would lie", () =>
    Effect.gen(function* () {
      const { process, source } = yield* host
      const edited = Effect.flatMap(Assets, (assets) =>
        assets.build("kernel", (dirs) =>
          Effect.tap(fill("vmlinux")(dirs), () => Effect.sync(() => write(source, "kernel/config", "edited")))
        )
      )
      const error = yield* Effect.flip(process(edited))
      assert.include(error.message, "changed while it was built")
      assert.strictEqual((yield* Effect.flip(process(kernel))).code, "ASSET_MISSING")
    })
  )

  it.scoped("removes what a killed build left, of its own asset only", () =>
    Effect.gen(function* () {
      const { assetsDir, process } = yield* host
      mkdirSync(path.join(assetsDir, ".building", "kernel-dead", "work"), { recursive: true })
      mkdirSync(path.join(assetsDir, ".building", "base-debian-busy"), { recursive: true })
      yield* process(buildKernel)
      assert.deepStrictEqual(readdirSync(path.join(assetsDir, ".building")), ["base-debian-busy"])
    })
  )

  it.scoped("a directory without a manifest is no asset and is replaced", () =>
    Effect.gen(function* () {
      const { process } = yield* host
      yield* process(buildKernel)
      const file = yield* process(kernel)
      rmSync(path.join(path.dirname(file), "asset.json"))
      assert.strictEqual((yield* Effect.flip(process(kernel))).code, "ASSET_MISSING")
      yield* process(buildKernel)
      assert.isTrue(existsSync(yield* process(kernel)))
    })
  )

  it.scoped("of two that want it at once one builds, the other waits and finds it", () =>
    Effect.gen(function* () {
      const { process } = yield* host
      const started = yield* Deferred.make<void>()
      const mayEnd = yield* Deferred.make<void>()
      const builds: Array<string> = []
      const building = (who: string) =>
        process(
          Effect.flatMap(Assets, (assets) =>
            assets.build("kernel", (dirs) =>
              Effect.gen(function* () {
                builds.push(who)
                yield* Deferred.succeed(started, undefined)
                yield* Deferred.await(mayEnd)
                yield* fill("vmlinux")(dirs)
              })
            )
          )
        )
      const first = yield* Effect.fork(building("first"))
      yield* Deferred.await(started)
      const second = yield* Effect.fork(building("second"))
      // Without the lock the second would build by now; that it waits has no event.
      yield* TestServices.provideLive(Effect.sleep("500 millis"))
      assert.deepStrictEqual(builds, ["first"])
      assert.isTrue(Option.isNone(yield* Fiber.poll(second)))
      yield* Deferred.succeed(mayEnd, undefined)
      yield* Fiber.join(Fiber.zip(first, second))
      assert.deepStrictEqual(builds, ["first"])
    })
  )
})
