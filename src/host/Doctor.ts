import * as path from "node:path"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Context, Effect, Layer, Option, Schema } from "effect"
import { HostProbe } from "../machine/HostProbe.ts"
import * as command from "../platform/command.ts"
import { given } from "../platform/given.ts"
import { Settings } from "../Settings.ts"
import { type AssetName, Assets, assetNames } from "./Assets.ts"
import {
  buildPackages,
  isAtLeast,
  minimumGo,
  minimumNode,
  minimumRust,
  type Packages,
  runPackages,
  versionIn
} from "./hostRequirements.ts"

/** One requirement of a host. `broken`: it is there but does not work. `optional`: VMs run without it, only slower. */
const Requirement = Schema.Struct({
  id: Schema.String,
  title: Schema.String,
  status: Schema.Literal("found", "missing", "broken"),
  optional: Schema.Boolean,
  version: Schema.optional(Schema.String),
  detail: Schema.optional(Schema.String),
  fix: Schema.optional(Schema.String)
})
export type Requirement = typeof Requirement.Type

/** What `machinen doctor --json` prints. `ok`: everything that is not optional was found. */
export const DoctorReport = Schema.Struct({
  format: Schema.Literal(1),
  ok: Schema.Boolean,
  requirements: Schema.Array(Requirement)
})
export type DoctorReport = typeof DoctorReport.Type

/** The arguments by which a program prints its version, where they are not `--version`. */
const versionArguments: Readonly<Record<string, ReadonlyArray<string>>> = {
  busybox: [],
  debugfs: ["-V"],
  e2fsck: ["-V"],
  mke2fs: ["-V"],
  mksquashfs: ["-version"],
  resize2fs: ["--help"]
}

/** A program of a Debian package, and the assets that need it to be built; none when running VMs needs it. */
interface Tool {
  readonly bin: string
  readonly package: string
  readonly builds: ReadonlyArray<AssetName>
}

const programsOf = (packages: Packages) =>
  Object.entries(packages).flatMap(([name, bins]) => bins.map((bin) => ({ bin, package: name })))
const runTools: ReadonlyArray<Tool> = programsOf(runPackages).map((tool) => ({ ...tool, builds: [] }))
const buildTools = new Map<string, Tool>()
for (const name of assetNames) {
  for (const { bin, package: from } of programsOf(buildPackages[name])) {
    if (runTools.some((tool) => tool.bin === bin)) continue
    buildTools.set(bin, { bin, package: from, builds: [...(buildTools.get(bin)?.builds ?? []), name] })
  }
}
const tools: ReadonlyArray<Tool> = [...runTools, ...buildTools.values()]

/** A program that does not print its version within this counts as broken. */
const versionTimeout = "10 seconds"

const GiB = 1024 ** 3
/** Free bytes for builds: the kernel's source tree and objects (2 GB), the bases and their staging. */
const spaceToBuild = 4 * GiB
/** Free bytes for the writable layers and memory files of a few VMs. */
const spaceToRun = 1 * GiB

const install = "run `machinen install` (in a checkout: `npm run setup`)"

/** Checks everything that VMs need from this host, by using it. Changes nothing and never fails: the report says what is wrong. */
export class Doctor extends Context.Tag("machinen/Doctor")<
  Doctor,
  { readonly examine: Effect.Effect<DoctorReport> }
>() {
  static readonly layerFor = (host: { readonly nodeVersion: string }) =>
    Layer.effect(
      Doctor,
      Effect.gen(function* () {
        const fs = yield* FileSystem.FileSystem
        const executor = yield* CommandExecutor.CommandExecutor
        const settings = yield* Settings
        const assets = yield* Assets
        const probe = yield* HostProbe

        const run = (argv: readonly [string, ...ReadonlyArray<string>]) =>
          command
            .run(argv, { LC_ALL: "C" })
            .pipe(Effect.provideService(CommandExecutor.CommandExecutor, executor), Effect.timeout(versionTimeout))

        const node: Requirement = {
          id: "node",
          title: "Node",
          optional: false,
          version: host.nodeVersion,
          ...(isAtLeast(host.nodeVersion, minimumNode)
            ? { status: "found" }
            : { status: "broken", detail: `older than ${minimumNode}`, fix: "install Node 20 or newer" })
        }

        /** Runs a program for its version. Some print it to stderr, some then end with code 1; codes from 126 on mean that it did not run. */
        const program = (bin: string, args: ReadonlyArray<string>, title: string, fix: string) =>
          run([bin, ...args]).pipe(
            Effect.map(({ code, stdout, stderr }): Requirement => {
              const text = stdout.trim() === "" ? stderr : stdout
              const version = code < 126 ? versionIn(text) : Option.none()
              return Option.match(version, {
                onNone: () => ({
                  id: bin,
                  title,
                  optional: false,
                  status: "broken",
                  detail: `\`${[bin, ...args].join(" ")}\` ended with code ${code}: ${firstLine(stderr)}`,
                  fix
                }),
                onSome: (version) => ({ id: bin, title, optional: false, status: "found", version })
              })
            }),
            Effect.catchAll((error): Effect.Effect<Requirement> => {
              const missing = error._tag === "SystemError" && error.reason === "NotFound"
              return Effect.succeed({
                id: bin,
                title,
                optional: false,
                status: missing ? "missing" : "broken",
                ...(missing ? {} : { detail: error.message }),
                fix
              })
            })
          )

        const cargo = Effect.map(
          program("cargo", ["--version"], "Rust", "install Rust from https://rustup.rs"),
          (found): Requirement =>
            found.version === undefined || isAtLeast(found.version, minimumRust)
              ? found
              : { ...found, status: "broken", detail: `older than ${minimumRust}`, fix: "rustup update stable" }
        )

        const go = Effect.map(
          program("go", ["version"], "Go", "install Go from https://go.dev/dl"),
          (found): Requirement =>
            found.version === undefined || isAtLeast(found.version, minimumGo)
              ? found
              : {
                  ...found,
                  status: "broken",
                  detail: `older than ${minimumGo}`,
                  fix: "install a newer Go from https://go.dev/dl"
                }
        )

        const asset = Effect.fnUntraced(
          function* (name: AssetName) {
            const about = { id: `asset-${name}`, title: `asset ${name}`, optional: false } as const
            const found = yield* assets.find(name)
            if (Option.isNone(found)) return { ...about, status: "missing", fix: install } satisfies Requirement
            const { dir, manifest } = found.value
            const wrong = yield* Effect.filter(Object.entries(manifest.files), ([file, { size }]) =>
              fs.stat(path.join(dir, file)).pipe(
                Effect.map((info) => Number(info.size) !== size),
                Effect.orElseSucceed(() => true)
              )
            )
            return wrong.length === 0
              ? ({
                  ...about,
                  status: "found",
                  version: manifest.inputs.slice(0, 12),
                  detail: dir
                } satisfies Requirement)
              : ({
                  ...about,
                  status: "broken",
                  detail: `${wrong.map(([file]) => file).join(", ")} in ${dir} is gone or not as it was built`,
                  fix: `rm -r ${dir}, then ${install}`
                } satisfies Requirement)
          },
          (effect, name) =>
            Effect.catchAll(
              effect,
              (error): Effect.Effect<Requirement> =>
                Effect.succeed({
                  id: `asset-${name}`,
                  title: `asset ${name}`,
                  optional: false,
                  status: "broken",
                  detail: error.message,
                  ...given({ fix: error.hint })
                })
            )
        )

        const kvm = Effect.gen(function* () {
          const about = { id: "kvm", title: "/dev/kvm", optional: true } as const
          const exists = yield* Effect.orElseSucceed(fs.exists("/dev/kvm"), () => false)
          if (!exists) {
            return {
              ...about,
              status: "missing",
              detail: "VMs are emulated, about ten times slower",
              fix: "use a machine with virtualisation, or switch on nested virtualisation for this one"
            } satisfies Requirement
          }
          const usable = yield* Effect.isSuccess(fs.access("/dev/kvm", { readable: true, writable: true }))
          return usable
            ? ({ ...about, status: "found" } satisfies Requirement)
            : ({
                ...about,
                status: "broken",
                detail: "this user may not open it",
                fix: "sudo usermod --append --groups kvm $USER, then log in again"
              } satisfies Requirement)
        })

        const accelerator = probe.accelerator.pipe(
          Effect.map(
            ({ accel, reason }): Requirement => ({
              id: "accelerator",
              title: "accelerator",
              optional: false,
              status: "found",
              version: accel,
              detail: reason
            })
          ),
          Effect.catchAll((error) =>
            Effect.succeed<Requirement>({
              id: "accelerator",
              title: "accelerator",
              optional: false,
              status: "broken",
              detail: error.message,
              fix: error.hint ?? install
            })
          )
        )

        /** The directory, or the nearest one above it that exists. */
        const existing = (dir: string): Effect.Effect<string> =>
          Effect.flatMap(
            Effect.orElseSucceed(fs.exists(dir), () => false),
            (found) => (found || path.dirname(dir) === dir ? Effect.succeed(dir) : existing(path.dirname(dir)))
          )

        const stateDirectory = Effect.gen(function* () {
          const about = { id: "state", title: "state directory", optional: false, detail: settings.home } as const
          const dir = yield* existing(settings.home)
          const written = yield* Effect.either(
            Effect.scoped(fs.makeTempDirectoryScoped({ directory: dir, prefix: ".machinen-doctor-" }))
          )
          return written._tag === "Right"
            ? ({ ...about, status: "found" } satisfies Requirement)
            : ({
                ...about,
                status: "broken",
                detail: written.left.message,
                fix: `give this user the directory ${dir}, or set MACHINEN_HOME`
              } satisfies Requirement)
        })

        const diskSpace = (everythingBuilt: boolean) =>
          Effect.gen(function* () {
            const about = { id: "disk", title: "disk space", optional: false } as const
            const dir = yield* existing(settings.assetsDir)
            const free = yield* run(["df", "--output=avail", "--block-size=1", dir]).pipe(
              Effect.map(({ stdout }) => Number(stdout.trim().split("\n").at(-1))),
              Effect.orElseSucceed(() => Number.NaN)
            )
            const needed = everythingBuilt ? spaceToRun : spaceToBuild
            if (!Number.isFinite(free)) {
              return {
                ...about,
                status: "broken",
                detail: `df cannot tell the free space of ${dir}`
              } satisfies Requirement
            }
            const detail = `${(free / GiB).toFixed(1)} GiB free in ${dir}`
            return free >= needed
              ? ({ ...about, status: "found", detail } satisfies Requirement)
              : ({
                  ...about,
                  status: "broken",
                  detail,
                  fix: `have ${needed / GiB} GiB free, or set MACHINEN_HOME and MACHINEN_CACHE_DIR to a larger disk`
                } satisfies Requirement)
          })

        return Doctor.of({
          examine: Effect.gen(function* () {
            const found = yield* Effect.all(
              {
                cargo,
                go,
                tools: Effect.forEach(
                  tools,
                  ({ bin, builds, package: name }) =>
                    Effect.map(
                      program(bin, versionArguments[bin] ?? ["--version"], bin, `apt-get install ${name}`),
                      (requirement) => ({ requirement, builds })
                    ),
                  { concurrency: 4 }
                ),
                assets: Effect.forEach(assetNames, asset),
                kvm,
                accelerator,
                stateDirectory
              },
              { concurrency: "unbounded" }
            )
            const built = assetNames.filter((_, at) => found.assets[at]?.status === "found")
            /** A requirement of builds is optional when all its assets are there: `install --from` may have fetched them. */
            const neededToBuild = (requirement: Requirement, assets: ReadonlyArray<AssetName>): Requirement =>
              requirement.status !== "found" && assets.length > 0 && assets.every((name) => built.includes(name))
                ? { ...requirement, optional: true, detail: `only builds ${assets.join(", ")}, which is there` }
                : requirement
            const disk = yield* diskSpace(found.assets.every(({ status }) => status === "found"))
            const requirements: ReadonlyArray<Requirement> = [
              node,
              neededToBuild(found.cargo, ["programs"]),
              neededToBuild(found.go, ["gvproxy"]),
              ...found.tools.map(({ builds, requirement }) => neededToBuild(requirement, builds)),
              ...found.assets,
              found.kvm,
              found.accelerator,
              found.stateDirectory,
              disk
            ]
            return {
              format: 1 as const,
              ok: requirements.every(({ optional, status }) => optional || status === "found"),
              requirements
            }
          }).pipe(Effect.withSpan("Doctor.examine"))
        })
      })
    )

  static readonly layer = Effect.sync(() => ({ nodeVersion: process.versions.node })).pipe(
    Effect.map(Doctor.layerFor),
    Layer.unwrapEffect
  )
}

const firstLine = (text: string) => text.trim().split("\n", 1)[0] ?? ""
