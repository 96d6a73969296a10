import { existsSync, readdirSync, readFileSync, renameSync } from "node:fs"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Chunk, Effect, Fiber, Stream } from "effect"
import * as Criu from "../../backends/criu/Criu.ts"
import * as Vmstate from "../../backends/vmstate/Vmstate.ts"
import { Machinen } from "../../src/Machinen.ts"
import { withEngines } from "../../src/runtime/layers.ts"
import type { RestoreOptions } from "../../src/snapshot/restore.ts"
import type { Restored } from "../../src/snapshot/revive.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import {
  boot,
  busyboxExt4,
  cli,
  cliPrints,
  eventuallyIn,
  hashesOf,
  live,
  newBundle,
  settled,
  sh,
  temporaryHome
} from "../fixtures.ts"

const home = temporaryHome()
const machine = live(home)

const snapshot = (vm: Vm, leaveRunning = true) =>
  Effect.flatMap(Machinen, (m) => m.snapshot(vm, { outDir: newBundle(), leaveRunning }))
const restore = (snapDir: string) => Effect.flatMap(Machinen, (m) => m.restore({ snapDir }))

/** By how many milliseconds the guest's clock is outside of the narrowest of three looks at it: ours before and after. */
const clockOffBy = (vm: Vm) =>
  Effect.gen(function* () {
    const looks = yield* Effect.forEach([1, 2, 3], () =>
      Effect.gen(function* () {
        const before = Date.now()
        const guest = Number(yield* sh(vm, "date +%s%N")) / 1e6
        const after = Date.now()
        return { width: after - before, off: Math.max(0, before - guest, guest - after) }
      })
    )
    return looks.reduce((best, look) => (look.width < best.width ? look : best)).off
  })

/** Milliseconds between the guest's clock and ours. Reading it takes a moment, which counts for the guest. */
const clockOff = (vm: Vm) =>
  Effect.gen(function* () {
    const before = Date.now()
    const guest = Number(yield* sh(vm, "cut -d. -f1 /proc/uptime >/dev/null; date +%s")) * 1000
    const after = Date.now()
    return guest < Math.floor(before / 1000) * 1000 ? before - guest : guest > after ? guest - after : 0
  })

/** Every kind of thing a process may hold, and a tally of it once in every 20 ms. */
const holder = `
import json, os, select, signal, threading, time
os.chdir("/srv/held")
log = open("log", "a", buffering=1)
gone = open("gone", "w+"); gone.write("unlinked"); gone.flush(); os.unlink("gone")
r, w = os.pipe(); os.write(w, b"in the pipe")
ticks = [0]
signal.signal(signal.SIGALRM, lambda *_: ticks.__setitem__(0, ticks[0] + 1))
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
threads = [0]
def count():
    while True: threads[0] += 1; time.sleep(0.02)
threading.Thread(target=count, daemon=True).start()
heap = os.urandom(8 << 20)
import hashlib
digest = hashlib.sha256(heap).hexdigest()
n = 0
while True:
    n += 1
    print(n, file=log)
    gone.seek(0)
    state = dict(n=n, ticks=ticks[0], threads=threads[0], cwd=os.getcwd(), env=os.environ["HELD"], gone=gone.read(),
        pipe=len(select.select([r], [], [], 0)[0]), heap=hashlib.sha256(heap).hexdigest() == digest, lines=sum(1 for _ in open("log")))
    with open("/dev/shm/state.new", "w") as f: json.dump(state, f)
    os.rename("/dev/shm/state.new", "/dev/shm/state")
    time.sleep(0.02)
`

interface Held {
  readonly n: number
  readonly ticks: number
  readonly threads: number
}
const held = (vm: Vm) =>
  Effect.map(sh(vm, "cat /dev/shm/state"), (text): Held & Record<string, unknown> => JSON.parse(text))
/** Asks until the tally has gone on. */
const later = (vm: Vm, than: Held) =>
  held(vm).pipe(
    Effect.repeat({ until: (now) => now.n > than.n && now.ticks > than.ticks && now.threads > than.threads }),
    Effect.timeout("30 seconds")
  )

/** What holds whichever engine there is: nothing here names one but its layer. */
const engines = [
  { name: "vmstate", image: "micro", program: live(home, {}, withEngines(Vmstate.layer)) },
  { name: "criu", image: "debian", program: live(home, {}, withEngines(Criu.layer)) }
]

for (const { image, name, program } of engines)
  describe(`with the engine ${name}`, { timeout: 240_000 }, () => {
    afterEach(() => settled(home))

    // Slow with criu (40 s): three boots of Debian and a dump, which an emulated guest reads and writes.
    it.scopedLive("a copy goes on with everything its original had, independently of it", () =>
      Effect.gen(function* () {
        const source = yield* boot({ image: "debian", name: "original", env: { BOOTED: "yes" } })
        yield* sh(source, "mkdir -p /srv/held; echo nonce-$RANDOM-$(cat /proc/sys/kernel/random/uuid) > /dev/shm/nonce")
        yield* source.writeFile("/srv/holder.py", holder)
        yield* sh(source, "HELD=held setsid python3 /srv/holder.py </dev/null >/dev/null 2>/dev/shm/errors &")
        yield* eventuallyIn(source, "test -e /dev/shm/state")
        yield* sh(source, "echo unsynced > /srv/unsynced; rm /etc/motd; echo changed > /etc/issue")
        // three commands of three clients, in the middle of their work
        const streams = yield* Effect.forEach([1, 2, 3], (i) =>
          Effect.forkScoped(
            source.execRaw(`i=0; while :; do i=$((i+1)); echo $i > /dev/shm/exec${i}; sleep 0.02; done`)
          )
        )
        yield* eventuallyIn(source, "test -e /dev/shm/exec1 -a -e /dev/shm/exec2 -a -e /dev/shm/exec3")
        const before = yield* held(source)
        const nonce = yield* sh(source, "cat /dev/shm/nonce")
        const { bundle } = yield* snapshot(source)

        const copies = yield* Effect.forEach([1, 2], () => restore(bundle.dir))
        for (const { vm } of copies) {
          assert.strictEqual(yield* sh(vm, "cat /dev/shm/nonce"), nonce)
          const { env, cwd, gone, heap, pipe } = yield* later(vm, before)
          assert.deepStrictEqual(
            { env, cwd, gone, heap, pipe },
            { env: "held", cwd: "/srv/held", gone: "unlinked", heap: true, pipe: 1 }
          )
          assert.strictEqual(
            yield* sh(vm, "cat /srv/unsynced /etc/issue; test ! -e /etc/motd && echo gone"),
            "unsynced\nchanged\ngone"
          )
          assert.strictEqual(yield* sh(vm, "cat /dev/shm/errors; echo $BOOTED"), "yes")
          // nobody reads them any more, and still they go on
          for (const i of [1, 2, 3]) {
            const at = Number(yield* sh(vm, `cat /dev/shm/exec${i}`))
            yield* eventuallyIn(vm, `test $(cat /dev/shm/exec${i}) -gt ${at}`)
          }
          assert.isBelow(yield* clockOff(vm), 1000)
        }
        const [one, two] = copies
        if (one === undefined || two === undefined) return assert.fail("two copies were asked for")
        yield* sh(one.vm, "echo one > /srv/mine")
        assert.strictEqual(yield* sh(two.vm, "test ! -e /srv/mine && echo apart"), "apart")
        assert.strictEqual(yield* sh(source, "test ! -e /srv/mine && echo apart"), "apart")
        yield* later(source, before)
        assert.deepStrictEqual(
          copies.map(({ vm }) => vm.name),
          copies.map(({ vm }) => `original/${vm.pid}`)
        )
        assert.isNull((yield* source.stats).rejuvenation)
        for (const { rejuvenation, vm } of copies) {
          assert.deepStrictEqual((yield* vm.stats).rejuvenation, rejuvenation)
          assert.includeMembers([...rejuvenation.renewed], ["random", "clock", "hostname", "generation"])
        }
        yield* Effect.forEach(streams, Fiber.interrupt)
      }).pipe(Effect.provide(program))
    )

    it.scopedLive("five generations, each a snapshot of the one before", () =>
      Effect.gen(function* () {
        let vm = yield* boot({ image })
        const nonce = yield* sh(vm, "cat /proc/sys/kernel/random/uuid | tee /dev/shm/nonce")
        for (const generation of [1, 2, 3, 4, 5]) {
          yield* sh(
            vm,
            `echo ${generation} >> /dev/shm/generations; dd if=/dev/urandom of=/data${generation} bs=64k count=16 2>/dev/null; sha256sum /data${generation} >> /dev/shm/sums`
          )
          const { bundle } = yield* snapshot(vm, false)
          vm = (yield* restore(bundle.dir)).vm
          assert.strictEqual(yield* sh(vm, "cat /dev/shm/nonce"), nonce)
          assert.strictEqual(yield* sh(vm, "wc -l < /dev/shm/generations"), String(generation))
          yield* sh(vm, "echo 3 > /proc/sys/vm/drop_caches; sha256sum -c /dev/shm/sums >/dev/null")
        }
        const { siblings } = yield* (yield* Machinen).fork(vm)
        assert.strictEqual(yield* sh(first(siblings).vm, "cat /dev/shm/nonce"), nonce)
      }).pipe(Effect.provide(program))
    )

    it.scopedLive("forks leave the source running, are named after it, and keep no files", () =>
      Effect.gen(function* () {
        const machinen = yield* Machinen
        const source = yield* boot({ image, name: "web" })
        yield* sh(source, "echo here > /dev/shm/here")
        const kept = newBundle()
        const { pausedMs, siblings } = yield* machinen.fork(source, { outDir: kept })
        assert.isAbove(pausedMs, 0)
        const sibling = first(siblings).vm
        assert.strictEqual(sibling.name, `web/${sibling.pid}`)
        assert.strictEqual((yield* machinen.attach(sibling.name ?? "")).id, sibling.id)
        assert.strictEqual(
          yield* sh(sibling, "hostname; cat /dev/shm/here; echo $MACHINEN_VM_NAME"),
          `web-${sibling.pid}\nhere\nweb/${sibling.pid}`
        )
        const grandchild = first((yield* machinen.fork(sibling, { name: "grandchild" })).siblings).vm
        assert.strictEqual(yield* sh(grandchild, "hostname; cat /dev/shm/here"), "grandchild\nhere")
        assert.strictEqual(yield* sh((yield* restore(kept)).vm, "cat /dev/shm/here"), "here")
        assert.strictEqual(yield* sh(source, "cat /dev/shm/here"), "here")
        const entries = readdirSync(path.join(home, "vms"))
        assert.deepStrictEqual(
          entries.filter((entry) => entry.startsWith(".")),
          []
        )
        yield* sibling.stop()
        assert.strictEqual(yield* sh(grandchild, "cat /dev/shm/here"), "here")
        assert.deepStrictEqual(
          readdirSync(path.join(home, "names")).sort(),
          ["grandchild", "web", ...(yield* namesOf("web/"))].sort()
        )
      }).pipe(Effect.provide(program))
    )

    it.scopedLive("the end of a main command ends its copies, each on its own", () =>
      Effect.gen(function* () {
        const source = yield* boot({
          image,
          command: ["sh", "-c", "while [ ! -s /go ]; do sleep 0.02; done; exit $(cat /go)"]
        })
        yield* source.startMainDetached
        const { siblings } = yield* (yield* Machinen).fork(source, { count: 2 })
        for (const [i, { vm }] of siblings.entries()) {
          // the guest may be gone before it has answered
          yield* Effect.ignore(vm.writeFile("/go", String(i + 5)))
          assert.deepStrictEqual((yield* vm.wait).main?.code, i + 5)
        }
        assert.strictEqual(yield* sh(source, "test ! -e /go && echo waits"), "waits")
      }).pipe(Effect.provide(program))
    )
  })

describe("snapshot, restore, fork", { timeout: 240_000 }, () => {
  afterEach(() => settled(home))

  // Slow (50 s): 50 guests write 5 GB in all; a page that is shared by mistake would not show in few.
  it.scopedLive("a bundle is the same after 50 restores that each wrote 100 MiB", () =>
    Effect.gen(function* () {
      const source = yield* boot()
      yield* sh(source, "echo kept > /kept")
      const { bundle } = yield* snapshot(source, false)
      const before = hashesOf(bundle.dir)
      yield* Effect.forEach(
        Array.from({ length: 50 }),
        () =>
          Effect.scoped(
            Effect.gen(function* () {
              const { vm } = yield* restore(bundle.dir)
              yield* sh(
                vm,
                "dd if=/dev/zero of=/dev/shm/fill bs=1M count=100 2>/dev/null && rm /dev/shm/fill; echo x > /kept"
              )
            })
          ),
        { concurrency: 3 }
      )
      assert.strictEqual(hashesOf(bundle.dir), before)
      assert.deepStrictEqual(yield* (yield* Machinen).verify(bundle.dir), [])
    }).pipe(Effect.provide(machine))
  )

  // Slow (90 s on 2 emulated cores): 64 Debian guests are restored, four at a time, and each starts Python.
  it.scopedLive("64 siblings have randomness, identity and time of their own", () =>
    Effect.gen(function* () {
      const source = yield* boot({ image: "debian", memoryMib: 256 })
      yield* sh(source, "echo 0123456789abcdef0123456789abcdef > /etc/machine-id")
      const { siblings } = yield* (yield* Machinen).fork(source, { count: 64 })
      const script =
        "import secrets,uuid,os;print(secrets.token_hex(16),uuid.uuid4(),os.getrandom(16).hex()," +
        "open('/dev/urandom','rb').read(16).hex(),open('/proc/sys/kernel/random/uuid').read().strip()," +
        "open('/etc/machine-id').read().strip(),open('/run/machinen/generation').read().strip(),os.uname().nodename)"
      const answers = yield* Effect.forEach(
        siblings,
        ({ vm }) =>
          Effect.gen(function* () {
            const { stdout } = yield* vm.exec({ argv: ["python3", "-c", script] })
            return Buffer.from(stdout).toString().trim().split(" ")
          }),
        { concurrency: 8 }
      )
      for (const column of Array.from({ length: 8 }).keys()) {
        assert.strictEqual(new Set(answers.map((answer) => answer[column])).size, 64, `column ${column}`)
      }
      for (const { vm } of siblings) assert.isAtMost(yield* clockOffBy(vm), 100, vm.name)
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("a copy of a machine whose clock stood for an hour has the right time", () =>
    Effect.gen(function* () {
      const source = yield* boot()
      yield* sh(
        source,
        `date -s @$(($(date +%s) - 3600)) >/dev/null; sleep 1800 </dev/null >/dev/null 2>&1 & echo $! > /dev/shm/sleeper`
      )
      const { bundle } = yield* snapshot(source, false)
      const { rejuvenation, vm } = yield* restore(bundle.dir)
      assert.isAbove(rejuvenation.clockStepMs, 3_590_000)
      assert.isBelow(yield* clockOff(vm), 1000)
      assert.strictEqual(yield* sh(vm, "kill -0 $(cat /dev/shm/sleeper) && echo sleeps"), "sleeps")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("a source has the host's time after every standstill", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const vm = yield* boot({ image: "debian" })
      yield* vm.pause
      yield* Effect.sleep("1500 millis")
      yield* vm.resume
      assert.isBelow(yield* clockOffBy(vm), 200, "after a pause")
      const offs: Array<number> = []
      for (const engine of ["vmstate", "criu"] as const) {
        for (const _ of [1, 2]) {
          yield* machinen.snapshot(vm, { outDir: newBundle(), leaveRunning: true, engine })
          offs.push(yield* clockOffBy(vm))
          yield* Effect.scoped(Effect.asVoid(machinen.fork(vm, { engine })))
          offs.push(yield* clockOffBy(vm))
        }
      }
      assert.isBelow(Math.max(...offs), 60, `after snapshots and forks: ${offs}`)
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("a stream of the source is whole across snapshots under load", () =>
    Effect.gen(function* () {
      const source = yield* boot()
      yield* sh(
        source,
        "(while :; do dd if=/dev/zero of=/load bs=64k count=64 conv=fsync; done) </dev/null >/dev/null 2>&1 &"
      )
      const running = yield* source.start("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo line $i; done")
      const reading = yield* running.output.pipe(
        Stream.map(({ bytes }) => bytes),
        Stream.decodeText(),
        Stream.splitLines,
        Stream.runCollect,
        Effect.fork
      )
      for (const _ of [1, 2, 3]) {
        const { bundle } = yield* snapshot(source)
        yield* Effect.scoped(
          Effect.gen(function* () {
            const { vm } = yield* restore(bundle.dir)
            yield* sh(
              vm,
              "dd if=/dev/zero of=/more bs=64k count=16 conv=fsync 2>/dev/null; dmesg | grep -iE 'ext4.*error|I/O error' || true"
            ).pipe(Effect.map((errors) => assert.strictEqual(errors, "")))
          })
        )
      }
      const lines = Chunk.toReadonlyArray(yield* Fiber.join(reading))
      assert.deepStrictEqual([lines.length, lines.findIndex((line, i) => line !== `line ${i + 1}`)], [20000, -1])
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive.each([2, 4])("%i vCPUs go on, each of them", (vcpus) =>
    Effect.gen(function* () {
      const source = yield* boot({ vcpus })
      const cpus = [...Array.from({ length: vcpus }).keys()]
      const count = (i: number) =>
        `echo $$ >/dev/shm/pid${i}; n=0; while :; do n=$((n+1)); echo $n >/dev/shm/cpu${i}; sleep 0.02; done`
      for (const i of cpus) {
        yield* sh(source, `taskset ${(1 << i).toString(16)} sh -c '${count(i)}' </dev/null >/dev/null 2>&1 &`)
        yield* eventuallyIn(source, `test -s /dev/shm/cpu${i}`)
      }
      const { bundle } = yield* snapshot(source, false)
      const { vm } = yield* restore(bundle.dir)
      assert.strictEqual(yield* sh(vm, "grep -c ^processor /proc/cpuinfo"), String(vcpus))
      for (const i of cpus) {
        // what ran on that CPU goes on there
        const pid = yield* sh(vm, `cat /dev/shm/pid${i}`)
        assert.strictEqual(
          yield* sh(vm, `sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/${pid}/status`),
          String(i)
        )
        const at = yield* sh(vm, `until n=$(cat /dev/shm/cpu${i}); [ "$n" ]; do :; done; echo $n`)
        yield* eventuallyIn(vm, `test $(cat /dev/shm/cpu${i}) -gt ${at}`)
      }
      const again = first((yield* (yield* Machinen).fork(vm)).siblings).vm
      assert.strictEqual(yield* sh(again, "grep -c ^processor /proc/cpuinfo"), String(vcpus))
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("an image that was moved is named to the restore, and must be the same", () =>
    Effect.gen(function* () {
      const image = busyboxExt4(home, "moved")
      const source = yield* boot({ image })
      yield* sh(source, "echo kept > /kept")
      const { bundle } = yield* snapshot(source, false)
      const elsewhere = path.join(home, "elsewhere.ext4")
      renameSync(image, elsewhere)
      const restoring = (options: Partial<RestoreOptions>) =>
        Effect.flatMap(Machinen, (m) => m.restore({ snapDir: bundle.dir, ...options }))
      const gone = yield* Effect.flip(Effect.asVoid(restoring({})))
      assert.deepStrictEqual([gone.code, gone.message.includes(`is gone: ${image}`)], ["BOOT_SNAPSHOT_MISMATCH", true])
      const other = yield* Effect.flip(Effect.asVoid(restoring({ image: busyboxExt4(home, "other") })))
      assert.deepStrictEqual([other.code, other.message.includes("is another one")], ["BOOT_SNAPSHOT_MISMATCH", true])
      const { vm } = yield* restoring({ image: elsewhere })
      assert.strictEqual(yield* sh(vm, "cat /kept /etc/mark"), "kept\nmoved")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("a root disk of the user's own is copied, not shared", () =>
    Effect.gen(function* () {
      const image = busyboxExt4(home, "own")
      const source = (yield* (yield* Machinen).boot({ rootDisk: image })).vm
      yield* sh(source, "echo before > /etc/mine")
      const { bundle } = yield* snapshot(source)
      const { vm } = yield* restore(bundle.dir)
      assert.strictEqual(yield* sh(vm, "cat /etc/mine; echo after > /etc/mine"), "before")
      assert.strictEqual(yield* sh(source, "cat /etc/mine"), "before")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("pauses and resumes a hundred times, and works", () =>
    Effect.gen(function* () {
      const vm = yield* boot()
      for (let i = 0; i < 100; i++) {
        yield* vm.pause
        yield* vm.resume
      }
      assert.strictEqual(yield* sh(vm, "echo on"), "on")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("a host without memory to spare refuses a fork, and an unknown engine is named", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const source = yield* boot()
      const codes = yield* Effect.forEach(
        [{ freeMemoryThreshold: 1 }, { count: 0 }, { count: 2, name: "two" }, { name: "no//name" }],
        (options) => Effect.map(Effect.flip(Effect.scoped(machinen.fork(source, options))), ({ code }) => code)
      )
      assert.deepStrictEqual(codes, [
        "FORK_MEMORY_BACKPRESSURE",
        "BOOT_OPTION_INVALID",
        "BOOT_OPTION_INVALID",
        "REGISTRY_NAME_INVALID"
      ])
      assert.strictEqual(yield* sh(source, "echo on"), "on")
    }).pipe(Effect.provide(machine))
  )

  it.live("the CLI takes, shows, checks, restores and forks", () =>
    Effect.gen(function* () {
      const run = (...args: ReadonlyArray<string>) => cliPrints(home, ...args)
      yield* run("boot", "--image", "micro", "--name", "cli", "--detach")
      yield* run("exec", "cli", "--", "sh", "-c", "echo nonce > /dev/shm/nonce")
      const dir = newBundle()
      yield* run("snapshot", "cli", dir, "--dry-run")
      assert.isFalse(existsSync(dir))
      assert.strictEqual(yield* run("snapshot", "cli", dir, "--keep-alive"), dir)
      assert.isTrue(JSON.parse(yield* run("snapshot", "inspect", dir, "--json")).restorable)
      assert.include(yield* run("snapshot", "inspect", dir), "it can be restored here")
      assert.deepStrictEqual(JSON.parse(yield* run("snapshot", "verify", dir, "--json")), { sound: true, damaged: [] })
      const restored = JSON.parse(yield* run("restore", dir, "--name", "again", "--detach", "--json"))
      assert.strictEqual(restored.forkedFrom, dir)
      assert.strictEqual(yield* run("exec", "again", "--", "cat", "/dev/shm/nonce"), "nonce")
      const forked = JSON.parse(yield* run("fork", "again", "--count", "2", "--detach", "--json"))
      assert.strictEqual(forked.siblings.length, 2)
      for (const { name } of forked.siblings)
        assert.strictEqual(yield* run("exec", name, "--", "cat", "/dev/shm/nonce"), "nonce")
      const gone = newBundle()
      yield* run("snapshot", "cli", gone)
      const left = JSON.parse(yield* run("ls", "--json")).map(({ name }: { name: string }) => name)
      assert.deepStrictEqual(
        left.sort(),
        ["again", ...forked.siblings.map(({ name }: { name: string }) => name)].sort()
      )
      const wrong = yield* cli(home, ["snapshot", "again", newBundle()], { env: { MACHINEN_SNAPSHOT_ENGINE: "magic" } })
      assert.deepStrictEqual([wrong.code, wrong.stderr.includes("BOOT_SNAPSHOT_ENGINE_INVALID")], [1, true])
      for (const name of left) yield* run("stop", name)
      assert.include(readFileSync(path.join(dir, "meta.json"), "utf8"), '"format":1')
    })
  )
})

const first = (siblings: ReadonlyArray<Restored>): Restored => {
  const [sibling] = siblings
  return sibling ?? assert.fail("there is no sibling")
}

const namesOf = (prefix: string) =>
  Effect.map(
    Effect.flatMap(Machinen, (m) => m.list),
    (all) => all.flatMap(({ name }) => (name?.startsWith(prefix) === true ? [encodeURIComponent(name)] : []))
  )
