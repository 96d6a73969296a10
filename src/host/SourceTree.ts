import * as path from "node:path"
import { fileURLToPath } from "node:url"
import { FileSystem } from "@effect/platform"
import { Context, Effect, Layer } from "effect"
import { AssetError } from "../errors.ts"
import { memoizeSuccess } from "../platform/memoizeSuccess.ts"

/** The root of the sources that assets are built from: the checkout, or the installed package, that this code belongs to. */
export class SourceTree extends Context.Tag("machinen/SourceTree")<
  SourceTree,
  { readonly root: Effect.Effect<string, AssetError> }
>() {
  /** Takes the nearest directory above this file that has a kernel and a Cargo workspace: the bundled CLI is deeper than this file. */
  static readonly layer = Layer.effect(
    SourceTree,
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const start = path.dirname(fileURLToPath(import.meta.url))
      const isRoot = (dir: string) =>
        Effect.forEach(["kernel/build.sh", "Cargo.toml"], (file) => fs.exists(path.join(dir, file))).pipe(
          Effect.map((found) => found.every(Boolean)),
          Effect.orElseSucceed(() => false)
        )
      const search = (dir: string): Effect.Effect<string, AssetError> =>
        Effect.flatMap(isRoot(dir), (found) => {
          if (found) return Effect.succeed(dir)
          return path.dirname(dir) === dir ? Effect.fail(sourceMissing(start)) : search(path.dirname(dir))
        })
      return SourceTree.of({ root: yield* memoizeSuccess(search(start)) })
    })
  )

  static readonly layerTest = (root: string) => Layer.succeed(SourceTree, { root: Effect.succeed(root) })
}

const sourceMissing = (start: string) =>
  new AssetError({
    code: "ASSET_SOURCE_MISSING",
    message: `no directory above ${start} holds the sources of the kernel and the guest`,
    hint: "install the machinen package with its kernel/, bases/, guest/ and native/ directories, or run from a checkout"
  })
