import { spawn } from "node:child_process"
import { once } from "node:events"
import { mkdirSync, readFileSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { PassThrough } from "node:stream"
import { pathToFileURL } from "node:url"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import * as facade from "../../src/promise.ts"
import {
  cli,
  environment,
  eventually,
  leftovers,
  live,
  newBundle,
  nothing,
  processesOf,
  settled,
  temporaryHome
} from "../fixtures.ts"

const { Sandboxes, Supervisor } = facade
const home = temporaryHome()
const { attach, boot, list, restore, runGc } = facade.make(live(home))
afterEach(async () => {
  const running = await list()
  // a test that failed must not fail those after it
  await Promise.all(running.map(async ({ pid }) => (await attach({ pid })).kill()))
  await settled(home)
  assert.deepStrictEqual(running, [])
})

const idle = { image: "micro", cmd: ["sleep", "infinity"], memory: 256, timeoutMs: null } as const

const rejection = async (promise: Promise<unknown>): Promise<facade.MachinenError> => {
  try {
    await promise
  } catch (error) {
    assert.isTrue(facade.isMachinenError(error), String(error))
    if (facade.isMachinenError(error)) return error
  }
  throw new Error("it did not reject")
}

const recorded = () => {
  const events: Array<facade.LogEvent> = []
  const onLog = (event: facade.LogEvent) => void events.push(event)
  const of = (source: facade.LogEvent["source"]) =>
    Buffer.concat(events.flatMap((e) => (e.source === source && e.source !== "phase" ? [e.chunk] : []))).toString()
  const phases = () =>
    events.flatMap((e) => (e.source === "phase" ? [`${e.kind}: ${[...e.phases.keys()].join(" ")}`] : []))
  return { events, onLog, of, phases }
}

describe("a main command", () => {
  it("has stdin, stdout, stderr and an exit code", async () => {
    const log = recorded()
    const vm = await boot({
      image: "micro",
      cmd: ["sh", "-c", "echo ready; cat; echo oops >&2; pwd; exit 7"],
      guestCwd: "/etc",
      onLog: log.onLog
    })
    const printed = vm.stdout.toArray()
    vm.stdin.write("from the ")
    vm.stdin.end("host\n")
    assert.deepStrictEqual(await vm.wait(), { code: 7, signal: null })
    assert.strictEqual(Buffer.concat(await printed).toString(), "ready\nfrom the host\n/etc\n")
    assert.strictEqual(await vm.output(), "ready\nfrom the host\n/etc\n")
    assert.strictEqual(await vm.errorOutput(), "oops\n")
    assert.deepStrictEqual(leftovers(home), nothing)
    assert.include(log.of("guest-console"), "reboot: Restarting system")
    // initramfs-pack: with a kernel, where no machine of this shape is prepared
    assert.deepStrictEqual(
      log.phases().map((phases) => phases.replace(" initramfs-pack", "")),
      ["boot: validate claim rootdisk-materialize vmm-spawn guest-ready"]
    )
    assert.deepStrictEqual(await vm.wait(), { code: 7, signal: null })
    assert.strictEqual((await rejection(vm.exec("true"))).code, "EXEC_AGENT_UNAVAILABLE")
  })

  it("keeps the end of output that is not read", async () => {
    const vm = await boot({ image: "micro", cmd: ["sh", "-c", "yes | head -c 3000000; echo the end; kill -TERM $$"] })
    assert.deepStrictEqual(await vm.wait(), { code: 143, signal: "SIGTERM" })
    const output = await vm.output()
    assert.lengthOf(output, 1024 * 1024)
    assert.isTrue(output.endsWith("y\ny\nthe end\n"))
  })

  it("rejects when it cannot be started, with the error itself, and nothing is left", async () => {
    const error = await rejection(boot({ image: "micro", cmd: ["no-such-command"] }))
    assert.isTrue(error instanceof facade.ExecError && error.code === "EXEC_COMMAND_NOT_FOUND")
    assert.isDefined(error.hint)
    assert.deepStrictEqual(leftovers(home), nothing)
  })
})

describe("exec", () => {
  it("streams, collects, limits and reports", async () => {
    const log = recorded()
    const vm = await boot({ ...idle, timeoutMs: 50, onLog: log.onLog })
    assert.strictEqual((await rejection(vm.wait())).code, "BOOT_TIMEOUT")

    const seen: Array<string> = []
    const onStdout = (chunk: Buffer) => void seen.push(chunk.toString())
    const script = "printf 'ä%.0s' $(seq 5000); echo err >&2; exit 4"
    const streamed = await vm.execRaw(script, { onStdout })
    assert.deepStrictEqual(streamed, { exitCode: 4, stdout: "", stderr: "err\n" })
    assert.strictEqual(seen.join(""), "ä".repeat(5000))
    const collected = await vm.execRaw(script)
    assert.deepStrictEqual(collected, { exitCode: 4, stdout: "ä".repeat(5000), stderr: "err\n" })
    assert.strictEqual(log.of("exec-stdout"), "ä".repeat(10_000))
    assert.strictEqual(log.of("exec-stderr"), "err\nerr\n")
    assert.isTrue(log.events.every((e) => e.source === "phase" || e.source === "guest-console" || e.cmd === script))

    const failed = await rejection(vm.exec("echo why >&2; exit 3", { onStderr: () => {} }))
    assert.isTrue(failed instanceof facade.ExecError && failed.exitCode === 3)
    assert.include(failed.message, "code 3: why")
    const late = await rejection(vm.exec("sleep 60", { execTimeoutMs: 300 }))
    assert.isTrue(late instanceof facade.ExecError && !late.retryable && late.code === "EXEC_AGENT_TIMEOUT")

    await vm.writeFile("/tmp/a/b", Buffer.from([0, 255, 10]), { mode: 0o600 })
    assert.strictEqual((await vm.exec("od -An -tx1 /tmp/a/b; stat -c %a /tmp/a/b")).stdout, " 00 ff 0a\n600\n")
    for (const line of facade.buildWriteFileCmds("/tmp/c d", "x".repeat(70_000), { mode: 0o644 })) await vm.exec(line)
    assert.strictEqual((await vm.exec("wc -c <'/tmp/c d'; ls -A /tmp")).stdout.trim(), "70000\na\nc d")
    await vm.kill()
  })

  it("fails with the error of its callback or its abort signal, and the command ends", async () => {
    const vm = await boot(idle)
    const running = async () => (await vm.exec("ps | grep -c 'root  *sleep 100[12]$' || true")).stdout.trim()
    const mine = new Error("enough")
    const onStdout = () => {
      throw mine
    }
    const thrown = await vm.exec("echo go; sleep 1001", { onStdout }).catch((error: unknown) => error)
    assert.strictEqual(thrown, mine)
    assert.strictEqual(await running(), "0")
    const abort = new AbortController()
    let began = () => {}
    const going = new Promise<void>((resolve) => {
      began = resolve
    })
    const options = { signal: abort.signal, onStdout: () => began() }
    const ended = vm.exec("sleep 1002 & echo go; wait", options).catch((error: unknown) => error)
    await going
    assert.strictEqual(await running(), "1")
    abort.abort(mine)
    assert.strictEqual(await ended, mine)
    assert.strictEqual(await running(), "0")
    await vm.kill()
  })
})

describe("a VM", () => {
  it("detached is found by name and pid, and outlives its handle", async () => {
    const vm = await boot({ memory: 256, name: "web/1" })
    const pending = vm.wait()
    const taken = await rejection(boot({ ...idle, name: "web/1" }))
    assert.isTrue(taken instanceof facade.RegistryError && taken.code === "REGISTRY_NAME_IN_USE")

    await vm.detach()
    assert.deepStrictEqual(await pending, { code: null, signal: null })
    await vm.detach()
    const log = recorded()
    const [byName, byPid] = [await attach({ name: "web/1", onLog: log.onLog }), await attach({ pid: vm.pid })]
    assert.deepStrictEqual([byName.id, byPid.id, byPid.name], [vm.id, vm.id, "web/1"])
    assert.strictEqual((await byName.exec("hostname")).stdout, "web-1\n")
    assert.strictEqual((await vm.exec("hostname")).stdout, "web-1\n")
    assert.deepStrictEqual(await byName.stdout.toArray(), [])
    assert.strictEqual(await byName.output(), "")
    const [row] = await list()
    assert.deepInclude(row, { id: vm.id, pid: vm.pid, name: "web/1", imagePath: "debian", memoryCeilingMib: 256 })
    const stats = await byPid.memoryStats()
    assert.strictEqual(stats.ceilingMib, 256)
    assert.isAbove(stats.hostRssBytes ?? 0, 2 ** 20)

    await byName.pause()
    const held = await rejection(byPid.exec("true", { connectTimeoutMs: 300 }))
    assert.strictEqual(held.code, "EXEC_AGENT_UNAVAILABLE")
    await byName.resume()
    await byPid.exec("true")

    const ends = [vm.wait(), byPid.wait()]
    await byName.kill()
    for (const end of ends) assert.deepStrictEqual(await end, { code: null, signal: "SIGKILL" })
    await byPid.kill()
    assert.deepStrictEqual(await list(), [])
    // what the user's own cache holds is not this test's business
    const found = (await runGc({ dryRun: true })).flatMap(({ removedPaths }) => removedPaths)
    assert.deepStrictEqual(
      found.filter((file) => file.startsWith(`${home}/`)),
      []
    )
    assert.strictEqual((await rejection(attach({ name: "web/1" }))).code, "REGISTRY_VM_NOT_FOUND")
    assert.deepStrictEqual([...new Set(log.events.map((e) => e.source))], ["exec-stdout"])
  })

  it("detached keeps its main command, which goes on without its streams", async () => {
    const script = "echo before; cat; echo after; echo mark >/tmp/mark; sleep 1003; exit 5"
    const vm = await boot({ ...idle, cmd: ["sh", "-c", script], name: "bound" })
    const [first] = await once(vm.stdout, "data")
    assert.strictEqual(String(first), "before\n")
    const ended = Promise.all([once(vm.stdout, "end"), once(vm.stdin, "close")])
    await vm.detach()
    await ended
    await vm.exec("until [ -s /tmp/mark ]; do usleep 10000; done")
    assert.strictEqual(await vm.output(), "before\n")
    const { stdout } = await Effect.runPromise(cli(home, ["logs", "bound"]))
    assert.strictEqual(stdout, "after\n")
    const end = vm.wait()
    await vm.execRaw("kill $(ps | awk '/root +sleep 1003$/ { print $1 }')").catch(() => {})
    assert.deepStrictEqual(await end, { code: 5, signal: null })
  })

  it("detached while it is paused is refused in time, stays ours, and can be detached later", async () => {
    const vm = await boot({ ...idle, cmd: ["sleep", "infinity"], name: "paused" })
    await vm.pause()
    const error = await rejection(vm.detach())
    assert.strictEqual(error.code, "EXEC_AGENT_TIMEOUT")
    await vm.resume()
    assert.strictEqual((await vm.exec("echo on")).stdout, "on\n")
    await vm.detach()
    assert.deepStrictEqual(
      (await list()).map(({ detached, name }) => [name, detached]),
      [["paused", true]]
    )
    await vm.stop()
  })

  it("booted detached with a command that is not there leaves no VM", async () => {
    const error = await rejection(boot({ ...idle, cmd: ["nosuchcmd"], name: "none", detached: true }))
    assert.strictEqual(error.code, "EXEC_COMMAND_NOT_FOUND")
    assert.deepStrictEqual(await list(), [])
  })

  it("booted detached runs its command", async () => {
    const vm = await boot({ ...idle, cmd: ["sh", "-c", "echo there >/tmp/mark; exec sleep infinity"], detached: true })
    const script = "until [ -s /tmp/mark ]; do usleep 10000; done; cat /tmp/mark"
    assert.strictEqual((await vm.exec(script)).stdout, "there\n")
    await vm.detach()
    await vm.stop()
    assert.deepStrictEqual(await list(), [])
  })

  it("is forked, captured and restored", async () => {
    const [log, always] = [recorded(), recorded()]
    const vm = await boot({ ...idle, name: "origin", onLog: always.onLog })
    await vm.exec("echo kept >/dev/shm/note")

    const sibling = await vm.fork({ env: { SIDE: "b" }, onLog: log.onLog })
    assert.strictEqual(sibling.name, `origin/${sibling.pid}`)
    assert.strictEqual((await sibling.exec('cat /dev/shm/note; echo "$SIDE"')).stdout, "kept\nb\n")
    assert.deepStrictEqual(log.phases(), ["snapshot: hold", "restore: claim vmm-spawn guest-ready"])
    await sibling.kill()

    const captured = recorded()
    const outDir = newBundle()
    const kept = await vm.snapshot({ outDir, leaveRunning: true, onLog: captured.onLog })
    assert.strictEqual(kept.engine, "vmstate")
    assert.strictEqual(kept.snapDir, outDir)
    assert.strictEqual(kept.vmstatePath, path.join(outDir, "state"))
    assert.deepStrictEqual(captured.phases(), ["snapshot: prepare hold finalize"])
    assert.deepStrictEqual(always.phases().slice(1), ["snapshot: hold", "snapshot: prepare hold finalize"])
    const refused = await rejection(vm.snapshot({ outDir }))
    assert.isTrue(refused instanceof facade.SnapshotError && refused.code === "SNAPSHOT_DUMP_FAILED")
    await vm.exec("true")
    await vm.snapshot({ outDir: path.join(home, "last") })
    assert.deepStrictEqual([await list(), await vm.wait()], [[], { code: null, signal: "SIGKILL" }])

    const again = recorded()
    const copy = await restore({ snapDir: outDir, name: "again", onLog: again.onLog })
    assert.strictEqual((await copy.exec("cat /dev/shm/note; hostname")).stdout, "kept\nagain\n")
    assert.strictEqual(again.of("exec-stdout"), "kept\nagain\n")
    assert.deepStrictEqual(again.phases(), ["restore: claim vmm-spawn guest-ready"])
    await copy.stop()
    const missing = await rejection(restore({ snapDir: path.join(home, "nowhere") }))
    assert.isTrue(missing instanceof facade.BootError && missing.code === "BOOT_SNAPSHOT_NOT_FOUND")
  })
})

describe("a Node program", () => {
  const bundle = pathToFileURL(path.resolve(import.meta.dirname, "..", "..", "dist", "promise.js")).href

  /** Runs a module to its end, which must come by itself. */
  const program = (body: string) =>
    new Promise<{ readonly code: number | null; readonly stdout: string }>((resolve) => {
      const source = `import { boot, attach, list } from ${JSON.stringify(bundle)}\n${body}`
      const child = spawn(process.execPath, ["--input-type=module", "--eval", source], {
        env: { ...process.env, ...environment(home) },
        stdio: ["ignore", "pipe", "inherit"],
        timeout: 20_000,
        killSignal: "SIGKILL"
      })
      const stdout: Array<Buffer> = []
      child.stdout.on("data", (chunk: Buffer) => stdout.push(chunk))
      child.on("close", (code) => resolve({ code, stdout: Buffer.concat(stdout).toString() }))
    })

  it("ends by itself after its last VM", async () => {
    const { code, stdout } = await program(`
      const vm = await boot({ image: "micro", cmd: ["sh", "-c", "read line; echo got $line"], memory: 256, onLog: () => {} })
      vm.stdout.pipe(process.stdout)
      const idle = await boot({ memory: 256 })
      process.stdout.write((await idle.exec("echo hello")).stdout)
      await idle.kill()
      vm.stdin.write("it\\n")
      process.on("exit", () => console.log("end"))`)
    assert.deepStrictEqual({ code, stdout }, { code: 0, stdout: "hello\ngot it\nend\n" })
    assert.deepStrictEqual(leftovers(home), nothing)
  })

  it("that exits leaves no VM of its own", async () => {
    const { code } = await program(`await boot({ memory: 256 }); process.exit(3)`)
    assert.strictEqual(code, 3)
    await settled(home)
  })

  it("ends by itself although a VM it has detached runs on, which others find", async () => {
    const { code, stdout } = await program(`
      const onLog = () => {}
      const cmd = ["sh", "-c", "while sleep 0.01; do echo tick; done"]
      const one = await boot({ image: "micro", cmd, memory: 256, name: "one", onLog })
      for await (const chunk of one.stdout) break
      one.wait().then(({ code }) => console.log("pending", code))
      await one.detach()
      await boot({ image: "micro", cmd: ["sleep", "infinity"], memory: 256, name: "two", detached: true, onLog })
      const three = await attach({ name: "two", onLog })
      await three.exec("echo hello")
      console.log((await list()).map(({ name }) => name).join(" "))`)
    assert.deepStrictEqual({ code, stdout }, { code: 0, stdout: "pending null\none two\n" })
    assert.lengthOf(processesOf(home), 4)
    for (const name of ["one", "two"]) await (await attach({ name })).kill()
  })
})

describe("execPty", () => {
  it("carries input, output, sizes and an exit code", async () => {
    const vm = await boot(idle)
    const [stdin, stdout] = [new PassThrough(), new PassThrough()]
    const shown = collected(stdout)
    stdin.write("typed before it ran\r")
    const { resize, result } = vm.execPty(
      "trap 'stty size; exit 6' WINCH; read l; echo got $l; stty size; while :; do sleep 0.05; done",
      {
        cols: 100,
        rows: 40,
        stdin,
        stdout
      }
    )
    await shown.has("got typed before it ran\r\n40 100")
    resize(70, 20)
    assert.deepStrictEqual(await result, { exitCode: 6 })
    await shown.has("20 70")
    assert.strictEqual(stdin.listenerCount("data"), 0)
    await vm.kill()
  })

  it("hangs up what runs when it is cancelled", async () => {
    const vm = await boot(idle)
    const [stdin, stdout] = [new PassThrough(), new PassThrough()]
    const shown = collected(stdout)
    const { cancel, result } = vm.execPty(
      "trap 'echo hung up > /tmp/end; exit' HUP; echo ready; while :; do sleep 0.05; done",
      {
        cols: 80,
        rows: 24,
        stdin,
        stdout
      }
    )
    await shown.has("ready")
    cancel()
    assert.strictEqual((await rejection(result)).code, "EXEC_CANCELLED")
    assert.strictEqual(stdin.listenerCount("data"), 0)
    const { stdout: end } = await vm.exec("until [ -s /tmp/end ]; do sleep 0.05; done; cat /tmp/end")
    assert.strictEqual(end, "hung up\n")
    await vm.kill()
  })
})

describe("sandboxes of VMs", () => {
  it("are typed into and attached to by turns", async () => {
    const shell = {
      image: "micro",
      cmd: ["sh", "-c", "while read l; do echo $NAME heard $l; done"],
      memory: 256
    } as const
    const [a, b] = await Promise.all(["a", "b"].map((name) => boot({ ...shell, env: { NAME: name }, timeoutMs: 1000 })))
    if (a === undefined || b === undefined) throw new Error("two were booted")
    const sandboxes = new Sandboxes()
    sandboxes.add("a", a)
    sandboxes.add("b", b)
    const [input, output] = [new PassThrough(), new PassThrough()]
    const shown = collected(output)
    const supervisor = new Supervisor({ sandboxes, input, output })
    const running = supervisor.run()
    sandboxes.send("b", "me\n")
    input.write("/attach a\none\n")
    await shown.has("a heard one")
    input.write("\x1d\x1d/attach b\ntwo\n")
    await shown.has("b heard two")
    assert.notInclude(shown.text().slice(shown.text().indexOf("detached")), "a heard")
    assert.include(sandboxes.get("b")?.scrollback.toString(), "b heard me\nb heard two\n")
    b.stdin.end()
    await shown.has("sandbox b has ended")
    input.write("/ls\n/quit\n")
    await running
    assert.match(shown.text(), /a {2}running .*\r\nb {2}ended/)
    await a.kill()
  })
})

/** What arrives in a stream. */
const collected = (stream: PassThrough) => {
  const pieces: Array<Buffer> = []
  stream.on("data", (piece) => pieces.push(piece))
  const text = () => Buffer.concat(pieces).toString()
  const has = (wanted: string) =>
    Effect.runPromise(eventually(`${wanted} in the stream`, () => text().includes(wanted)))
  return { text, has }
}

describe("by its socket alone", () => {
  it("a guest takes trees, gives them, and takes secrets", async () => {
    const vm = await boot(idle)
    const socket = path.join(home, "vms", vm.id, "vsock.sock")
    const [source, back] = [path.join(home, "source"), path.join(home, "back")]
    mkdirSync(source)
    writeFileSync(path.join(source, "kept"), "kept")
    writeFileSync(path.join(source, "left.log"), "left")
    await facade.VsockFiles.push(socket, source, "/srv/pushed", { excludes: ["*.log"] })
    assert.strictEqual((await vm.exec("ls /srv/pushed")).stdout, "kept\n")
    await facade.VsockFiles.pull(socket, "/srv/pushed", back)
    assert.strictEqual(readFileSync(path.join(back, "kept"), "utf8"), "kept")
    await facade.VsockSecrets.send(socket, { TOKEN: "value" })
    assert.strictEqual(
      (await rejection(facade.VsockSecrets.send(socket, { TOKEN: "a\nb" }))).code,
      "SECRETS_VALUE_INVALID"
    )
    const none = path.join(home, "none")
    assert.strictEqual(
      (await rejection(facade.VsockFiles.push(socket, none, "/srv/x"))).code,
      "FILES_HOST_DIR_NOT_FOUND"
    )
    await vm.kill()

    const soon = { timeoutMs: 300, retryMs: 20 }
    assert.strictEqual(
      (await rejection(facade.VsockFiles.push(socket, source, "/srv/x", soon))).code,
      "FILES_AGENT_UNAVAILABLE"
    )
    assert.strictEqual(
      (await rejection(facade.VsockFiles.pull(socket, "/srv/x", back, soon))).code,
      "FILES_AGENT_UNAVAILABLE"
    )
    assert.strictEqual(
      (await rejection(facade.VsockSecrets.send(socket, { A: "b" }, soon))).code,
      "SECRETS_AGENT_UNAVAILABLE"
    )
  })
})
