import { Effect, Option } from "effect"
import { AssetError } from "../errors.ts"
import type { AssetName } from "./Assets.ts"
import { isAtLeast, minimumGo, minimumNode, minimumRust, versionIn } from "./hostRequirements.ts"
import type { Step, StepTools } from "./setupStep.ts"

/** The step that looks for Node and for the compilers of the assets that are not built yet. */
export const toolchainStep = (
  nodeVersion: string,
  isBuilt: (name: AssetName) => Effect.Effect<boolean, AssetError>,
  { quick }: StepTools
): Step => {
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
  const hasNode = isAtLeast(nodeVersion, minimumNode)

  // Checked first, because it fails within a second. Otherwise a build would fail after minutes.
  return {
    id: "toolchain",
    title: "Node, Rust and Go",
    check: Effect.map(Effect.all([cargoWrong, goWrong]), (wrong) => hasNode && wrong.every(Option.isNone)),
    run: () =>
      Effect.gen(function* () {
        if (!hasNode) return yield* nodeTooOld(nodeVersion)
        const cargo = yield* cargoWrong
        if (Option.isSome(cargo)) return yield* cargoUnusable(cargo.value)
        const go = yield* goWrong
        if (Option.isSome(go)) return yield* goUnusable(go.value)
      })
  }
}

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
