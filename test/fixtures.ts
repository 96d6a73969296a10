import { execFileSync, spawn } from "node:child_process"
import { createHash } from "node:crypto"
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import * as net from "node:net"
import * as path from "node:path"
import { assert } from "@effect/vitest"
import { Cause, Context, Effect, Either, Layer, Schedule, Schema, type Scope } from "effect"
import { Machinen } from "../src/Machinen.ts"
import type { BootOptions } from "../src/machine/BootOptions.ts"
import { VmEntry } from "../src/machine/VmEntry.ts"
import type { Vm } from "../src/vm/Vm.ts"
import { environment, leftovers, live, nothing, processesOf, temporaryDirectory, temporaryHome } from "./host.ts"

export * from "./host.ts"

/** Asserts, at the end of a test, that processes, sockets, files and names of its VMs are gone. */
export const assertNothingLeft = (home: string) => assert.deepStrictEqual(leftovers(home), nothing)

/**
 * Waits for a condition that has no event (the end of a process that is not our child, a file of another process). If it does not come true in
 * time, fails with the last value.
 */
export const eventually = <A>(what: string, look: () => A | undefined | false): Effect.Effect<A> =>
  Effect.suspend(() => {
    const found = look()
    return found === undefined || found === false ? Effect.fail("not yet" as const) : Effect.succeed(found)
  }).pipe(
    Effect.retry({ schedule: Schedule.spaced("5 millis") }),
    Effect.timeout("25 seconds"),
    Effect.orElse(() => Effect.dieMessage(`waited in vain for ${what}`))
  )

/** Like `eventually`, for what is there only for a moment. */
export const atOnce = (look: () => boolean): Effect.Effect<void> =>
  Effect.async((resume) => {
    let over = false
    const turn = () => (over ? undefined : look() ? resume(Effect.void) : void setImmediate(turn))
    turn()
    return Effect.sync(() => {
      over = true
    })
  })

/**
 * For tests that kill a process: asserts that all processes end by themselves, that the next command lists no VM, and that it leaves nothing on
 * disk.
 */
export const assertNothingLeftAfterNextCommand = (home: string) =>
  Effect.gen(function* () {
    yield* eventually(`the end of ${JSON.stringify(processesOf(home))}`, () => processesOf(home).length === 0)
    const { code, stdout } = yield* cli(home, ["ls", "--json"])
    assert.strictEqual(code, 0)
    assert.deepStrictEqual(JSON.parse(stdout), [])
    assertNothingLeft(home)
  })

/** For `afterEach`: waits for the shims' end. A program that attached to a VM learns of its end a moment before the shim itself ends. */
export const settled = (home: string): Promise<void> =>
  eventually(`the end of ${JSON.stringify(processesOf(home))}`, () => processesOf(home).length === 0).pipe(
    Effect.zipRight(Effect.sync(() => assertNothingLeft(home))),
    Effect.runPromise
  )

/** A VM that ends with the scope, of the image `micro` unless another is named. */
export const boot = (options: BootOptions = {}) =>
  Effect.map(
    Effect.flatMap(Machinen, (m) => m.boot({ image: "micro", ...options })),
    ({ vm }) => vm
  )

/** The ids of a home's VMs: directories that are being made or removed have other names. */
export const vmIds = (home: string): ReadonlyArray<string> =>
  leftovers(home).vms.filter((name) => /^[a-f][0-9a-f]{11}$/.test(name))

/** A VM's entry as it is on disk now; none where the VM is not there, or is gone. */
export const vmEntry = (home: string, id: string): VmEntry | undefined => {
  try {
    const json = readFileSync(path.join(home, "vms", id, "entry.json"), "utf8")
    return Either.getOrUndefined(Schema.decodeEither(Schema.parseJson(VmEntry))(json))
  } catch {
    return undefined
  }
}

/** One VM for all tests of a `layer`, which ends it. */
export class Guest extends Context.Tag("test/Guest")<Guest, Vm>() {}
export const guest = (home: string, options: BootOptions = {}) =>
  Layer.scoped(Guest, boot(options)).pipe(Layer.provideMerge(live(home)))

/** Where a bundle can be made: nothing is there yet. */
export const newBundle = (): string => path.join(temporaryDirectory(), "bundle")

export const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString()
export const sha256 = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex")
export const sha256OfFile = (file: string): string => sha256(readFileSync(file))
/** The sums of a flat directory's files, to be compared with those of another time. */
export const hashesOf = (dir: string): string =>
  execFileSync("sha256sum", readdirSync(dir).sort(), { cwd: dir, encoding: "utf8" })

/** A port of 127.0.0.1 that nobody listens on at this moment. */
export const freePort: Effect.Effect<number> = Effect.async((resume) => {
  const server = net.createServer().listen(0, "127.0.0.1", () => {
    const { port } = server.address() as net.AddressInfo
    server.close(() => resume(Effect.succeed(port)))
  })
})

/** Runs a shell script in the guest, asserts that it succeeds, and returns its stdout without the last newline. */
export const sh = (vm: Vm, script: string) =>
  Effect.map(vm.execRaw({ argv: ["sh", "-c", script] }), ({ exitCode, stderr, stdout }) => {
    assert.deepStrictEqual({ exitCode, stderr: text(stderr) }, { exitCode: 0, stderr: "" })
    return text(stdout).trimEnd()
  })

/** Waits in the guest for a condition of its shell that has no event for us. */
export const eventuallyIn = (vm: Vm, condition: string) =>
  Effect.filterOrFail(
    vm.execRaw(`tries=0; until ${condition}; do sleep 0.1; tries=$((tries + 1)); [ $tries -lt 300 ] || exit 1; done`),
    ({ exitCode }) => exitCode === 0,
    () => new Error(`waited in vain: ${condition}`)
  )

/** Writes an executable shell script below `dir` and returns its path. */
export const executable = (dir: string, name: string, body: string): string => {
  const file = path.join(dir, name)
  writeFileSync(file, `#!/bin/sh\n${body}\n`)
  chmodSync(file, 0o755)
  return file
}
/** A shell script in the place of a VMM. It is named like QEMU, so that `processesOf` finds it, and ignores its arguments. */
export const fakeVmm = (dir: string, name: string, body: string): string => executable(dir, `qemu-system-${name}`, body)
/** A shell command that runs until it is killed, without a child process. */
export const hang = (dir: string): string => {
  const fifo = path.join(dir, "never")
  if (!existsSync(fifo)) execFileSync("mkfifo", [fifo])
  return `read -r line <"${fifo}"`
}

/** Makes a root filesystem tarball of the host's static busybox. `mark` is in a file that distinguishes it from others. */
export const busyboxTarball = (dir: string, mark: string): string => {
  const tree = path.join(dir, `tree-${mark}`)
  for (const sub of ["bin", "dev", "etc", "proc", "sys", "tmp", "run", "root"]) {
    mkdirSync(path.join(tree, sub), { recursive: true })
  }
  execFileSync("cp", ["/bin/busybox", path.join(tree, "bin", "busybox")])
  for (const applet of ["sh", "cat", "echo", "ls", "df", "true", "sync"]) {
    execFileSync("ln", ["-sf", "busybox", path.join(tree, "bin", applet)])
  }
  writeFileSync(path.join(tree, "etc", "mark"), `${mark}\n`)
  const tarball = path.join(dir, `${mark}.tar.gz`)
  execFileSync("tar", ["--create", "--gzip", "--file", tarball, "--directory", tree, "."])
  rmSync(tree, { recursive: true })
  return tarball
}

/** The same root filesystem as an ext4 image. */
export const busyboxExt4 = (dir: string, mark: string): string => {
  const tarball = busyboxTarball(dir, mark)
  const tree = path.join(dir, `unpacked-${mark}`)
  mkdirSync(tree)
  execFileSync("tar", ["--extract", "--file", tarball, "--directory", tree])
  const image = path.join(dir, `${mark}.ext4`)
  execFileSync("mke2fs", ["-q", "-t", "ext4", "-d", tree, image, "64M"])
  rmSync(tree, { recursive: true })
  return image
}

/** Mounts a small file system that a test can fill. Needs root; the scope unmounts it. */
export const smallDisk = (size: string): Effect.Effect<string, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.sync(() => {
      const dir = temporaryDirectory()
      execFileSync("mount", ["-t", "tmpfs", "-o", `size=${size},mode=0700`, "tmpfs", dir])
      return dir
    }),
    (dir) =>
      Effect.sync(() => {
        execFileSync("umount", [dir])
        rmSync(dir, { recursive: true })
      })
  )

export interface CliResult {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
}

export interface CliOptions {
  readonly env?: Readonly<Record<string, string>>
  /** The whole input; `"open"`: no input and no end of file. */
  readonly stdin?: "open" | Uint8Array
}

export interface CliProcess {
  readonly args: ReadonlyArray<string>
  readonly pid: number
  readonly kill: (signal: NodeJS.Signals) => Effect.Effect<void>
  /** Completes when the output so far contains the text. */
  readonly printed: (text: string) => Effect.Effect<void>
  readonly result: Effect.Effect<CliResult>
  /** The output so far. */
  readonly sofar: () => string
}

/** Path of the bundled CLI (`npm run build`). */
export const cliPath = path.resolve(import.meta.dirname, "..", "dist", "cli.js")

/** Starts the bundled CLI as a user would. The scope kills it. */
export const startCli = (
  home: string,
  args: ReadonlyArray<string>,
  options: CliOptions = {}
): Effect.Effect<CliProcess, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.sync(() => {
      const child = spawn(process.execPath, [cliPath, ...args], {
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
      if (options.stdin !== "open") child.stdin.end(options.stdin ?? "")
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
      const all = () => `${text("stdout")}${text("stderr")}`
      const process_: CliProcess = {
        args,
        sofar: all,
        pid: child.pid ?? 0,
        kill: (signal) => Effect.sync(() => void child.kill(signal)),
        printed: (wanted) =>
          Effect.gen(function* () {
            yield* when(() => (all().includes(wanted) || result !== undefined ? true : undefined))
            if (!all().includes(wanted)) yield* Effect.dieMessage(`it ended without printing ${wanted}: ${all()}`)
          }),
        result: when(() => result)
      }
      return { child, process: process_ }
    }),
    ({ child }) => Effect.sync(() => void child.kill("SIGKILL"))
  ).pipe(Effect.map(({ process }) => process))

/** Runs the CLI to its end. */
export const cli = (home: string, args: ReadonlyArray<string>, options: CliOptions = {}): Effect.Effect<CliResult> =>
  startCli(home, args, options).pipe(
    Effect.flatMap((started) => inTime(home, started, started.result)),
    Effect.scoped
  )

/** Runs `machinen gc` for one home, with an empty cache: a test must not count or remove what other checkouts have left in the user's. */
export const collectGarbage = (home: string, ...flags: ReadonlyArray<string>): Effect.Effect<CliResult> =>
  Effect.suspend(() => cli(home, ["gc", "--json", ...flags], { env: { MACHINEN_CACHE_DIR: temporaryHome() } }))

/** Runs the CLI, which must succeed, and gives what it printed without the last newline. */
export const cliPrints = (home: string, ...args: ReadonlyArray<string>): Effect.Effect<string> =>
  Effect.map(cli(home, args), ({ code, stderr, stdout }) => {
    assert.strictEqual(code, 0, `${args.join(" ")}: ${stderr}`)
    return stdout.trim()
  })

/** Waits for something while the CLI runs. If it hangs, dies with the CLI's output and the leftovers, before the test's own time limit hides them. */
export const inTime = <A>(home: string, started: CliProcess, awaited: Effect.Effect<A>): Effect.Effect<A> =>
  Effect.timeoutFailCause(awaited, {
    duration: "45 seconds",
    onTimeout: () =>
      Cause.die(
        new Error(
          [`${started.args.join(" ")} hangs, having printed: ${started.sofar()}`, ...consolesOf(home)].join("\n")
        )
      )
  })

const consolesOf = (home: string): ReadonlyArray<string> =>
  leftovers(home).vms.map((name) => {
    const file = path.join(home, "vms", name, "console.log")
    return `${file}: ${existsSync(file) ? readFileSync(file, "utf8").slice(-1500) : "none"}`
  })
