import * as path from "node:path"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Context, type Duration, Effect, Either, Layer, Option } from "effect"
import { AssetError } from "../errors.ts"
import * as lineLog from "../platform/lineLog.ts"
import { Settings } from "../Settings.ts"
import { type AssetName, Assets, assetNames } from "./Assets.ts"
import { assetBuilds } from "./assetBuilds.ts"
import { packagesStep } from "./debianPackages.ts"
import * as prebuiltAssets from "./prebuiltAssets.ts"
import { SourceTree } from "./SourceTree.ts"
import { makeStepTools, type Step, type StepId } from "./setupStep.ts"
import { toolchainStep } from "./toolchain.ts"

/** Events of a running set-up. Steps may run at the same time, so every event names its step. */
export type Progress =
  | { readonly _tag: "Skipped"; readonly step: StepId; readonly title: string }
  | { readonly _tag: "Started"; readonly step: StepId; readonly title: string }
  | { readonly _tag: "Line"; readonly step: StepId; readonly line: string }
  | { readonly _tag: "Done"; readonly step: StepId; readonly title: string; readonly elapsed: Duration.Duration }
  | { readonly _tag: "Failed"; readonly step: StepId; readonly title: string; readonly error: AssetError }

/** Options of set-up. */
export interface SetupOptions {
  /** Another host's asset store, a directory or a URL. Assets that it has for the present sources are fetched instead of built. */
  readonly from?: string
  /** True: compares the content of existing assets, not only file sizes, and builds damaged ones again. Default false. */
  readonly verify?: boolean
  /** True: also installs what tests and benches need, and what builds need even when every asset is there. Default false. */
  readonly withTests?: boolean
}

/** The user and the host of a set-up. */
export interface SetupHost {
  readonly uid: number
  readonly nodeVersion: string
  /** The code name in /etc/os-release; empty when it has none. */
  readonly release: string
}

const titles: Record<AssetName, string> = {
  programs: "guest init and shim (cargo)",
  gvproxy: "network of guests (go)",
  kernel: "guest kernel",
  "base-micro": "base image micro",
  "base-debian": "base image debian"
}

/**
 * Makes this host ready to boot VMs: installs packages, then builds the assets. Existing results are kept, so set-up may be run at any time,
 * and continues after a failure.
 */
export class Setup extends Context.Tag("machinen/Setup")<
  Setup,
  {
    /** Runs all steps that can still succeed after a failure, then fails with the first error. */
    readonly run: (
      onProgress: (event: Progress) => Effect.Effect<void>,
      options?: SetupOptions
    ) => Effect.Effect<void, AssetError>
  }
>() {
  static readonly layerFor = (host: SetupHost) =>
    Layer.effect(
      Setup,
      Effect.gen(function* () {
        const fs = yield* FileSystem.FileSystem
        const executor = yield* CommandExecutor.CommandExecutor
        const settings = yield* Settings
        const assets = yield* Assets
        const { root } = yield* SourceTree
        const tools = makeStepTools(executor)
        const isBuilt = (name: AssetName) => Effect.map(assets.find(name), Option.isSome)
        const make = assetBuilds(fs, settings.cacheDir, root, tools)

        /** Whether an asset is there and undamaged. A damaged one is discarded. */
        const isSound = (name: AssetName, deep: boolean) =>
          Effect.gen(function* () {
            const damaged = yield* assets.damaged(name, { deep })
            if (damaged.length > 0) {
              yield* Effect.logWarning(`not what they were when they were built: ${damaged.join(", ")}`)
              yield* assets.discard(name)
            }
            return yield* isBuilt(name)
          })

        const assetStep = (name: AssetName): Step => ({
          id: name,
          title: titles[name],
          check: isBuilt(name),
          run: (onLine) => assets.build(name, (dirs) => make[name](dirs, onLine))
        })

        const prebuiltStep = (from: string, name: AssetName): Step => ({
          id: name,
          title: `${titles[name]} (from ${from})`,
          check: isBuilt(name),
          run: (onLine) =>
            prebuiltAssets.fetchAsset(from, name).pipe(
              Effect.provideService(Assets, assets),
              Effect.provideService(FileSystem.FileSystem, fs),
              Effect.flatMap((brought) =>
                brought ? Effect.void : onLine("it is not there for these sources; it is built here")
              )
            )
        })

        return Setup.of({
          run: Effect.fn("Setup.run")(function* (onProgress, { from, verify = false, withTests = false } = {}) {
            const perform = ({ id: step, title, check, run }: Step) =>
              Effect.gen(function* () {
                if (yield* check) return yield* onProgress({ _tag: "Skipped", step, title })
                yield* onProgress({ _tag: "Started", step, title })
                const logFile = path.join(settings.cacheDir, "setup", `${step}.log`)
                const log = yield* lineLog.make(fs, logFile)
                let printed = false
                const onLine = (line: string) => {
                  printed = true
                  return Effect.zipRight(log(line), onProgress({ _tag: "Line", step, line }))
                }
                const [elapsed] = yield* Effect.timed(
                  Effect.mapError(run(onLine), (error) => (printed ? withLogFile(logFile, error) : error))
                )
                yield* onProgress({ _tag: "Done", step, title, elapsed })
              }).pipe(
                Effect.scoped,
                Effect.tapError((error) => onProgress({ _tag: "Failed", step, title, error }))
              )

            yield* Effect.forEach(assetNames, (name) => isSound(name, verify), { concurrency: 2 })
            // before the toolchain check: fetched assets need no toolchain
            if (from !== undefined) yield* Effect.forEach(assetNames, (name) => perform(prebuiltStep(from, name)))
            yield* perform(toolchainStep(host.nodeVersion, isBuilt, tools))
            yield* perform(packagesStep(host, withTests, isBuilt, tools))
            // In parallel: a base uses one thread and a download, the kernel the rest. If a mirror is down, the kernel is built all the same.
            const ended = yield* Effect.forEach(assetNames, (name) => Effect.either(perform(assetStep(name))), {
              concurrency: "unbounded"
            })
            const failed = ended.find(Either.isLeft)
            if (failed !== undefined) return yield* failed.left
          })
        })
      })
    )

  static readonly layer = Effect.gen(function* () {
    const fs = yield* FileSystem.FileSystem
    const about = yield* Effect.orElseSucceed(fs.readFileString("/etc/os-release"), () => "")
    return Setup.layerFor({
      uid: process.getuid?.() ?? -1,
      nodeVersion: process.versions.node,
      release: /^VERSION_CODENAME="?([a-z]+)/m.exec(about)?.[1] ?? ""
    })
  }).pipe(Layer.unwrapEffect, Layer.provide(SourceTree.layer))
}

const withLogFile = (logFile: string, error: AssetError) => {
  const { cause, code, hint, message } = error
  if (code !== "ASSET_BUILD_FAILED") return error
  return new AssetError({ code, message, hint: `all that it printed is in ${logFile}; ${hint}`, cause })
}
