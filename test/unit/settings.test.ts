import * as os from "node:os"
import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { ConfigError, ConfigProvider, Effect, Layer, Option } from "effect"
import { Settings } from "../../src/Settings.ts"

const settingsOf = (environment: Readonly<Record<string, string>>) =>
  Settings.pipe(
    Effect.provide(
      Layer.provide(
        Settings.layer,
        Layer.setConfigProvider(ConfigProvider.fromMap(new Map(Object.entries(environment)), { pathDelim: "_" }))
      )
    )
  )

const directories = ["HOME", "CACHE_DIR", "ASSETS_STORE", "REGISTRY_DIR"].map((name) => `MACHINEN_${name}`)

describe("settings", () => {
  it.effect("that are empty count as not given", () =>
    Effect.gen(function* () {
      const all = [...directories, "MACHINEN_VMM", "MACHINEN_ASSETS_DIR"]
      const empty = yield* settingsOf(Object.fromEntries(all.map((name) => [name, ""])))
      assert.deepStrictEqual(empty, yield* settingsOf({}))
      assert.strictEqual(empty.home, path.join(os.homedir(), ".machinen"))
      assert.deepStrictEqual(empty.vmm, Option.none())
    })
  )

  for (const name of directories) {
    it.effect(`${name} must be absolute`, () =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(settingsOf({ [name]: "state" }))
        assert.isTrue(ConfigError.isConfigError(error))
        assert.include(String(error), "absolute")
      })
    )
  }

  it.effect("of a program may be a name, or a path from here", () =>
    Effect.gen(function* () {
      assert.deepStrictEqual((yield* settingsOf({ MACHINEN_VMM: "qemu" })).vmm, Option.some("qemu"))
      assert.deepStrictEqual((yield* settingsOf({ MACHINEN_VMM: "./qemu" })).vmm, Option.some(path.resolve("qemu")))
    })
  )

  it.effect("name directories below the one given", () =>
    Effect.gen(function* () {
      const { assetsDir, home, namesDir, vmsDir } = yield* settingsOf({ MACHINEN_HOME: "/a/../b/" })
      assert.deepStrictEqual([home, assetsDir, namesDir, vmsDir], ["/b/", "/b/assets", "/b/names", "/b/vms"])
    })
  )
})
