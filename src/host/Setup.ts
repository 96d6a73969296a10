import * as path from "node:path"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Context, type Duration, Effect, Either, Layer, Option } from "effect"
import { AssetError } from "../errors.ts"
import * as command from "../platform/command.ts"
import * as HostLock from "../platform/HostLock.ts"
import * as lineLog from "../platform/lineLog.ts"
import * as streamCommand from "../platform/streamCommand.ts"
import { Settings } from "../Settings.ts"
import { type AssetName, Assets, assetNames, type BuildDirectories } from "./Assets.ts"
import {
  debianReleases,
  isAtLeast,
  minimumGo,
  minimumNode,
  minimumRust,
  packagesFor,
  versionIn
} from "./hostRequirements.ts"
import * as prebuiltAssets from "./prebuiltAssets.ts"
import { SourceTree } from "./SourceTree.ts"

export type StepId = "toolchain" | "packages" | AssetName

/** Events of a running set-up. Steps may run at the same time, so every event names its step. */
export type Progress =
  | { readonly _tag: "Skipped"; readonly step: StepId; readonly title: string }
  | { readonly _tag: "Started"; readonly step: StepId; readonly title: string }
  | { readonly _tag: "Line"; readonly step: StepId; readonly line: string }
  | { readonly _tag: "Done"; readonly step: StepId; readonly title: string; readonly elapsed: Duration.Duration }
  | { readonly _tag: "Failed"; readonly step: StepId; readonly title: string; readonly error: AssetError }

/** One step of set-up. `run` is called when `check` says that its result is missing. */
interface Step {
  readonly id: StepId
  readonly title: string
  readonly check: Effect.Effect<boolean, AssetError>
  readonly run: (onLine: (line: string) => Effect.Effect<void>) => Effect.Effect<void, AssetError>
}

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

        const quick = (argv: readonly [string, ...ReadonlyArray<string>]) =>
          command
            .run(argv, { LC_ALL: "C" })
            .pipe(Effect.provideService(CommandExecutor.CommandExecutor, executor), Effect.option)

        /** Runs a tool of a step; `what` completes "cannot ...". */
        const long = (
          what: string,
          argv: readonly [string, ...ReadonlyArray<string>],
          options: Parameters<typeof streamCommand.run>[1]
        ) =>
          streamCommand.run(argv, options).pipe(
            Effect.provideService(CommandExecutor.CommandExecutor, executor),
            Effect.mapError((cause) => buildFailed("compile the guest init and the shim", cause)),
            Effect.filterOrFail(
              ({ code }) => code === 0,
              ({ code, tail }) =>
                buildFailed(what, new Error([`${argv[0]} ended with code ${code}`, ...tail.slice(-15)].join("\n    ")))
            ),
            Effect.asVoid
          )

        const isBuilt = (name: AssetName) => Effect.map(assets.find(name), Option.isSome)

        /** The compiler that an asset lacks: nothing when the asset is there, or the compiler is new enough. */
        const compiler = (asset: AssetName, argv: readonly [string, ...ReadonlyArray<string>], minimum: string) =>
          Effect.gen(function* () {
            if (yield* isBuilt(asset)) return Option.none()
            const found = (yield* quick(argv)).pipe(
              Option.filter(({ code }) => code === 0),
              Option.flatMap(({ stdout }) => versionIn(stdout))
            )
            return Option.exists(found, (version) => isAtLeast(version, minimum)) ? Option.none() : Option.some(found)
          })
        const cargoWrong = compiler("programs", ["cargo", "--version"], minimumRust)
        const goWrong = compiler("gvproxy", ["go", "version"], minimumGo)
        const hasNode = isAtLeast(host.nodeVersion, minimumNode)

        // Checked first, because it fails within a second. Otherwise a build would fail after minutes.
        const toolchain: Step = {
          id: "toolchain",
          title: "Node, Rust and Go",
          check: Effect.map(Effect.all([cargoWrong, goWrong]), (wrong) => hasNode && wrong.every(Option.isNone)),
          run: () =>
            Effect.gen(function* () {
              if (!hasNode) return yield* nodeTooOld(host.nodeVersion)
              const cargo = yield* cargoWrong
              if (Option.isSome(cargo)) return yield* cargoUnusable(cargo.value)
              const go = yield* goWrong
              if (Option.isSome(go)) return yield* goUnusable(go.value)
            })
        }

        /** Debian packages that are not installed, of those that VMs, missing assets and, with `withTests`, tests need. */
        const missingPackages = (withTests: boolean) =>
          Effect.gen(function* () {
            const unbuilt = yield* Effect.filter(assetNames, (name) => isBuilt(name), { negate: true })
            const needed = packagesFor(unbuilt, { tests: withTests })
            // biome-ignore lint/suspicious/noTemplateCurlyInString: dpkg-query's own placeholders
            const format = "${Package} ${db:Status-Abbrev}\n"
            const answer = yield* quick(["dpkg-query", "--show", "--showformat", format, ...needed])
            // dpkg-query's exit code only says that some package is unknown.
            if (Option.isNone(answer)) return yield* notDebian
            const installed = new Set(
              answer.value.stdout.split("\n").flatMap((line) => {
                const [name, status] = line.split(" ")
                return name !== undefined && status === "ii" ? [name] : []
              })
            )
            return needed.filter((name) => !installed.has(name))
          })

        /** The packages that apt's sources do not have. */
        const unavailable = (names: ReadonlyArray<string>) =>
          Effect.gen(function* () {
            const answer = yield* quick(["apt-cache", "policy", ...names])
            const text = Option.match(answer, { onNone: () => "", onSome: ({ stdout }) => stdout })
            const available = new Set(
              [...text.matchAll(/^(\S+):\n(?: .*\n)*? +Candidate: (?!\(none\))/gm)].map(([, name]) => name)
            )
            return names.filter((name) => !available.has(name))
          })

        const packagesStep = (withTests: boolean): Step => ({
          id: "packages",
          title: withTests ? "Debian packages, with those of tests" : "Debian packages",
          check: Effect.map(missingPackages(withTests), (missing) => missing.length === 0),
          run: (onLine) =>
            Effect.gen(function* () {
              const missing = yield* missingPackages(withTests)
              if (host.uid !== 0) return yield* notRoot(missing)
              const options = { onLine, env: { DEBIAN_FRONTEND: "noninteractive", LC_ALL: "C" } }
              yield* long("update the package lists", ["apt-get", "update"], options)
              const unknown = yield* unavailable(missing)
              if (unknown.length > 0) return yield* packageUnavailable(unknown, host.release)
              yield* long("install packages", [...aptInstall, ...missing], options)
            })
        })

        const script =
          (name: string) =>
          ({ out, work }: BuildDirectories, onLine: (line: string) => Effect.Effect<void>) =>
            Effect.flatMap(root, (dir) => long(`run ${name}`, ["bash", path.join(dir, name), out, work], { onLine }))

        /** Compiles the Rust programs in the cache directory, so that a changed line does not compile every dependency again. */
        const programs = ({ out }: BuildDirectories, onLine: (line: string) => Effect.Effect<void>) =>
          Effect.gen(function* () {
            const target = path.join(settings.cacheDir, "cargo-target")
            const what = "compile the guest init and the shim"
            const options = {
              onLine,
              cwd: yield* root,
              env: { CARGO_TARGET_DIR: target, CARGO_TERM_COLOR: "never", CARGO_TERM_PROGRESS_WHEN: "never" }
            }
            // Cargo does not distinguish the packages of two checkouts in one target directory, and tells by file times what is fresh: it would
            // take another checkout's packages for ours.
            const own = ["archive", "channel", "guest", "shim"].flatMap((name) => ["--package", `machinen-${name}`])
            yield* long(
              "forget another checkout's programs",
              ["cargo", "clean", "--release", "--locked", "--target", triple, ...own],
              options
            )
            const wanted = ["guest", "shim"].flatMap((name) => [
              "--package",
              `machinen-${name}`,
              "--bin",
              `machinen-${name}`
            ])
            yield* long(what, ["cargo", "build", "--release", "--locked", ...wanted], options)
            const built = path.join(target, triple, "release")
            yield* Effect.forEach(
              [
                ["machinen-guest", "init"],
                ["machinen-shim", "machinen-shim"]
              ] as const,
              ([from, to]) =>
                Effect.zipRight(
                  fs.copyFile(path.join(built, from), path.join(out, to)),
                  fs.chmod(path.join(out, to), 0o755)
                )
            ).pipe(Effect.mapError((cause) => buildFailed("compile the guest init and the shim", cause)))
            // all checkouts compile there, into files of the same names
          }).pipe(
            HostLock.withLock(path.join(settings.cacheDir, "compile.lock"), (cause) =>
              buildFailed("compile the guest init and the shim", cause)
            )
          )

        /** Builds gvproxy static and in pure Go: with Go's own resolver and without libraries of the host. */
        const gvproxy = ({ out }: BuildDirectories, onLine: (line: string) => Effect.Effect<void>) =>
          Effect.gen(function* () {
            const argv = ["go", "build", "-trimpath", "-ldflags=-s -w", "-o", path.join(out, "gvproxy"), "."] as const
            const cwd = path.join(yield* root, "gvproxy")
            yield* long("compile gvproxy", argv, { onLine, cwd, env: { CGO_ENABLED: "0", GOFLAGS: "-mod=readonly" } })
          })

        const make: Record<AssetName, ReturnType<typeof script>> = {
          programs,
          gvproxy,
          kernel: script("kernel/build.sh"),
          "base-micro": script("bases/micro.sh"),
          "base-debian": script("bases/debian.sh")
        }

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

        const bringStep = (from: string, name: AssetName): Step => ({
          id: name,
          title: `${titles[name]} (from ${from})`,
          check: isBuilt(name),
          run: (onLine) =>
            prebuiltAssets.bring(from, name).pipe(
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
                  Effect.mapError(run(onLine), (error) => (printed ? toldIn(logFile, error) : error))
                )
                yield* onProgress({ _tag: "Done", step, title, elapsed })
              }).pipe(
                Effect.scoped,
                Effect.tapError((error) => onProgress({ _tag: "Failed", step, title, error }))
              )

            yield* Effect.forEach(assetNames, (name) => isSound(name, verify), { concurrency: 2 })
            // before the toolchain check: fetched assets need no toolchain
            if (from !== undefined) yield* Effect.forEach(assetNames, (name) => perform(bringStep(from, name)))
            yield* perform(toolchain)
            yield* perform(packagesStep(withTests))
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

/** The target triple, as in `.cargo/config.toml`, which `cargo clean` does not read. */
const triple = "x86_64-unknown-linux-gnu"

const aptInstall = ["apt-get", "install", "--yes", "--no-install-recommends"] as const

const buildFailed = (what: string, cause: Error) =>
  new AssetError({
    code: "ASSET_BUILD_FAILED",
    message: `cannot ${what}`,
    hint: "what was finished is kept, run it again to go on",
    cause
  })

const toldIn = (logFile: string, error: AssetError) => {
  const { cause, code, hint, message } = error
  if (code !== "ASSET_BUILD_FAILED") return error
  return new AssetError({ code, message, hint: `all that it printed is in ${logFile}; ${hint}`, cause })
}

const notRoot = (missing: ReadonlyArray<string>) =>
  new AssetError({
    code: "SETUP_NOT_ROOT",
    message: `${missing.length} Debian packages are missing and only root can install them`,
    hint: `sudo apt-get update && sudo ${aptInstall.join(" ")} ${missing.join(" ")}`
  })

const supported = Object.entries(debianReleases)
  .map(([name, { version }]) => `Debian ${version} (${name})`)
  .join(" and ")

const packageUnavailable = (names: ReadonlyArray<string>, release: string) => {
  const suites = Object.entries(debianReleases).find(([name]) => name === release)?.[1].suites
  return new AssetError({
    code: "SETUP_PACKAGE_UNAVAILABLE",
    message: `apt has no package ${names.join(", ")}`,
    hint:
      suites === undefined
        ? `set-up builds from packages of ${supported}; run it on one of these or in a container of it`
        : `add what is missing of the suites ${suites.join(" and ")}, component main, to apt's sources (/etc/apt/sources.list.d); Debian 12 has linux-source-6.12 in bookworm-security only`
  })
}

const notDebian = new AssetError({
  code: "SETUP_TOOL_MISSING",
  message: "dpkg-query cannot be run: this host does not look like Debian",
  hint: `set-up builds from packages of ${supported}; run it on one of these or in a container of it`
})

const nodeTooOld = (version: string) =>
  new AssetError({
    code: "SETUP_TOOL_MISSING",
    message: `Node ${version} is too old: ${minimumNode} or newer is needed`,
    hint: "install Node 20 or newer from nodejs.org or deb.nodesource.com"
  })

const goUnusable = (found: Option.Option<string>) =>
  new AssetError({
    code: "SETUP_TOOL_MISSING",
    message: Option.match(found, {
      onNone: () => "go is not on PATH or does not run",
      onSome: (version) => `Go ${version} is too old: ${minimumGo} or newer is needed`
    }),
    hint: "install Go from https://go.dev/dl (Debian's own is too old), and have its `bin` on PATH"
  })

const cargoUnusable = (found: Option.Option<string>) =>
  new AssetError({
    code: "SETUP_TOOL_MISSING",
    message: Option.match(found, {
      onNone: () => "cargo is not on PATH or does not run",
      onSome: (version) => `Rust ${version} is too old: ${minimumRust} or newer is needed`
    }),
    hint: Option.isNone(found)
      ? "install Rust from https://rustup.rs, then open a new shell (Debian's own cargo is too old)"
      : "rustup update stable"
  })
