import * as path from "node:path"
import { FileSystem, type Error as PlatformErrors } from "@effect/platform"
import { Context, Effect, Layer, Option, Order, Schema } from "effect"
import { AssetError } from "../errors.ts"
import { contentHash } from "../platform/contentHash.ts"
import * as HostLock from "../platform/HostLock.ts"
import { sha256File } from "../platform/sha256File.ts"
import { Settings } from "../Settings.ts"
import { SourceTree } from "./SourceTree.ts"

/**
 * The assets that set-up builds, each with the files and directories of the source tree that decide its content. `programs` is one asset,
 * because one cargo build makes the guest's init, the shim and the file server.
 */
const inputs = {
  kernel: ["kernel"],
  gvproxy: ["gvproxy"],
  programs: [".cargo", "Cargo.lock", "Cargo.toml", "guest", "native"],
  "base-micro": ["bases/ext4.sh", "bases/micro.sh"],
  "base-debian": ["bases/debian-finish.sh", "bases/debian.packages", "bases/debian.sh", "bases/ext4.sh"]
} as const satisfies Record<string, ReadonlyArray<string>>

export type AssetName = keyof typeof inputs
export const assetNames: ReadonlyArray<AssetName> = ["programs", "gvproxy", "kernel", "base-micro", "base-debian"]

/** Entries below the inputs that do not affect the result. */
const ignored: ReadonlySet<string> = new Set(["target", "tests", "examples", "benches"])

/** `asset.json`: a directory without it does not count as an asset. */
export class AssetManifest extends Schema.Class<AssetManifest>("AssetManifest")({
  format: Schema.Literal(1),
  name: Schema.Literal("kernel", "programs", "gvproxy", "base-micro", "base-debian"),
  /** sha256 over the inputs' paths and bytes. */
  inputs: Schema.String,
  builtAt: Schema.String,
  files: Schema.Record({ key: Schema.String, value: Schema.Struct({ size: Schema.Number, sha256: Schema.String }) })
}) {}

const manifestFile = "asset.json"
const ManifestJson = Schema.parseJson(AssetManifest)

/**
 * The kernel, the guest's init, the shim, the file server and the base images: built on this machine and kept by the hash of their inputs. A second checkout
 * with the same inputs uses the same assets. A changed input makes another asset beside the old one, which running VMs and bundles may still
 * need. The paths are absolute; an asset that is not built fails with AssetError.
 */
export class Assets extends Context.Tag("machinen/Assets")<
  Assets,
  {
    /** Path of the guest kernel, an ELF file. */
    readonly kernel: Effect.Effect<string, AssetError>
    /** Path of the guest's init and agent, one static program. */
    readonly init: Effect.Effect<string, AssetError>
    /** Path of `machinen-shim`, the supervisor of each VM. */
    readonly shim: Effect.Effect<string, AssetError>
    /** Path of `machinen-share`, the file server of each VM with shared directories. */
    readonly share: Effect.Effect<string, AssetError>
    /** Path of `gvproxy`, which serves a guest's network card. */
    readonly gvproxy: Effect.Effect<string, AssetError>
    /** Path of a base image, read-only ext4. */
    readonly base: (name: "micro" | "debian") => Effect.Effect<string, AssetError>
    /** The asset's directory name in any store, and the hash of its inputs. Both are the same for the same sources. */
    readonly identity: (
      name: AssetName
    ) => Effect.Effect<{ readonly directory: string; readonly inputs: string }, AssetError>
    /** The files of a built asset that differ from the manifest: in size, and with `deep` in content. */
    readonly damaged: (
      name: AssetName,
      options: { readonly deep: boolean }
    ) => Effect.Effect<ReadonlyArray<string>, AssetError>
    /** Removes an asset's manifest, so that the next build replaces the asset. */
    readonly discard: (name: AssetName) => Effect.Effect<void, AssetError>
    /** The asset for the present inputs; `None` when it is not built. */
    readonly find: (name: AssetName) => Effect.Effect<Option.Option<FoundAsset>, AssetError>
    /**
     * Runs `make`, which fills `out`, unless the asset is there. Of several processes one builds and the others wait. A failed build leaves
     * nothing; the leftovers of a killed build are removed by the next one.
     */
    readonly build: <E, R>(
      name: AssetName,
      make: (dirs: BuildDirectories) => Effect.Effect<void, E, R>
    ) => Effect.Effect<void, E | AssetError, R>
  }
>() {
  /** For tests, which provide their own source tree. */
  static readonly layerWithoutSource = Layer.effect(
    Assets,
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const { assetsDir } = yield* Settings
      const { root } = yield* SourceTree
      const buildingDir = path.join(assetsDir, ".building")

      const hashInputs = Effect.fnUntraced(function* (name: AssetName) {
        const base = yield* root
        return yield* Effect.mapError(contentHash(base, inputs[name], ignored), (cause) =>
          inputsUnreadable(name, cause)
        )
      })

      // Kept for the life of the process, which so boots with the sources of its first boot.
      const hashes = new Map<AssetName, string>()
      const inputsHash = (name: AssetName) =>
        Effect.suspend(() => {
          const known = hashes.get(name)
          return known === undefined
            ? Effect.tap(hashInputs(name), (hash) => Effect.sync(() => hashes.set(name, hash)))
            : Effect.succeed(known)
        })

      const directory = (name: AssetName) =>
        Effect.map(inputsHash(name), (hash) => path.join(assetsDir, `${name}-${hash.slice(0, 12)}`))

      const isBuilt = (dir: string) =>
        Effect.mapError(fs.exists(path.join(dir, manifestFile)), (cause) => storeUnreadable(assetsDir, cause))

      const file = (name: AssetName, file: string) =>
        Effect.flatMap(directory(name), (dir) =>
          Effect.flatMap(isBuilt(dir), (built) =>
            built ? Effect.succeed(path.join(dir, file)) : Effect.fail(assetMissing(name, dir))
          )
        )

      const sync = (target: string) =>
        Effect.scoped(Effect.flatMap(fs.open(target, { flag: "r" }), (handle) => handle.sync))

      /** Makes a finished directory an asset: syncs all files, writes the manifest, then renames the directory. */
      const publish = Effect.fnUntraced(function* (name: AssetName, hash: string, out: string, dir: string) {
        const names = (yield* fs.readDirectory(out)).sort(Order.string)
        const files = yield* Effect.forEach(names, (entry) =>
          Effect.gen(function* () {
            const target = path.join(out, entry)
            yield* sync(target)
            const { size } = yield* fs.stat(target)
            return [entry, { size: Number(size), sha256: yield* sha256File(fs, target) }] as const
          })
        )
        const manifest = new AssetManifest({
          format: 1,
          name,
          inputs: hash,
          builtAt: new Date().toISOString(),
          files: Object.fromEntries(files)
        })
        const manifestPath = path.join(out, manifestFile)
        yield* fs.writeFileString(manifestPath, Schema.encodeSync(ManifestJson)(manifest))
        yield* sync(manifestPath)
        yield* fs.remove(dir, { recursive: true, force: true })
        yield* fs.rename(out, dir)
      })

      /** Removes leftovers of killed builds. The caller holds the asset's lock, so no build uses them. */
      const removeLeftovers = Effect.fnUntraced(function* (name: AssetName) {
        const entries = yield* fs.readDirectory(buildingDir)
        const left = entries.filter((entry) => entry.startsWith(`${name}-`))
        yield* Effect.forEach(left, (entry) =>
          Effect.ignore(fs.remove(path.join(buildingDir, entry), { recursive: true, force: true }))
        )
      })

      const build = Effect.fn("Assets.build")(function* <E, R>(
        name: AssetName,
        make: (dirs: BuildDirectories) => Effect.Effect<void, E, R>
      ) {
        const hash = yield* inputsHash(name)
        const dir = yield* directory(name)
        const writing = Effect.mapError((cause: PlatformErrors.PlatformError) => storeUnwritable(assetsDir, cause))
        yield* HostLock.withLock(path.join(assetsDir, `.${name}.lock`), (cause) => storeUnwritable(assetsDir, cause))(
          Effect.gen(function* () {
            if (yield* isBuilt(dir)) return
            yield* writing(fs.makeDirectory(buildingDir, { recursive: true }))
            yield* writing(removeLeftovers(name))
            const staging = yield* writing(fs.makeTempDirectory({ directory: buildingDir, prefix: `${name}-` }))
            yield* Effect.gen(function* () {
              const dirs = { out: path.join(staging, "out"), work: path.join(staging, "work") }
              yield* writing(Effect.zipRight(fs.makeDirectory(dirs.out), fs.makeDirectory(dirs.work)))
              yield* make(dirs)
              // The sources changed during the build: the result may be of either state and must not be kept under this hash.
              if ((yield* hashInputs(name)) !== hash) return yield* inputsChanged(name)
              yield* writing(publish(name, hash, dirs.out, dir))
            }).pipe(Effect.ensuring(Effect.ignore(fs.remove(staging, { recursive: true, force: true }))))
          })
        )
      })

      const find = Effect.fn("Assets.find")(function* (name) {
        const dir = yield* directory(name)
        const text = yield* Effect.option(fs.readFileString(path.join(dir, manifestFile)))
        const manifest = Option.flatMap(text, Schema.decodeOption(ManifestJson))
        return Option.map(manifest, (manifest) => ({ dir, manifest }))
      })

      return Assets.of({
        kernel: file("kernel", "vmlinux"),
        init: file("programs", "init"),
        shim: file("programs", "machinen-shim"),
        share: file("programs", "machinen-share"),
        gvproxy: file("gvproxy", "gvproxy"),
        base: (name) => file(`base-${name}`, "base.ext4"),
        identity: (name) =>
          Effect.map(Effect.all([inputsHash(name), directory(name)]), ([inputs, dir]) => ({
            directory: path.basename(dir),
            inputs
          })),
        damaged: Effect.fn("Assets.damaged")(function* (name, { deep }) {
          const found = yield* find(name)
          if (Option.isNone(found)) return []
          const { dir, manifest } = found.value
          const files = Object.entries(manifest.files)
          const bad = yield* Effect.filter(files, ([file, expected]) =>
            Effect.gen(function* () {
              const target = path.join(dir, file)
              if (Number((yield* fs.stat(target)).size) !== expected.size) return true
              return deep && (yield* sha256File(fs, target)) !== expected.sha256
            }).pipe(Effect.orElseSucceed(() => true))
          )
          return bad.map(([file]) => path.join(dir, file))
        }),
        discard: (name) =>
          Effect.flatMap(directory(name), (dir) =>
            Effect.mapError(fs.remove(path.join(dir, manifestFile), { force: true }), (cause) =>
              storeUnwritable(assetsDir, cause)
            )
          ),
        find,
        build
      })
    })
  )

  static readonly layer = Assets.layerWithoutSource.pipe(Layer.provide(SourceTree.layer))
}

/** A built asset: its directory and its manifest. */
export interface FoundAsset {
  readonly dir: string
  readonly manifest: AssetManifest
}

/** The directories of a build: `out` becomes the asset, `work` is removed. */
export interface BuildDirectories {
  readonly out: string
  readonly work: string
}

const assetMissing = (name: AssetName, dir: string) =>
  new AssetError({
    code: "ASSET_MISSING",
    message: `the asset "${name}" is not built (${dir})`,
    hint: "run `machinen install` (in a checkout: `npm run setup`)"
  })

const inputsUnreadable = (name: AssetName, cause: Error) =>
  new AssetError({
    code: "ASSET_SOURCE_MISSING",
    message: `the sources of the asset "${name}" cannot be read: ${cause.message}`,
    hint: "is the checkout or the installed package complete?",
    cause
  })

const inputsChanged = (name: AssetName) =>
  new AssetError({
    code: "ASSET_BUILD_FAILED",
    message: `the sources of the asset "${name}" changed while it was built`,
    hint: "run it again"
  })

const storeUnreadable = (assetsDir: string, cause: Error) =>
  new AssetError({
    code: "ASSET_UNREADABLE",
    message: `the asset store cannot be read: ${cause.message}`,
    hint: `check who may look into ${assetsDir}, or set MACHINEN_ASSETS_STORE`,
    cause
  })

const storeUnwritable = (assetsDir: string, cause: Error) =>
  new AssetError({
    code: "ASSET_BUILD_FAILED",
    message: `the asset store cannot be written: ${cause.message}`,
    hint: `check the owner, the permissions and the free space of ${assetsDir}, or set MACHINEN_ASSETS_STORE`,
    cause
  })
