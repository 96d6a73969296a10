import { existsSync, mkdirSync, readFileSync, readlinkSync, truncateSync } from "node:fs"
import { connect, type Socket } from "node:net"
import * as path from "node:path"
import { afterEach, assert, layer } from "@effect/vitest"
import { Chunk, Deferred, Effect, Fiber, Option, Stream } from "effect"
import { Assets } from "../../src/host/Assets.ts"
import { Machinen } from "../../src/Machinen.ts"
import {
  assertNothingLeft,
  busyboxExt4,
  busyboxTarball,
  cli,
  executable,
  leftovers,
  live,
  processesOf,
  settled,
  sh,
  sha256OfFile,
  temporaryHome,
  text
} from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

/** What the log shows up to the text. */
const logsUntil = <E>(logs: Stream.Stream<Uint8Array, E>, ...wanted: ReadonlyArray<string>) =>
  logs.pipe(
    Stream.decodeText(),
    Stream.scan("", (all, part) => all + part),
    Stream.takeUntil((all) => wanted.every((line) => all.includes(line))),
    Stream.runLast,
    Effect.map(Option.getOrElse(() => ""))
  )

layer(live(home), { excludeTestServices: true })("a VM", (it) => {
  it.scoped("is what its options say", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const { phases, vm } = yield* machinen.boot({
        image: "micro",
        name: "Team/Web_1",
        env: { GREETING: "hello wörld", EMPTY: "" },
        cwd: "/etc",
        memoryMib: 256,
        vcpus: 2
      })
      assert.strictEqual(vm.name, "Team/Web_1")
      assert.strictEqual(
        yield* sh(vm, 'echo "$GREETING|$EMPTY|$PWD|$(hostname)|$MACHINEN_VM_NAME"'),
        "hello wörld||/etc|team-web-1|Team/Web_1"
      )
      assert.strictEqual(yield* sh(vm, "grep -c ^processor /proc/cpuinfo"), "2")
      const totalMib = Number(yield* sh(vm, "awk '/^MemTotal/ { print $2 }' /proc/meminfo")) / 1024
      assert.isAbove(totalMib, 200)
      assert.isAtMost(totalMib, 256)
      assert.includeMembers(
        [...phases.keys()],
        ["validate", "claim", "rootdisk-materialize", "initramfs-pack", "vmm-spawn", "guest-ready"]
      )
      const memory = yield* vm.memoryStats
      assert.strictEqual(memory.ceilingMib, 256)
      assert.isAbove(memory.hostRssBytes ?? 0, 16 * 2 ** 20)
      assert.strictEqual(processesOf(home).length, 2) // shim and VMM, no more
      const [entry] = yield* machinen.list
      assert.strictEqual(entry?.state, "running")
      assert.strictEqual(entry?.vmm?.pid, vm.pid)
    })
  )

  it.scoped("has the host's time", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro" })
      const before = Math.floor(Date.now() / 1000)
      const guest = Number(yield* sh(vm, "date +%s"))
      assert.isAtLeast(guest, before - 2)
      assert.isAtMost(guest, Date.now() / 1000 + 2)
    })
  )

  it.scoped("ends with its main command and tells how that ended", () =>
    Effect.gen(function* () {
      const { command, vm } = yield* (yield* Machinen).boot({
        image: "micro",
        command: ["sh", "-c", "echo working; exit 9"]
      })
      assert.deepStrictEqual(command, ["sh", "-c", "echo working; exit 9"])
      const main = yield* vm.startMain()
      const output = yield* Stream.runCollect(main.output)
      assert.strictEqual(
        Chunk.toReadonlyArray(output)
          .map(({ bytes }) => text(bytes))
          .join(""),
        "working\n"
      )
      assert.strictEqual((yield* main.exit).code, 9)
      const exit = yield* vm.wait
      assert.deepStrictEqual(exit.main, { code: 9, signal: null })
      assert.deepStrictEqual(exit.vmm, { code: 0, signal: null })
      assert.isTrue(exit.orderly)
      assert.strictEqual(exit.reason, "guest")
      assertNothingLeft(home) // before the scope closes
    })
  )

  it.scoped("tells a main command's death by a signal", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro", command: ["sh", "-c", "kill -KILL $$"] })
      const main = yield* vm.startMain()
      yield* Stream.runDrain(main.output)
      assert.deepStrictEqual((yield* main.exit).signal, 9)
      assert.deepStrictEqual((yield* vm.wait).main, { code: 137, signal: 9 })
    })
  )

  it.scoped("stops in order and leaves nothing; stopping it again is fine", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro" })
      const exit = yield* vm.stop()
      assert.isTrue(exit.orderly)
      assert.strictEqual(exit.reason, "stop")
      assertNothingLeft(home)
      yield* vm.stop()
      yield* vm.kill
      const error = yield* Effect.flip(vm.execRaw({ argv: ["true"] }))
      assert.strictEqual(error.code, "EXEC_AGENT_UNAVAILABLE")
    })
  )

  for (const prepared of [true, false]) {
    const how = prepared ? "begun as a template" : "booted with a kernel"
    it.scoped(`keeps the guest's memory to itself, ${how}: in no core file, shared with no other guest`, () =>
      Effect.gen(function* () {
        const { vm } = yield* (yield* Machinen).boot({ image: "micro", prepared })
        const smaps = readFileSync(`/proc/${vm.pid}/smaps`, "utf8").split(/^(?=[0-9a-f]+-[0-9a-f]+ )/m)
        const memory = smaps.filter((mapping) =>
          prepared ? /\/templates\/\w+\/memory$/m.test(mapping) : mapping.includes("machinen-memory")
        )
        assert.isAbove(memory.length, 0)
        for (const mapping of memory) {
          const flags = /^VmFlags: (.*)$/m.exec(mapping)?.[1]?.split(" ") ?? []
          assert.include(flags, "dd") // left out of core files
          assert.notInclude(flags, "mg") // not for KSM
        }
        const status = readFileSync(`/proc/${vm.pid}/status`, "utf8")
        assert.match(status, /^NoNewPrivs:\t1$/m)
        assert.match(readFileSync(`/proc/${vm.pid}/limits`, "utf8"), /^Max core file size +0 +0 /m)
      })
    )
  }

  it.scoped("leaves an emulator 128 MiB for the code it has translated", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro" })
      const maps = readFileSync(`/proc/${vm.pid}/maps`, "utf8").matchAll(/^(\w+)-(\w+) rwx/gm)
      const sizes = [...maps].map(([, from, to]) => Number.parseInt(to ?? "", 16) - Number.parseInt(from ?? "", 16))
      const MiB = 2 ** 20
      const translated = sizes.reduce((sum, size) => sum + size, 0) / MiB
      // QEMU's own choice is 1 GiB, of which a busy guest fills most
      assert.isAtMost(translated, 130)
      assert.isAtLeast(translated, vm.entry.accel === "tcg" ? 100 : 0)
    })
  )

  it.scoped("has memory whose size cannot be changed, even by its VMM", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro", prepared: false })
      const fd = `/proc/${vm.pid}/fd/5`
      assert.include(readlinkSync(fd), "machinen-memory")
      assert.throws(() => truncateSync(fd, 0), /EPERM/)
      assert.strictEqual(yield* sh(vm, "echo unharmed"), "unharmed")
    })
  )

  /** Connections to the agent that ask for nothing, up to as many as there may be. */
  const holdConnections = (vsockPath: string, count: number) =>
    Effect.forEach(
      Array.from({ length: count }),
      () =>
        Effect.acquireRelease(
          Effect.async<Socket, Error>((resume) => {
            const socket = connect(vsockPath)
            socket.once("error", (cause) => resume(Effect.fail(cause)))
            socket.once("data", () => resume(Effect.succeed(socket.on("error", () => {}))))
            socket.write("CONNECT 1978\n")
          }),
          (socket) => Effect.sync(() => socket.destroy())
        ),
      { concurrency: 32 }
    )

  it.scoped("stops in order while clients hold every connection there may be", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro" })
      const held = yield* holdConnections(vm.entry.vsockPath, 512)
      const exit = yield* vm.stop()
      assert.isTrue(exit.orderly)
      assert.strictEqual(exit.reason, "stop")
      assert.deepStrictEqual(exit.vmm, { code: 0, signal: null })
      assert.strictEqual(held.length, 512)
    })
  )

  it.scoped("tells how its main command ended while clients hold every connection there may be", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro", command: ["sh", "-c", "read line; exit 9"] })
      const go = yield* Deferred.make<void>()
      const line = Stream.fromEffect(Effect.as(Deferred.await(go), new TextEncoder().encode("go\n")))
      const main = yield* vm.startMain(line)
      yield* holdConnections(vm.entry.vsockPath, 511)
      yield* Deferred.succeed(go, undefined)
      yield* Stream.runDrain(main.output)
      assert.strictEqual((yield* main.exit).code, 9)
      const exit = yield* vm.wait
      assert.isTrue(exit.orderly)
      assert.deepStrictEqual(exit.main, { code: 9, signal: null })
    })
  )

  it.scoped("is killed at once", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro" })
      const exit = yield* vm.kill
      assert.isFalse(exit.orderly)
      assert.strictEqual(exit.reason, "kill")
      assert.strictEqual(exit.vmm.signal, 9)
      assertNothingLeft(home)
    })
  )

  it.effect("ends with its scope, also when a command runs in it", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      yield* Effect.scoped(
        Effect.gen(function* () {
          const { vm } = yield* machinen.boot({ image: "micro" })
          yield* vm.start({ argv: ["sleep", "1000"] })
        })
      )
      assertNothingLeft(home)
    })
  )

  it.scoped("holds still while paused", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro" })
      yield* vm.pause
      const running = yield* Effect.fork(sh(vm, "echo awake"))
      assert.isTrue(Option.isNone(yield* Effect.timeoutOption(Effect.disconnect(Fiber.await(running)), "300 millis")))
      yield* vm.resume
      assert.strictEqual(yield* Fiber.join(running), "awake")
    })
  )

  it.scoped("shows its console and a detached main command's output", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({
        image: "micro",
        command: ["sh", "-c", "echo to stdout; echo to stderr >&2; sleep 1000"]
      })
      yield* vm.startMainDetached
      const output = yield* logsUntil(vm.logs("output", { follow: true }), "to stdout\n", "to stderr\n")
      assert.include(output, "to stdout\n")
      yield* sh(vm, "echo on the console >/dev/console")
      assert.include(yield* logsUntil(vm.logs("console", { follow: true }), "on the console"), "on the console")
      const tail = yield* vm.logs("output", { tailBytes: 7 }).pipe(Stream.decodeText(), Stream.mkString)
      assert.strictEqual(tail, "stderr\n")
      // following ends with the VM
      const following = yield* Effect.fork(Stream.runDrain(vm.logs("console", { follow: true })))
      yield* vm.stop()
      yield* Fiber.join(following)
    })
  )

  it.effect("outlives its scope when detached, and is found again", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const id = yield* Effect.scoped(
        Effect.map(machinen.boot({ image: "micro", name: "lasting", detached: true }), ({ vm }) => vm.id)
      )
      for (const reference of ["lasting", id, id.slice(0, 6)]) {
        const vm = yield* machinen.attach(reference)
        assert.strictEqual(yield* sh(vm, "echo there"), "there")
      }
      const vm = yield* machinen.attach("lasting")
      assert.strictEqual((yield* machinen.attach(String(vm.pid))).id, id)
      const waiting = yield* Effect.fork(vm.wait)
      const exit = yield* vm.stop()
      assert.isTrue(exit.orderly)
      assert.isTrue((yield* Fiber.join(waiting)).orderly)
      assert.strictEqual((yield* Effect.flip(machinen.attach("lasting"))).code, "REGISTRY_VM_NOT_FOUND")
    })
  )

  it.effect("outlives its scope after detach()", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const id = yield* Effect.scoped(
        Effect.gen(function* () {
          const { vm } = yield* machinen.boot({ image: "micro" })
          yield* vm.detach
          return vm.id
        })
      )
      const vm = yield* machinen.attach(id)
      assert.strictEqual(yield* sh(vm, "echo there"), "there")
      yield* vm.stop()
    })
  )

  it.effect("says so when it cannot be detached", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const error = yield* Effect.scoped(
        Effect.gen(function* () {
          const { vm } = yield* machinen.boot({ image: "micro" })
          process.kill(vm.machine.shim.pid, "SIGKILL")
          yield* vm.wait
          return yield* Effect.flip(vm.detach)
        })
      )
      assert.strictEqual(error.code, "BOOT_DETACHED_READINESS_FAILED")
    })
  )

  it.scoped("is independent of another", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const [one, two] = yield* Effect.all(
        [machinen.boot({ image: "micro", name: "one" }), machinen.boot({ image: "micro", name: "two" })],
        { concurrency: 2 }
      )
      yield* Effect.all([sh(one.vm, "echo 1 >/which"), sh(two.vm, "echo 2 >/which")], { concurrency: 2 })
      assert.deepStrictEqual((yield* machinen.list).map((e) => String(e.name)).sort(), ["one", "two"])
      yield* one.vm.kill
      assert.strictEqual(yield* sh(two.vm, "cat /which"), "2")
      assert.deepStrictEqual(leftovers(home).names, ["two"])
    })
  )

  it.scoped("has a writable layer as large as asked for", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "micro", rootDiskSizeBytes: 8 * 2 ** 30 })
      const kib = Number(yield* sh(vm, "df -k / | awk 'END { print $2 }'"))
      assert.isAbove(kib, 7.6 * 2 ** 20)
      assert.isAtMost(kib, 8 * 2 ** 20)
      // made of holes: nobody has to write zeros over it in the background
      const threads = yield* sh(vm, "cat /proc/[0-9]*/comm")
      assert.include(threads, "jbd2/vdb-8")
      assert.notInclude(threads, "ext4lazyinit")
    })
  )

  it.effect("never changes its base image", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const base = yield* (yield* Assets).base("micro")
      const before = sha256OfFile(base)
      for (const turn of ["first", "second"]) {
        yield* Effect.scoped(
          Effect.gen(function* () {
            const { vm } = yield* machinen.boot({ image: "micro" })
            assert.strictEqual(yield* sh(vm, "ls /mark 2>/dev/null || echo clean"), "clean")
            yield* sh(vm, `echo ${turn} >/mark; rm /bin/vi; echo >>/etc/passwd; sync`)
            yield* vm.stop()
          })
        )
      }
      assert.strictEqual(sha256OfFile(base), before)
    })
  )

  it.effect("writes to a root disk as it is, which stays", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const disk = busyboxExt4(home, "disk")
      const turn = (script: string) =>
        Effect.scoped(
          Effect.gen(function* () {
            const { vm } = yield* machinen.boot({ rootDisk: disk })
            const printed = yield* sh(vm, script)
            yield* vm.stop()
            return printed
          })
        )
      assert.strictEqual(yield* turn("cat /etc/mark; echo remembered >/kept"), "disk")
      assert.strictEqual(yield* turn("cat /kept"), "remembered")
      assert.isTrue(existsSync(disk))
    })
  )

  it.scoped("boots from an ext4 image without writing to it", () =>
    Effect.gen(function* () {
      const image = busyboxExt4(home, "base")
      const before = sha256OfFile(image)
      const { vm } = yield* (yield* Machinen).boot({ image })
      assert.strictEqual(yield* sh(vm, "echo changed >>/etc/mark; cat /etc/mark"), "base\nchanged")
      yield* vm.stop()
      assert.strictEqual(sha256OfFile(image), before)
    })
  )

  it.effect("boots from a tarball; of several first boots at once one builds the image", () =>
    Effect.gen(function* () {
      const tarball = busyboxTarball(home, "tarred")
      const cache = path.join(home, "cache")
      const log = path.join(home, "mke2fs.log")
      mkdirSync(cache)
      const mke2fs = executable(home, "mke2fs", `echo "$@" >>${log}; exec mke2fs "$@"`)
      const env = { MACHINEN_CACHE_DIR: cache, MACHINEN_MKE2FS: mke2fs, MACHINEN_ACCEL: "tcg" }
      const results = yield* Effect.all(
        Array.from({ length: 3 }, () => cli(home, ["run", "--image", tarball, "--", "cat", "/etc/mark"], { env })),
        { concurrency: 3 }
      )
      for (const { code, stderr, stdout } of results) {
        assert.deepStrictEqual({ code, stderr, stdout }, { code: 0, stderr: "", stdout: "tarred\n" })
      }
      const built = readFileSync(log, "utf8").trim().split("\n")
      assert.strictEqual(built.filter((line) => line.includes(" -d ")).length, 1)
      assert.strictEqual(built.length, 2) // and the upper's template, once too
    })
  )

  it.scoped("boots debian", () =>
    Effect.gen(function* () {
      const { vm } = yield* (yield* Machinen).boot({ image: "debian" })
      assert.match(yield* sh(vm, ". /etc/os-release; echo $ID $VERSION_ID"), /^debian 12$/)
      assert.strictEqual(yield* sh(vm, "python3 -c 'print(6 * 7)'"), "42")
    })
  )
})
