import { execFileSync } from "node:child_process"
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import { PassThrough } from "node:stream"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Config, Context, Effect, Layer, Queue, Stream } from "effect"
import * as Fake from "../../../backends/fake/Fake.ts"
import { ExecError } from "../../../src/errors.ts"
import { Agent, type AgentClient } from "../../../src/guest/Agent.ts"
import type { CommandOutput } from "../../../src/guest/Exec.ts"
import { Machinen } from "../../../src/Machinen.ts"
import { ExitStatus } from "../../../src/machine/MachineSpec.ts"
import { Registry } from "../../../src/machine/Registry.ts"
import { Shim } from "../../../src/machine/Shim.ts"
import * as facade from "../../../src/promise.ts"
import { Settings } from "../../../src/Settings.ts"
import { FileHasher } from "../../../src/snapshot/FileHasher.ts"
import { SnapshotEngines } from "../../../src/snapshot/SnapshotEngine.ts"
import { temporaryDirectory } from "../../fixtures.ts"

/** The API over a fake host; `lives`: how often the services were built and released. */
const client = async (change: (agent: AgentClient) => Partial<AgentClient> = () => ({})) => {
  const home = temporaryDirectory()
  const host = await Effect.runPromise(Effect.scoped(Layer.build(Fake.layer)))
  const fake = Context.get(host, Fake.Fake)
  const agent = Context.get(host, Agent)
  const scripted = Agent.of({
    ...agent,
    client: (socket) => ({ ...agent.client(socket), ...change(agent.client(socket)) })
  })
  const lives: Array<string> = []
  const lifetime = Layer.scopedDiscard(
    Effect.acquireRelease(
      Effect.sync(() => void lives.push("built")),
      () => Effect.sync(() => void lives.push("released"))
    )
  )
  const services = Machinen.layer.pipe(
    Layer.provide(Layer.mergeAll(FileHasher.layer, Layer.succeed(SnapshotEngines, new Map()))),
    Layer.provide(Layer.mergeAll(Registry.layer, Shim.layer, lifetime)),
    Layer.provide(Layer.succeedContext(Context.add(host, Agent, scripted))),
    Layer.provide(Settings.layerTest(home)),
    Layer.provide(NodeContext.layer)
  )
  const left = () =>
    ["vms", "names"].flatMap((dir) => (existsSync(path.join(home, dir)) ? readdirSync(path.join(home, dir)) : []))
  return { ...facade.make(services), fake, lives, left, run: Effect.runPromise }
}

const rejection = async (promise: Promise<unknown>): Promise<unknown> => {
  try {
    await promise
  } catch (error) {
    return error
  }
  throw new Error("it did not reject")
}
const codeOf = (error: unknown) => (facade.isMachinenError(error) ? error.code : error)

/** A guest whose main command prints what it is told to, until it is told to end. */
const talker = async () => {
  const queue = await Effect.runPromise(Queue.unbounded<CommandOutput>())
  const heard: Array<string> = []
  const given = await client(() => ({
    startMain: (stdin) =>
      Effect.gen(function* () {
        if (stdin !== undefined)
          yield* Effect.forkScoped(
            Stream.runForEach(stdin, (bytes) => Effect.sync(() => void heard.push(Buffer.from(bytes).toString())))
          )
        const exit = Effect.succeed(new ExitStatus({ code: 0, signal: null, oomKilled: false }))
        return { pid: 1, output: Stream.fromQueue(queue), exit, signal: () => Effect.void, detach: Effect.void }
      })
  }))
  const vm = await given.boot({ image: "micro", cmd: ["talk"] })
  const say = (channel: CommandOutput["channel"], bytes: string | Buffer) =>
    Effect.runPromise(Queue.offer(queue, { channel, bytes: Buffer.from(bytes) }))
  const finish = () => Effect.runPromise(Queue.shutdown(queue))
  return { ...given, vm, say, finish, heard }
}

const until = async (what: string, look: () => boolean | Promise<boolean>) => {
  for (const began = Date.now(); !(await look()); await new Promise((resolve) => setImmediate(resolve))) {
    if (Date.now() - began > 5000) throw new Error(`waited in vain for ${what}`)
  }
}

describe("services", () => {
  it("are built on first use, shared, and released when nothing uses them", async () => {
    const { boot, fake, left, list, lives, run } = await client()
    assert.deepStrictEqual(lives, [])
    const [one, two] = await Promise.all([boot(), boot({ name: "two" })])
    await list()
    assert.deepStrictEqual(lives, ["built"])
    await Promise.all([one.kill(), two.stop()])
    assert.deepStrictEqual(lives, ["built", "released"])
    assert.sameMembers(
      [...(await run(fake.events))],
      [..."-+"]
        .flatMap((c) => [`launch${c}`, `listen${c}`])
        .flatMap((e) => [e, e])
        .concat("kill", "stop")
    )
    assert.deepStrictEqual(left(), [])
    await list()
    assert.deepStrictEqual(lives, ["built", "released", "built", "released"])
  })

  it("that cannot be built reject each call, as an error of ours", async () => {
    const { list } = facade.make(
      Layer.effect(Machinen, Effect.andThen(Config.number("MACHINEN_NO_SUCH"), Effect.never))
    )
    for (let turn = 0; turn < 2; turn++) {
      const error = await rejection(list())
      assert.instanceOf(error, facade.BootError)
      assert.strictEqual(codeOf(error), "BOOT_OPTION_INVALID")
      assert.include(String(error), "MACHINEN_NO_SUCH")
    }
  })
})

describe("boot", () => {
  const failing: ReadonlyArray<readonly [Fake.Step, facade.ErrorCode]> = [
    ["image", "BOOT_IMAGE_NOT_FOUND"],
    ["listen", "EXEC_AGENT_UNAVAILABLE"],
    ["launch", "BOOT_VMM_FAILED"],
    ["doorbell", "EXEC_PROTOCOL"]
  ]
  for (const [step, code] of failing) {
    it(`that fails at ${step} rejects with the error itself, everything released`, async () => {
      const { boot, fake, left, lives, run } = await client()
      await run(fake.when(step, "fail"))
      const error = await rejection(boot({ name: "web" }))
      assert.isTrue(facade.isMachinenError(error, code))
      assert.isTrue(error instanceof (code.startsWith("BOOT") ? facade.BootError : facade.ExecError))
      assert.deepStrictEqual([left(), lives.at(-1)], [[], "released"])
    })
  }

  for (const step of ["image", "launch", "doorbell"] as const) {
    it(`that is aborted at ${step} rejects with the reason, everything released`, async () => {
      const { boot, fake, left, lives, run } = await client()
      await run(fake.when(step, "hang"))
      const abort = new AbortController()
      const booting = rejection(boot({ name: "web", signal: abort.signal }))
      await run(fake.reached(step))
      const reason = new Error("changed my mind")
      abort.abort(reason)
      assert.strictEqual(await booting, reason)
      assert.deepStrictEqual([left(), lives.at(-1)], [[], "released"])
    })
  }

  it("is not begun when it is aborted already, and not ended when it is aborted afterwards", async () => {
    const { boot, fake, left, run } = await client()
    const reason = new Error("too early")
    assert.strictEqual(await rejection(boot({ signal: AbortSignal.abort(reason) })), reason)
    assert.deepStrictEqual(left(), [])
    const abort = new AbortController()
    const vm = await boot({ signal: abort.signal })
    abort.abort(new Error("too late"))
    await vm.memoryStats()
    assert.notInclude((await run(fake.events)).slice(-2), "launch-")
    await vm.kill()
  })

  const commands: ReadonlyArray<readonly [facade.BootOptions, string]> = [
    [{ image: "micro" }, "BOOT_CMD_MISSING"],
    [{ rootDisk: "/disk.img" }, "BOOT_CMD_MISSING"],
    [{ image: "micro", cmd: [] }, "BOOT_CMD_MISSING"],
    [{ cmd: ["true"] }, "BOOT_CMD_WITHOUT_IMAGE"]
  ]
  for (const [options, code] of commands) {
    it(`refuses ${JSON.stringify(options)}`, async () => {
      const { boot, fake, run } = await client()
      assert.strictEqual(codeOf(await rejection(boot(options))), code)
      assert.deepStrictEqual(await run(fake.events), [])
    })
  }

  it("with a main command that cannot be started leaves nothing", async () => {
    const { boot, left } = await client(() => ({
      startMain: () => Effect.fail(new ExecError({ code: "EXEC_COMMAND_NOT_FOUND", message: "no", hint: "look" }))
    }))
    const error = await rejection(boot({ image: "micro", cmd: ["no"] }))
    assert.isTrue(error instanceof facade.ExecError && error.hint === "look")
    assert.deepStrictEqual(left(), [])
  })

  it("detached gives up after timeoutMs", async () => {
    const { boot, fake, left, run } = await client()
    await run(fake.when("doorbell", "hang"))
    const error = await rejection(boot({ detached: true, timeoutMs: 30 }))
    assert.strictEqual(codeOf(error), "BOOT_DETACHED_READINESS_FAILED")
    assert.deepStrictEqual(left(), [])
  })
})

describe("options that cannot be honoured", () => {
  const refused: ReadonlyArray<readonly [string, (client: facade.Client) => Promise<unknown>]> = [
    ["snapshot", ({ boot }) => boot({ snapshot: false } as facade.BootOptions)],
    ["vmmEnv", ({ boot }) => boot({ vmmEnv: { A: "b" } } as facade.BootOptions)],
    ["pdeathsig", ({ boot }) => boot({ pdeathsig: false } as unknown as facade.BootOptions)],
    ["rootDisk", ({ boot }) => boot({ rootDisk: false } as unknown as facade.BootOptions)],
    ["toString", ({ boot }) => boot({ toString: 1 } as unknown as facade.BootOptions)],
    ["pid", ({ runGc }) => runGc({ pid: 1 } as facade.RunGcOptions)],
    ["secrets", ({ attach }) => attach({ name: "x", secrets: 1 } as facade.AttachOptions)],
    ["pty", async ({ boot }) => (await boot()).exec("x", { pty: true } as facade.VsockExecOptions)],
    ["dumpCmd", async ({ boot }) => (await boot()).snapshot({ outDir: "/x", dumpCmd: "y" } as facade.SnapshotOptions)]
  ]
  for (const [name, call] of refused) {
    it(`are refused: ${name}`, async () => {
      const error = await rejection(call(await client()))
      assert.isTrue(facade.isMachinenError(error, "BOOT_OPTION_INVALID"), String(error))
      assert.isTrue(error instanceof facade.BootError && error.message.includes(name) && error.hint !== undefined)
    })
  }

  it("are fine when they ask for nothing", async () => {
    const { boot } = await client()
    const options = { portForward: [], vmmEnv: {}, mount: undefined, pdeathsig: true, lazy: undefined }
    await (await boot(options as unknown as facade.BootOptions)).kill()
  })

  it("attach wants a pid or a name", async () => {
    const { attach } = await client()
    for (const options of [{}, { pid: 1, name: "x" }, { pid: 999 }, { name: "x" }]) {
      const error = await rejection(attach(options))
      assert.isTrue(facade.isMachinenError(error, "REGISTRY_VM_NOT_FOUND"))
    }
  })
})

describe("a handle", () => {
  it("waits no longer than it may, and the VM goes on", async () => {
    const { boot, fake, run } = await client()
    const vm = await boot({ timeoutMs: 20 })
    const error = await rejection(vm.wait())
    assert.isTrue(facade.isMachinenError(error, "BOOT_TIMEOUT"))
    assert.notInclude(await run(fake.events), "kill")
    const patient = await boot({ timeoutMs: null })
    const end = patient.wait()
    await run(fake.crash(""))
    assert.deepStrictEqual(await end, { code: 0, signal: null })
    await vm.kill()
  })

  it("is released when the VM ends by itself, and can still be asked", async () => {
    const { boot, fake, left, lives, run } = await client()
    const vm = await boot()
    await run(fake.crash(""))
    await vm.wait()
    assert.deepStrictEqual([left(), lives], [[], ["built", "released", "built", "released"].slice(0, lives.length)])
    assert.strictEqual(lives.at(-1), "released")
    assert.deepStrictEqual(await vm.wait(), { code: 0, signal: null })
    await vm.kill()
    await vm.detach()
  })

  it("carries a main command's streams both ways, apart", async () => {
    const { finish, heard, say, vm } = await talker()
    const [stdout, stderr] = [vm.stdout.toArray(), vm.stderr.toArray()]
    await say("stdout", "one ")
    await say("stderr", "two")
    await say("stdout", "three")
    vm.stdin.write("a line")
    await until("the input", () => heard.length > 0)
    vm.stdin.end()
    await finish()
    assert.strictEqual(Buffer.concat(await stdout).toString(), "one three")
    assert.strictEqual(Buffer.concat(await stderr).toString(), "two")
    assert.deepStrictEqual(heard, ["a line"])
    await vm.kill()
  })

  it("keeps the last MiB of each channel, read or not", async () => {
    const { finish, say, vm } = await talker()
    for (let turn = 0; turn < 40; turn++) await say("stdout", Buffer.alloc(65_536, 65 + (turn % 20)))
    await say("stderr", "short")
    await until("the output", async () => (await vm.errorOutput()) === "short")
    const wanted = Buffer.concat(Array.from({ length: 16 }, (_, i) => Buffer.alloc(65_536, 65 + ((24 + i) % 20))))
    assert.isTrue((await vm.output()) === wanted.toString())
    await finish()
    assert.isTrue(wanted.equals(Buffer.concat(await vm.stdout.toArray())))
    await vm.kill()
  })

  it("ends even when its reader has paused its output", async () => {
    const { finish, say, vm } = await talker()
    const paused = new Promise((resolve) => vm.stdout.once("data", () => resolve(vm.stdout.pause())))
    const size = 65_536
    for (let turn = 0; turn < 15; turn++) {
      await say("stdout", Buffer.alloc(size, "x"))
      await paused
    }
    for (let turn = 0; turn < 50; turn++) await new Promise((resolve) => setImmediate(resolve))
    assert.isBelow((await vm.output()).length, 4 * size)
    const killed = vm.kill()
    await until("the rest", async () => (await vm.output()).length === 15 * size)
    await finish()
    await killed
  })

  it("that cannot be detached still owns its VM", async () => {
    const { finish, left, vm } = await talker()
    // a fake VM cannot be attached to
    assert.isTrue(facade.isMachinenError(await rejection(vm.detach()), "REGISTRY_VM_NOT_FOUND"))
    assert.isNotEmpty(left())
    await finish()
    await vm.kill()
    assert.isEmpty(left())
  })

  it("rejects a refusal of the hypervisor as an error of ours", async () => {
    const { boot } = await client()
    const vm = await boot()
    const error = await rejection(vm.pause())
    assert.isTrue(facade.isMachinenError(error, "VMM_CONTROL_FAILED"))
    assert.strictEqual(
      facade.formatMachinenError(error as facade.VmmControlFailed),
      "(VMM_CONTROL_FAILED): a fake has no machine"
    )
    await vm.kill()
  })

  it("tells its memory, with zeros for what there is not", async () => {
    const { boot } = await client()
    const vm = await boot({ memory: 128 })
    assert.deepStrictEqual(await vm.memoryStats(), {
      ceilingMib: 128,
      hostRssBytes: null,
      balloonInflatedBytes: 0,
      lazyPagesPending: 0
    })
    await vm.kill()
  })
})

describe("onLog", () => {
  it("hears console and phases, and what it throws breaks nothing", async () => {
    const { boot } = await client()
    const events: Array<facade.LogEvent> = []
    const onLog = (event: facade.LogEvent) => {
      events.push(event)
      throw new Error("not my day")
    }
    const vm = await boot({ onLog })
    await vm.kill()
    const [phase, console] = events
    assert.isTrue(phase?.source === "phase" && phase.kind === "boot" && phase.totalMs > 0)
    assert.include(phase?.source === "phase" ? [...phase.phases.keys()] : [], "vmm-spawn")
    assert.deepStrictEqual(console, { source: "guest-console", chunk: Buffer.from("fake console\n") })
    assert.lengthOf(events, 2)
  })
})

describe("helpers", () => {
  it("size memory as the specification says", () => {
    const gib = 2 ** 30
    assert.deepStrictEqual([0.5 * gib, 3 * gib, 64 * gib].map(facade.autoSizeMemoryMib), [512, 1536, 16384])
    assert.strictEqual(facade.autoSizeMemoryMib(), facade.autoSizeMemoryMib(os.totalmem()))
  })

  it("read the memory of the host and of processes", async () => {
    assert.strictEqual(facade.readHostTotalBytes(), os.totalmem())
    const free = await facade.readHostFreeBytes()
    assert.isTrue(free > 0 && free <= os.totalmem())
    const own = facade.readHostRssBytes(process.pid) ?? 0
    assert.isTrue(own > 2 ** 20 && own < os.totalmem())
    assert.isNull(facade.readHostRssBytes(2 ** 22 + 1))
    assert.strictEqual(facade.readHostRssBytesMulti([]).size, 0)
    const several = facade.readHostRssBytesMulti([process.pid, { pid: 2 ** 22 + 1 }, { pid: process.ppid }])
    assert.deepStrictEqual([...several.keys()], [process.pid, process.ppid])
  })

  it("refuse a fork below the threshold, not at it, and never at 0", async () => {
    const check = (threshold: number, free: number) =>
      facade.checkForkBackpressure({ threshold, totalBytes: 1000, readFree: async () => free })
    await check(0.5, 500)
    await check(7, 1000)
    for (const [threshold, free] of [
      [0.5, 499],
      [7, 999],
      [facade.DEFAULT_FREE_MEMORY_THRESHOLD, 9]
    ] as const) {
      const error = await rejection(check(threshold, free))
      assert.isTrue(facade.isMachinenError(error, "FORK_MEMORY_BACKPRESSURE") && error instanceof facade.BootError)
      assert.isTrue(error instanceof facade.BootError && error.retryable)
    }
    const unread = () => Promise.reject(new Error("it was read"))
    for (const threshold of [0, -1]) await facade.checkForkBackpressure({ threshold, readFree: unread })
  })

  it("recognise our errors, also by code", () => {
    const error = new facade.BootError({ code: "BOOT_TIMEOUT", message: "x" })
    assert.isTrue(facade.isMachinenError(error) && facade.isMachinenError(error, "BOOT_TIMEOUT"))
    assert.isFalse(facade.isMachinenError(error, "BOOT_MEMORY_INVALID"))
    assert.isFalse(facade.isMachinenError(new Error("BOOT_TIMEOUT")))
  })
})

describe("lines that write a file", () => {
  const write = (commands: ReadonlyArray<string>) => {
    for (const command of commands) execFileSync("sh", ["-c", command], { stdio: ["ignore", "ignore", "pipe"] })
  }
  const every = Buffer.from(Array.from({ length: 256 }, (_, i) => i))

  it("small contents are one line, which writes every byte, mode, parents", () => {
    const file = path.join(temporaryDirectory(), "a 'b' $c", "-d")
    const commands = facade.buildWriteFileCmds(file, every, { mode: 0o640 })
    assert.deepStrictEqual(commands, [facade.buildWriteFileCmd(file, every, { mode: 0o640 })])
    write(commands)
    assert.isTrue(readFileSync(file).equals(every))
    assert.strictEqual(statSync(file).mode & 0o7777, 0o640)
    write([facade.buildWriteFileCmd(file, "ü", { append: true })])
    assert.isTrue(readFileSync(file).equals(Buffer.concat([every, Buffer.from("ü")])))
    assert.strictEqual(statSync(file).mode & 0o7777, 0o640)
    write([facade.buildWriteFileCmd(file, "")])
    assert.strictEqual(readFileSync(file).length, 0)
  })

  it("large contents are several lines below the limit, decoded once, and leave nothing in /tmp", () => {
    const dir = temporaryDirectory()
    const staged = () => readdirSync("/tmp").filter((name) => name.startsWith(".machinen-write-"))
    const before = staged()
    const large = Buffer.concat(Array.from({ length: 1000 }, () => every))
    const commands = facade.buildWriteFileCmds(path.join(dir, "large"), large)
    assert.lengthOf(commands, Math.ceil((large.length * 4) / 3 / 65_536) + 1)
    for (const command of commands) {
      assert.isBelow(Buffer.byteLength(command), 100_000)
      assert.notInclude(command, "\n")
    }
    assert.lengthOf(
      commands.filter((command) => command.includes("base64 -d")),
      1
    )
    write(commands)
    assert.isTrue(readFileSync(path.join(dir, "large")).equals(large))
    mkdirSync(path.join(dir, "in-the-way"))
    assert.throws(() => write(facade.buildWriteFileCmds(path.join(dir, "in-the-way"), large)))
    assert.throws(() => write(facade.buildWriteFileCmds(path.join(dir, "no", "x"), large, { recursive: false })))
    assert.deepStrictEqual(staged(), before)
  })
})

describe("execPty", () => {
  it("tries an unreachable guest once, and lets go of its input", async () => {
    let tries = 0
    const { boot } = await client(() => ({
      terminal: () =>
        Effect.suspend(() => {
          tries += 1
          return new ExecError({ code: "EXEC_AGENT_UNAVAILABLE", message: "nobody there" })
        })
    }))
    const vm = await boot()
    const stdin = new PassThrough()
    const { cancel, resize, result } = vm.execPty("sh", { cols: 80, rows: 24, stdin, stdout: new PassThrough() })
    assert.strictEqual(stdin.listenerCount("data"), 1)
    assert.strictEqual(codeOf(await rejection(result)), "EXEC_AGENT_UNAVAILABLE")
    assert.strictEqual(tries, 1)
    assert.strictEqual(stdin.listenerCount("data"), 0)
    assert.isTrue(stdin.isPaused())
    resize(90, 30)
    cancel()
    assert.throws(() => resize(0, 30), "0 columns and 30 rows")
    await vm.kill()
  })

  it("gives up a guest that does not take the command, and can be cancelled while it waits", async () => {
    const { boot } = await client(() => ({ terminal: () => Effect.never }))
    const vm = await boot()
    const streams = { stdin: new PassThrough(), stdout: new PassThrough() }
    const size = { cols: 80, rows: 24 }
    const late = vm.execPty("sh", { ...size, ...streams, connectTimeoutMs: 20 })
    assert.strictEqual(codeOf(await rejection(late.result)), "EXEC_AGENT_UNAVAILABLE")
    const cancelled = vm.execPty("sh", { ...size, ...streams })
    cancelled.cancel()
    assert.strictEqual(codeOf(await rejection(cancelled.result)), "EXEC_CANCELLED")
    assert.strictEqual(streams.stdin.listenerCount("data"), 0)
    await vm.kill()
  })
})
