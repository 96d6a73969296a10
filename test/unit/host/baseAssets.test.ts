import { mkdirSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer, Option } from "effect"
import { Assets } from "../../../src/host/Assets.ts"
import * as baseAssets from "../../../src/host/baseAssets.ts"
import { SourceTree } from "../../../src/host/SourceTree.ts"
import { Settings } from "../../../src/Settings.ts"
import { temporaryDirectory } from "../../fixtures.ts"
import { writeSourceTree } from "../../sourceTree.ts"

/** A host with set-up's assets, or without. */
const host = (options: { readonly assetsDir?: string; readonly built: boolean }) => {
  const dir = temporaryDirectory()
  writeSourceTree(dir)
  const layer = Assets.layerWithoutSource.pipe(
    Layer.provideMerge(Settings.layerTest(dir, { baseAssetsDir: Option.fromNullable(options.assetsDir) })),
    Layer.provide(SourceTree.layerTest(dir)),
    Layer.provideMerge(NodeContext.layer)
  )
  const build = Effect.flatMap(Assets, (assets) =>
    Effect.forEach(
      [
        ["kernel", "vmlinux"],
        ["base-debian", "base.ext4"]
      ] as const,
      ([name, file]) => assets.build(name, ({ out }) => Effect.sync(() => writeFileSync(path.join(out, file), name)))
    )
  )
  const resolve = (kind: baseAssets.BaseAsset, explicit?: string, cwd?: string) =>
    Effect.provide(Effect.zipRight(options.built ? build : Effect.void, baseAssets.resolve(kind, explicit, cwd)), layer)
  return {
    resolve,
    refused: (...args: Parameters<typeof resolve>) => Effect.map(Effect.flip(resolve(...args)), (e) => e.code)
  }
}

const kinds = [
  ["rootfs", "PROVISION_BASE_NOT_FOUND"],
  ["kernel", "PROVISION_KERNEL_NOT_FOUND"],
  ["dtb", "PROVISION_DTB_NOT_FOUND"]
] as const

describe("what a machine is made from", () => {
  for (const [kind, code] of kinds) {
    it.effect(`${kind}: an explicit path decides, there or not`, () =>
      Effect.gen(function* () {
        const cwd = temporaryDirectory()
        writeFileSync(path.join(cwd, "mine"), "")
        mkdirSync(path.join(cwd, "directory"))
        const { refused, resolve } = host({ assetsDir: cwd, built: true })
        assert.strictEqual(yield* resolve(kind, "mine", cwd), path.join(cwd, "mine"))
        assert.strictEqual(yield* resolve(kind, path.join(cwd, "mine")), path.join(cwd, "mine"))
        for (const wrong of ["none", "directory"]) assert.strictEqual(yield* refused(kind, wrong, cwd), code)
      })
    )

    it.effect(`${kind}: then MACHINEN_ASSETS_DIR, there or not`, () =>
      Effect.gen(function* () {
        const dir = temporaryDirectory()
        const { refused, resolve } = host({ assetsDir: dir, built: true })
        assert.strictEqual(yield* refused(kind), "PROVISION_ASSETS_DIR_INVALID")
        const files = { rootfs: "rootfs-debian-amd64.tar.gz", kernel: "vmlinux-amd64", dtb: "virt-amd64.dtb" }
        for (const file of Object.values(files)) writeFileSync(path.join(dir, file), "")
        assert.strictEqual(yield* resolve(kind), path.join(dir, files[kind]))
      })
    )

    it.effect(`${kind}: then what set-up made`, () =>
      Effect.gen(function* () {
        assert.strictEqual(yield* host({ built: false }).refused(kind), code)
        const { refused, resolve } = host({ built: true })
        if (kind === "dtb") return assert.strictEqual(yield* refused(kind), code)
        assert.match(
          yield* resolve(kind),
          kind === "kernel" ? /kernel-[0-9a-f]{12}\/vmlinux$/ : /base-debian-.*\/base\.ext4$/
        )
      })
    )
  }
})
