import { Effect, Option } from "effect"
import { AssetError } from "../errors.ts"
import { type AssetName, assetNames } from "./Assets.ts"
import { debianReleases, packagesFor } from "./hostRequirements.ts"
import type { Step, StepTools } from "./setupStep.ts"

/** The step that installs the Debian packages that are missing. */
export const packagesStep = (
  { release, uid }: { readonly release: string; readonly uid: number },
  withTests: boolean,
  isBuilt: (name: AssetName) => Effect.Effect<boolean, AssetError>,
  { long, quick }: StepTools
): Step => {
  /** Debian packages that are not installed, of those that VMs, missing assets and, with `withTests`, tests need. */
  const missingPackages = Effect.gen(function* () {
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

  return {
    id: "packages",
    title: withTests ? "Debian packages, with those of tests" : "Debian packages",
    check: Effect.map(missingPackages, (missing) => missing.length === 0),
    run: (onLine) =>
      Effect.gen(function* () {
        const missing = yield* missingPackages
        if (uid !== 0) return yield* notRoot(missing)
        const options = { onLine, env: { DEBIAN_FRONTEND: "noninteractive", LC_ALL: "C" } }
        yield* long("update the package lists", ["apt-get", "update"], options)
        const unknown = yield* unavailable(missing)
        if (unknown.length > 0) return yield* packageUnavailable(unknown, release)
        yield* long("install packages", [...aptInstall, ...missing], options)
      })
  }
}

const aptInstall = ["apt-get", "install", "--yes", "--no-install-recommends"] as const

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
