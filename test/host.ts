import { mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import { ConfigProvider, Layer } from "effect"
import * as layers from "../src/runtime/layers.ts"

/** Environment for tests: everything that a VM makes is below `home`; set-up's assets and the host probe's findings are shared. */
export const environment = (home: string): Record<string, string> => ({
  MACHINEN_HOME: home,
  MACHINEN_ASSETS_STORE: process.env["MACHINEN_ASSETS_STORE"] ?? path.join(os.homedir(), ".machinen", "assets"),
  MACHINEN_CACHE_DIR: process.env["MACHINEN_CACHE_DIR"] ?? path.join(os.homedir(), ".cache", "machinen"),
  // shorter than the time limit of a test, which would not show the console
  MACHINEN_BOOT_TIMEOUT: "40 seconds"
})

/** Makes a directory with a short path, below the test run's own. */
export const temporaryDirectory = (): string =>
  mkdtempSync(path.join(process.env["MACHINEN_TEST_TMP"] ?? os.tmpdir(), "mn-"))

const homes: Array<string> = []
process.once("exit", () => {
  for (const home of homes) rmSync(home, { recursive: true, force: true })
})

/** Makes a state directory whose path is short enough for sockets. It is removed with the test run, or outside of one with the process. */
export const temporaryHome = (): string => {
  const dir = temporaryDirectory()
  homes.push(dir)
  return dir
}

/** All real services, with these settings. */
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

export interface HostProcess {
  readonly pid: number
  readonly argv: ReadonlyArray<string>
  readonly environment: ReadonlyArray<string>
}

/** All processes of this host that we may look at. */
export const hostProcesses = (): ReadonlyArray<HostProcess> =>
  readdirSync("/proc")
    .filter((entry) => /^[0-9]+$/.test(entry))
    .flatMap((pid) => {
      const list = (file: string) => readFileSync(`/proc/${pid}/${file}`, "utf8").replace(/\0$/, "").split("\0")
      try {
        return [{ pid: Number(pid), argv: list("cmdline"), environment: list("environ") }]
      } catch {
        return [] // it has ended
      }
    })

/** Whether a process has a file open below a directory; one that has ended has none. */
const hasOpen = (pid: number, dir: string): boolean => {
  try {
    return readdirSync(`/proc/${pid}/fd`).some((fd) => {
      try {
        return readlinkSync(`/proc/${pid}/fd/${fd}`).startsWith(`${dir}/`)
      } catch {
        return false
      }
    })
  } catch {
    return false
  }
}

/**
 * Processes of a home (shims, VMMs, gvproxies and servers of shared files): those that have its path in their command line or environment, or a file open below it.
 */
export const processesOf = (home: string): ReadonlyArray<{ readonly pid: number; readonly argv: string }> =>
  hostProcesses()
    .map(({ argv, environment, pid }) => ({ argv: argv.join(" "), environment, pid }))
    .filter(({ argv }) =>
      ["machinen-shim", "machinen-share", "qemu-system", "gvproxy -mtu"].some((program) => argv.includes(program))
    )
    .filter(
      ({ argv, environment, pid }) =>
        argv.includes(home) ||
        environment.some((variable) => variable.startsWith(`MACHINEN_VM_DIR=${home}/`)) ||
        hasOpen(pid, home)
    )
    .map(({ argv, pid }) => ({ pid, argv }))

/** Processes and files that are left of the VMs of a home. After a test all lists must be empty. */
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
