import { createHash } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Option, Schema, Stream } from "effect"
import { AssetError } from "../errors.ts"
import * as remoteFile from "../platform/remoteFile.ts"
import { AssetManifest, type AssetName, Assets } from "./Assets.ts"

const ManifestJson = Schema.parseJson(AssetManifest)
const maxManifest = 1024 * 1024
const programs: ReadonlySet<AssetName> = new Set(["programs", "gvproxy"])

/**
 * Fetches an asset from another host's asset store, a directory or a URL. Returns whether the store has it for the same inputs. Fails with
 * AssetError when a file differs from the store's manifest, or the store does not answer.
 */
export const fetchAsset = Effect.fn("prebuiltAssets.fetchAsset")(function* (from: string, name: AssetName) {
  const assets = yield* Assets
  const { directory, inputs } = yield* assets.identity(name)
  const unusable = (message: string, cause?: unknown) =>
    new AssetError({
      code: "ASSET_PREBUILT_INVALID",
      message: `the asset "${name}" of ${from} cannot be used: ${message}`,
      hint: "copy the asset store of the other host again; without --from it is built here",
      cause
    })
  const reading = Effect.mapError((cause: Error) => unusable(cause.message, cause))

  const found = yield* reading(remoteFile.open(remoteFile.join(from, directory, "asset.json")))
  if (Option.isNone(found)) return false
  const text = yield* reading(manifestText(found.value))
  const manifest = yield* Effect.mapError(Schema.decode(ManifestJson)(text), (cause) =>
    unusable("its manifest makes no sense", cause)
  )
  const files = Object.entries(manifest.files)
  if (manifest.name !== name || manifest.inputs !== inputs) return yield* unusable("it was built from something else")
  const invalidName = files.find(([file]) => !/^[A-Za-z0-9][A-Za-z0-9._-]*$/.test(file))
  if (invalidName !== undefined || files.length === 0) return yield* unusable("its manifest lists what no asset has")

  yield* assets.build(name, ({ out }) =>
    Effect.forEach(
      files,
      ([file, { sha256, size }]) =>
        Effect.gen(function* () {
          const fs = yield* FileSystem.FileSystem
          const bytes = yield* remoteFile.open(remoteFile.join(from, directory, file))
          if (Option.isNone(bytes)) return yield* unusable(`its file ${file} is missing`)
          const hash = createHash("sha256")
          let received = 0
          const counted = Stream.tap(bytes.value, (piece) => {
            hash.update(piece)
            received += piece.length
            return received > size ? unusable(`its file ${file} is longer than its manifest says`) : Effect.void
          })
          yield* Stream.run(counted, fs.sink(path.join(out, file)))
          if (received !== size || hash.digest("hex") !== sha256) {
            return yield* unusable(`its file ${file} is not the one its manifest was written for`)
          }
          yield* fs.chmod(path.join(out, file), programs.has(name) ? 0o755 : 0o644)
        }).pipe(Effect.mapError((e) => (e instanceof AssetError ? e : unusable(e.message, e)))),
      { discard: true }
    )
  )
  return true
})

const manifestText = (bytes: Stream.Stream<Uint8Array, Error>) =>
  bytes.pipe(
    Stream.runFoldEffect(Buffer.alloc(0), (all, piece) =>
      all.length + piece.length > maxManifest
        ? Effect.fail(new Error("its manifest is endless"))
        : Effect.succeed(Buffer.concat([all, piece]))
    ),
    Effect.map(String)
  )
