import { mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import { ConfigProvider, Layer } from "effect"
import * as layers from "../src/runtime/layers.ts"

/** Set-up's assets and the host probe's findings are shared; everything a VM makes goes below `home`. */
export const environment = (home: string): Record<string, string> => ({
  MACHINEN_HOME: home,
  MACHINEN_ASSETS_STORE: process.env["MACHINEN_ASSETS_STORE"] ?? path.join(os.homedir(), ".machinen", "assets"),
  MACHINEN_CACHE_DIR: process.env["MACHINEN_CACHE_DIR"] ?? path.join(os.homedir(), ".cache", "machinen"),
  // Before the limit of a test, which would not show the console.
  MACHINEN_BOOT_TIMEOUT: "40 seconds"
})

/** A new directory with a short path, below the test run's own. */
export const temporaryDirectory = (): string =>
  mkdtempSync(path.join(process.env["MACHINEN_TEST_TMP"] ?? os.tmpdir(), "mn-"))

const homes: Array<string> = []
process.once("exit", () => {
  for (const home of homes) rmSync(home, { recursive: true, force: true })
})

/** A state directory of its own, with a path short enough for sockets; gone with the test run, or with the process outside of one. */
export const temporaryHome = (): string => {
  const dir = temporaryDirectory()
  homes.push(dir)
  return dir
}

/** The whole program on real guests, with the settings given. */
export const live = (
  home: string,
  overrides: Readonly<Record<string, string>> = {},
  program: typeof layers.layerWithoutReconcile = layers.layer
) =>
  Layer.provide(
    program,
    Layer.setConfigProvider(
      ConfigProvider.fromMap(new Map(Object.entries({ ...environment(home), ...overrides })), { pathDelim: "_" })
    )
  )

/** Processes that mention a path on their command line or in their environment, or have a file open below it: shims, VMMs and gvproxies of that home. */
export const processesOf = (home: string): ReadonlyArray<{ readonly pid: number; readonly argv: string }> =>
  readdirSync("/proc")
    .filter((entry) => /^[0-9]+$/.test(entry))
    .flatMap((pid) => {
      try {
        const argv = readFileSync(`/proc/${pid}/cmdline`, "utf8").replaceAll("\0", " ")
        const open = readdirSync(`/proc/${pid}/fd`).some((fd) => {
          try {
            return readlinkSync(`/proc/${pid}/fd/${fd}`).startsWith(`${home}/`)
          } catch {
            return false
          }
        })
        const ours = ["machinen-shim", "qemu-system", "gvproxy -mtu"].some((program) => argv.includes(program))
        const serves = () => readFileSync(`/proc/${pid}/environ`, "utf8").includes(`MACHINEN_VM_DIR=${home}/`)
        return ours && (argv.includes(home) || open || serves()) ? [{ pid: Number(pid), argv }] : []
      } catch {
        return []
      }
    })

/** What is left of VMs below a home; empty lists are what every test wants at its end. */
export const leftovers = (home: string) => ({
  processes: processesOf(home).map((p) => p.argv.slice(0, 200)),
  vms: names(path.join(home, "vms")),
  names: names(path.join(home, "names"))
})
export const nothing = { processes: [], vms: [], names: [] }

const names = (dir: string): ReadonlyArray<string> => {
  try {
    return readdirSync(dir)
  } catch {
    return []
  }
}
