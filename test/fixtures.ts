import { spawn } from "node:child_process"
import { mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import { ConfigProvider, Effect, Layer, type Scope } from "effect"
import * as layers from "../src/runtime/layers.ts"

/** Set-up's assets and the host probe's findings are shared; everything a VM makes goes below `home`. */
export const environment = (home: string): Record<string, string> => ({
  MACHINEN_HOME: home,
  MACHINEN_ASSETS_STORE: process.env["MACHINEN_ASSETS_STORE"] ?? path.join(os.homedir(), ".machinen", "assets"),
  MACHINEN_CACHE_DIR: process.env["MACHINEN_CACHE_DIR"] ?? path.join(os.homedir(), ".cache", "machinen")
})

/** A state directory of its own, with a path short enough for sockets; gone with the process. */
export const temporaryHome = (): string => {
  const dir = mkdtempSync(path.join(os.tmpdir(), "mn-"))
  process.on("exit", () => rmSync(dir, { recursive: true, force: true }))
  return dir
}

/** The whole program on real guests, with the settings given. */
export const live = (home: string, overrides: Readonly<Record<string, string>> = {}) =>
  layers.layer.pipe(
    Layer.provide(
      Layer.setConfigProvider(
        ConfigProvider.fromMap(new Map(Object.entries({ ...environment(home), ...overrides })), { pathDelim: "_" })
      )
    )
  )

/** Processes that mention a path on their command line or hold it open as their plan: shims and VMMs of that home. */
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
        const ours = argv.includes("machinen-shim") || argv.includes("qemu-system")
        return ours && (argv.includes(home) || open) ? [{ pid: Number(pid), argv }] : []
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

export interface CliResult {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
}

export interface CliProcess {
  readonly pid: number
  readonly kill: (signal: NodeJS.Signals) => Effect.Effect<void>
  /** Completes when its output so far contains the text. */
  readonly printed: (text: string) => Effect.Effect<void>
  readonly result: Effect.Effect<CliResult>
}

const root = path.resolve(import.meta.dirname, "..")

/** Starts the bundled CLI as a user would; killed with the scope. */
export const startCli = (
  home: string,
  args: ReadonlyArray<string>,
  options: { readonly env?: Readonly<Record<string, string>>; readonly stdin?: string | Uint8Array } = {}
): Effect.Effect<CliProcess, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.sync(() => {
      const child = spawn(process.execPath, [path.join(root, "dist", "cli.js"), ...args], {
        env: { ...process.env, ...environment(home), ...options.env },
        stdio: ["pipe", "pipe", "pipe"]
      })
      const chunks: { stdout: Array<Buffer>; stderr: Array<Buffer> } = { stdout: [], stderr: [] }
      const listeners = new Set<() => void>()
      const collect = (channel: "stdout" | "stderr") =>
        child[channel].on("data", (chunk: Buffer) => {
          chunks[channel].push(chunk)
          for (const listener of listeners) listener()
        })
      collect("stdout")
      collect("stderr")
      child.stdin.on("error", () => {})
      child.stdin.end(options.stdin ?? "")
      const text = (channel: "stdout" | "stderr") => Buffer.concat(chunks[channel]).toString()
      let result: CliResult | undefined
      child.on("close", (code, signal) => {
        result = { code, signal, stdout: text("stdout"), stderr: text("stderr") }
        for (const listener of listeners) listener()
      })
      const when = <A>(look: () => A | undefined): Effect.Effect<A> =>
        Effect.async((resume) => {
          const attempt = () => {
            const found = look()
            if (found === undefined) return
            listeners.delete(attempt)
            resume(Effect.succeed(found))
          }
          listeners.add(attempt)
          attempt()
          return Effect.sync(() => listeners.delete(attempt))
        })
      const process_: CliProcess = {
        pid: child.pid ?? 0,
        kill: (signal) => Effect.sync(() => void child.kill(signal)),
        printed: (wanted) => when(() => (`${text("stdout")}${text("stderr")}`.includes(wanted) ? true : undefined)),
        result: when(() => result)
      }
      return { child, process: process_ }
    }),
    ({ child }) => Effect.sync(() => void child.kill("SIGKILL"))
  ).pipe(Effect.map(({ process }) => process))

/** Runs the CLI to its end. */
export const cli = (
  home: string,
  args: ReadonlyArray<string>,
  options: { readonly env?: Readonly<Record<string, string>>; readonly stdin?: string | Uint8Array } = {}
): Effect.Effect<CliResult> => Effect.scoped(Effect.flatMap(startCli(home, args, options), (started) => started.result))
