import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import type { AssetError } from "../errors.ts"
import * as HostLock from "../platform/HostLock.ts"
import type { AssetName, BuildDirectories } from "./Assets.ts"
import { buildFailed, type OnLine, type StepTools } from "./setupStep.ts"

/** Makes an asset's files in `out`. */
export type AssetBuild = (dirs: BuildDirectories, onLine: OnLine) => Effect.Effect<void, AssetError>

/** How each asset is made from the sources. */
export const assetBuilds = (
  fs: FileSystem.FileSystem,
  cacheDir: string,
  root: Effect.Effect<string, AssetError>,
  { long }: StepTools
): Record<AssetName, AssetBuild> => {
  const script =
    (name: string) =>
    ({ out, work }: BuildDirectories, onLine: OnLine) =>
      Effect.flatMap(root, (dir) => long(`run ${name}`, ["bash", path.join(dir, name), out, work], { onLine }))

  const compile = "compile the guest init, the shim and the file server"

  /** Compiles the Rust programs in the cache directory, so that a changed line does not compile every dependency again. */
  const programs = ({ out }: BuildDirectories, onLine: OnLine) =>
    Effect.gen(function* () {
      const target = path.join(cacheDir, "cargo-target")
      const options = {
        onLine,
        cwd: yield* root,
        env: { CARGO_TARGET_DIR: target, CARGO_TERM_COLOR: "never", CARGO_TERM_PROGRESS_WHEN: "never" }
      }
      // Cargo does not distinguish the packages of two checkouts in one target directory, and tells by file times what is fresh: it would
      // take another checkout's packages for ours.
      const own = ["archive", "channel", "guest", "protocol", "share", "shim"].flatMap((name) => [
        "--package",
        `machinen-${name}`
      ])
      yield* long(
        "forget another checkout's programs",
        ["cargo", "clean", "--release", "--locked", "--target", triple, ...own],
        options
      )
      const wanted = ["guest", "shim", "share"].flatMap((name) => [
        "--package",
        `machinen-${name}`,
        "--bin",
        `machinen-${name}`
      ])
      yield* long(compile, ["cargo", "build", "--release", "--locked", ...wanted], options)
      const built = path.join(target, triple, "release")
      yield* Effect.forEach(
        [
          ["machinen-guest", "init"],
          ["machinen-shim", "machinen-shim"],
          ["machinen-share", "machinen-share"]
        ] as const,
        ([from, to]) =>
          Effect.zipRight(fs.copyFile(path.join(built, from), path.join(out, to)), fs.chmod(path.join(out, to), 0o755))
      ).pipe(Effect.mapError((cause) => buildFailed(compile, cause)))
      // all checkouts compile there, into files of the same names
    }).pipe(HostLock.withLock(path.join(cacheDir, "compile.lock"), (cause) => buildFailed(compile, cause)))

  /** Builds gvproxy static and in pure Go: with Go's own resolver and without libraries of the host. */
  const gvproxy = ({ out }: BuildDirectories, onLine: OnLine) =>
    Effect.gen(function* () {
      const argv = ["go", "build", "-trimpath", "-ldflags=-s -w", "-o", path.join(out, "gvproxy"), "."] as const
      const cwd = path.join(yield* root, "gvproxy")
      yield* long("compile gvproxy", argv, { onLine, cwd, env: { CGO_ENABLED: "0", GOFLAGS: "-mod=readonly" } })
    })

  return {
    programs,
    gvproxy,
    kernel: script("kernel/build.sh"),
    "base-micro": script("bases/micro.sh"),
    "base-debian": script("bases/debian.sh")
  }
}

/** The target triple, as in `.cargo/config.toml`, which `cargo clean` does not read. */
const triple = "x86_64-unknown-linux-gnu"
