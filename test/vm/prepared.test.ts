import { execFileSync } from "node:child_process"
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  utimesSync,
  writeFileSync
} from "node:fs"
import * as path from "node:path"
import { afterEach, assert, beforeEach, describe, it } from "@effect/vitest"
import { Effect, Stream } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import type { BootOptions } from "../../src/machine/BootOptions.ts"
import { macOf } from "../../src/machine/Network.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import {
  assertNothingLeft,
  assertNothingLeftAfterNextCommand,
  boot,
  busyboxExt4,
  cli,
  eventually,
  fakeVmm,
  hang,
  hashesOf,
  live,
  newBundle,
  processesOf,
  settled,
  sh,
  startCli,
  temporaryHome
} from "../fixtures.ts"

const home = temporaryHome()
/** Templates of its own, to be damaged; and no probe for KVM in a cache that is new. */
const settings = { MACHINEN_CACHE_DIR: path.join(home, "cache"), MACHINEN_ACCEL: "tcg" }
const templatesDir = path.join(settings.MACHINEN_CACHE_DIR, "templates")
const program = live(home, settings)

const prepare = (image = "micro") => Effect.flatMap(Machinen, (m) => m.prepare({ image }))
const isPrepared = (vm: Vm) => vm.entry.prepared ?? false

const withSystemPrograms = { PATH: `${process.env["PATH"]}:/usr/sbin:/sbin` }

/** What a program can see of who and where it is. */
const surroundings = [
  "env | sort",
  "pwd",
  "id",
  "cat /etc/resolv.conf /proc/cmdline",
  "ip route 2>/dev/null",
  "cat /proc/mounts | grep -v /run/machinen",
  "ulimit -a",
  "ls / /tmp"
].join("; ")

describe("a prepared machine", { timeout: 240_000 }, () => {
  beforeEach(() => Effect.runPromise(Effect.provide(prepare(), program)))
  afterEach(() => settled(home))

  it.scopedLive("is what a boot with a kernel gives, with an identity of its own", () =>
    Effect.gen(function* () {
      const options = { env: { GREETING: "hello wörld" }, cwd: "/etc", user: "0:0" }
      const [one, two, cold] = yield* Effect.all([
        boot({ ...options, name: "machine-1" }),
        boot({ ...options, name: "machine-2" }),
        boot({ ...options, name: "machine-3", prepared: false })
      ])
      assert.deepStrictEqual([one, two, cold].map(isPrepared), [true, true, false])
      const named = (text: string, vm: Vm) => text.replaceAll(vm.name ?? "", "NAME").replaceAll(/\b[0-9]+kB\b/g, "")
      const seen = yield* Effect.forEach([one, two, cold], (vm) =>
        Effect.map(sh(vm, surroundings), (text) => named(text, vm))
      )
      assert.include(seen[2], "GREETING=hello wörld")
      assert.deepStrictEqual(seen.slice(0, 2), [seen[2] ?? "", seen[2] ?? ""])
      for (const vm of [one, two]) {
        assert.strictEqual(
          yield* sh(vm, "hostname; cat /sys/class/net/eth0/address"),
          `${vm.name}\n${macOf(vm.entry.id)}`
        )
        assert.isUndefined(vm.entry.forkedFrom)
        // nobody in it has been copied
        assert.isNull((yield* vm.stats).rejuvenation)
        assert.strictEqual(yield* sh(vm, "cat /run/machinen/generation"), "")
        const before = Math.floor(Date.now() / 1000)
        const guest = Number(yield* sh(vm, "date +%s"))
        assert.isTrue(guest >= before - 1 && guest <= Date.now() / 1000 + 1)
        assert.isBelow((yield* vm.stats).uptimeMs, 120_000)
      }
      for (const secret of [
        "head -c 32 /dev/urandom | sha256sum",
        "cat /proc/sys/kernel/random/uuid",
        "cat /proc/sys/kernel/random/boot_id"
      ]) {
        assert.notStrictEqual(yield* sh(one, secret), yield* sh(two, secret))
      }
      const entries = yield* (yield* Machinen).list
      assert.deepStrictEqual(
        entries.map(({ state }) => state),
        ["running", "running", "running"]
      )
    }).pipe(Effect.provide(program))
  )

  it.scopedLive("of an image with a machine id has another one", () =>
    Effect.gen(function* () {
      const image = busyboxExt4(home, "identified")
      const id = "0123456789abcdef0123456789abcdef"
      writeFileSync(path.join(home, "machine-id"), `${id}\n`)
      const commands = `cd /etc\nwrite ${path.join(home, "machine-id")} machine-id\n`
      execFileSync("debugfs", ["-w", "-f", "-", image], {
        input: commands,
        env: withSystemPrograms,
        stdio: ["pipe", "ignore", "ignore"]
      })
      yield* prepare(image)
      const vms = yield* Effect.forEach([1, 2], () => boot({ image }))
      assert.isTrue(vms.every(isPrepared))
      const ids = yield* Effect.forEach(vms, (vm) => sh(vm, "cat /etc/machine-id"))
      for (const own of ids) assert.match(own, /^[0-9a-f]{32}$/)
      assert.strictEqual(new Set([id, ...ids]).size, 3)
    }).pipe(Effect.provide(program))
  )

  it.scopedLive("runs its main command, attached and detached", () =>
    Effect.gen(function* () {
      const script = ["sh", "-c", "read line; echo got $line in $PWD; exit 5"] as const
      const vm = yield* boot({ command: script, cwd: "/tmp" })
      assert.isTrue(isPrepared(vm))
      const main = yield* vm.startMain(Stream.make(Buffer.from("this\n")))
      const output = yield* main.output.pipe(
        Stream.map(({ bytes }) => Buffer.from(bytes).toString()),
        Stream.mkString
      )
      assert.strictEqual(output, "got this in /tmp\n")
      assert.strictEqual((yield* vm.wait).main?.code, 5)

      const { code, stdout } = yield* cli(
        home,
        ["boot", "--detach", "--image", "micro", "--name", "free", "--json", "--", "sh", "-c", "echo out; sleep 1000"],
        { env: settings }
      )
      assert.strictEqual(code, 0)
      const shown = JSON.parse(stdout)
      assert.deepStrictEqual([shown.prepared, shown.detached], [true, true])
      const free = yield* (yield* Machinen).attach("free")
      assert.isTrue(free.entry.detached)
      const log = yield* free.logs("output", { follow: true }).pipe(
        Stream.decodeText(),
        Stream.takeUntil((text) => text.includes("out\n")),
        Stream.mkString
      )
      assert.strictEqual(log, "out\n")
      yield* free.pause
      yield* free.resume
      assert.strictEqual(yield* sh(free, "echo awake"), "awake")
      const { orderly, vmm } = yield* free.stop()
      assert.deepStrictEqual([orderly, { ...vmm }], [true, { code: 0, signal: null }])
    }).pipe(Effect.provide(program))
  )

  it.scopedLive("is captured, restored and forked like any other, and the template stays as it was", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      // small: all of it is read
      const shape = { memoryMib: 128, rootDiskSizeBytes: 64 * 2 ** 20 }
      const { dir } = yield* machinen.prepare({ image: "micro", ...shape })
      const before = hashesOf(dir)
      const source = yield* boot({ ...shape, name: "source", env: { KEPT: "yes" } })
      assert.isTrue(isPrepared(source))
      yield* sh(source, "head -c 6000000 /dev/urandom > /dev/shm/fill; head -c 6000000 /dev/urandom > /fill; sync")
      const sums = yield* sh(source, "sha256sum /fill /dev/shm/fill")
      const outDir = newBundle()
      yield* machinen.snapshot(source, { outDir, leaveRunning: true })
      assert.deepStrictEqual(yield* machinen.verify(outDir), [])
      const { vm: copy, rejuvenation } = yield* machinen.restore({ snapDir: outDir })
      const [sibling] = (yield* machinen.fork(source, { name: "sibling" })).siblings
      if (sibling === undefined) return assert.fail("a sibling was asked for")
      for (const vm of [copy, sibling.vm]) {
        assert.isFalse(isPrepared(vm))
        assert.isDefined(vm.entry.forkedFrom)
        assert.strictEqual(yield* sh(vm, "sha256sum /fill /dev/shm/fill; echo $KEPT"), `${sums}\nyes`)
        assert.match(yield* sh(vm, "cat /run/machinen/generation"), /^[0-9a-f-]{36}$/)
      }
      assert.deepStrictEqual((yield* copy.stats).rejuvenation, rejuvenation)
      assert.strictEqual(yield* sh(source, "sha256sum /fill /dev/shm/fill; cat /run/machinen/generation"), sums)
      assert.strictEqual(hashesOf(dir), before)
    }).pipe(Effect.provide(program))
  )

  it.scopedLive("is dumped and revived by criu", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      yield* prepare("debian")
      const source = yield* boot({ image: "debian", env: { KEPT: "yes" } })
      assert.isTrue(isPrepared(source))
      yield* sh(
        source,
        "setsid sh -c 'n=0; while :; do n=$((n+1)); echo $n $KEPT > /dev/shm/n; sleep 0.05; done' >/dev/null 2>&1 </dev/null &"
      )
      const outDir = path.join(home, "processes")
      yield* machinen.snapshot(source, { outDir, engine: "criu" })
      const { vm } = yield* machinen.restore({ snapDir: outDir })
      const [at = ""] = (yield* sh(vm, "cat /dev/shm/n")).split(" ")
      yield* sh(vm, `until [ $(cut -d' ' -f1 /dev/shm/n) -gt ${at} ]; do sleep 0.05; done`)
      assert.match(yield* sh(vm, "cat /dev/shm/n"), / yes$/)
    }).pipe(Effect.provide(program))
  )

  it.scopedLive("is used only by boots of its shape", () =>
    Effect.gen(function* () {
      const rootDisk = busyboxExt4(home, "own")
      mkdirSync(path.join(home, "shared"))
      const others: ReadonlyArray<BootOptions> = [
        { prepared: false },
        { memoryMib: 256 },
        { vcpus: 2 },
        { network: "none" },
        { rootDiskSizeBytes: 2 ** 30 },
        { mount: { host: path.join(home, "shared"), guest: "/mnt/shared" } },
        { image: rootDisk }
      ]
      for (const options of others) {
        const vm = yield* Effect.scoped(boot(options))
        assert.isFalse(isPrepared(vm), JSON.stringify(options))
      }
      const { vm } = yield* (yield* Machinen).boot({ rootDisk })
      assert.isFalse(isPrepared(vm))
      yield* vm.kill
      const off = yield* Effect.scoped(boot()).pipe(
        Effect.provide(live(home, { ...settings, MACHINEN_PREPARED: "off" }))
      )
      assert.isFalse(isPrepared(off))
    }).pipe(Effect.provide(program))
  )
})

describe("a template", { timeout: 240_000 }, () => {
  afterEach(() => settled(home))

  /** Changes a file behind its back: it keeps size and times. */
  const corrupt = (file: string) => {
    const { atime, mtime, size } = statSync(file)
    const bytes = readFileSync(file)
    bytes.fill(0xa5, Math.floor(size / 3), Math.floor((size * 2) / 3))
    writeFileSync(file, bytes)
    utimesSync(file, atime, mtime)
  }
  const damages: ReadonlyArray<readonly [what: string, damage: (dir: string) => void]> = [
    ["gone", (dir) => rmSync(dir, { recursive: true })],
    ["without its manifest", (dir) => rmSync(path.join(dir, "meta.json"))],
    ["with a manifest that makes no sense", (dir) => writeFileSync(path.join(dir, "meta.json"), "{}")],
    ["without its record", (dir) => rmSync(path.join(dir, "template.json"))],
    ["without its memory", (dir) => rmSync(path.join(dir, "memory"))],
    ["whose memory was cut", (dir) => truncateSync(path.join(dir, "memory"), 2 ** 20)],
    ["whose disk was written to", (dir) => writeFileSync(path.join(dir, "upper.img"), "x", { flag: "r+" })],
    ["whose state is noise, unnoticed until the VMM reads it", (dir) => corrupt(path.join(dir, "state"))]
  ]
  for (const [what, damage] of damages) {
    it.live(`${what} is not used, and mended by preparing again`, () =>
      Effect.gen(function* () {
        const { dir } = yield* prepare()
        assert.isTrue(yield* Effect.scoped(Effect.map(boot(), isPrepared)))
        damage(dir)
        yield* Effect.scoped(
          Effect.gen(function* () {
            const vm = yield* boot({ name: "cold", env: { GREETING: "hello" } })
            assert.isFalse(isPrepared(vm))
            assert.strictEqual(yield* sh(vm, "echo $GREETING from $(hostname)"), "hello from cold")
            assert.strictEqual(processesOf(home).length, 2)
          })
        )
        assertNothingLeft(home)
        assert.deepInclude(yield* prepare(), { dir, made: true })
        assert.deepInclude(yield* prepare(), { dir, made: false })
        assert.isTrue(yield* Effect.scoped(Effect.map(boot(), isPrepared)))
      }).pipe(Effect.provide(program))
    )
  }

  it.live("that hangs costs half of the time limit, and a kernel is booted", () =>
    Effect.gen(function* () {
      yield* prepare()
      // begun as a template, this VMM does nothing; asked for its version or with a kernel it is QEMU
      const body = `case "$*" in *-incoming*) ${hang(home)} ;; esac; exec qemu-system-x86_64 "$@"`
      const hanging = { ...settings, MACHINEN_VMM: fakeVmm(home, "hangs", body), MACHINEN_BOOT_TIMEOUT: "30 seconds" }
      yield* Effect.gen(function* () {
        const vm = yield* boot({ name: "cold" })
        assert.isFalse(isPrepared(vm))
        assert.strictEqual(yield* sh(vm, "hostname"), "cold")
        assert.strictEqual(processesOf(home).length, 2)
      }).pipe(Effect.scoped, Effect.provide(live(home, hanging)))
      assertNothingLeft(home)
    }).pipe(Effect.provide(program))
  )

  it.live("of another shape under its name is not used", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const { dir } = yield* prepare()
      const small = yield* machinen.prepare({ image: "micro", memoryMib: 128 })
      rmSync(dir, { recursive: true })
      execFileSync("cp", ["--recursive", "--preserve=all", "--sparse=always", small.dir, dir])
      assert.isFalse(yield* Effect.scoped(Effect.map(boot(), isPrepared)))
      assert.isTrue((yield* prepare()).made)
    }).pipe(Effect.provide(program))
  )

  it.live("is made once for any number of concurrent callers", () =>
    Effect.gen(function* () {
      rmSync(templatesDir, { recursive: true, force: true })
      const all = yield* Effect.all([prepare(), prepare(), prepare()], { concurrency: "unbounded" })
      assert.deepStrictEqual(all.map(({ made }) => made).sort(), [false, false, true])
      assert.lengthOf(readdirSync(templatesDir), 1)
    }).pipe(Effect.provide(program))
  )

  it.live("whose image has changed is removed by gc alone, as is what a killed maker left", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const image = busyboxExt4(home, "changing")
      yield* prepare()
      const { dir } = yield* prepare(image)
      assert.isTrue(yield* Effect.scoped(Effect.map(boot({ image }), isPrepared)))
      utimesSync(image, 1, 1)
      assert.isFalse(yield* Effect.scoped(Effect.map(boot({ image }), isPrepared)))
      const left = `${path.join(templatesDir, "0".repeat(32))}.making`
      mkdirSync(left)
      const removed = [left, dir].sort()
      for (const dryRun of [true, false]) {
        const found = yield* machinen.gc({ dryRun })
        assert.deepStrictEqual(found.flatMap(({ removedPaths }) => removedPaths).sort(), removed)
        assert.deepStrictEqual(removed.map(existsSync), [dryRun, dryRun])
      }
      assert.deepStrictEqual(yield* machinen.gc(), [])
      assert.isTrue(yield* Effect.scoped(Effect.map(boot(), isPrepared)))
    }).pipe(Effect.provide(program))
  )

  it.scopedLive("whose maker is killed leaves nothing", () =>
    Effect.gen(function* () {
      const made = () => (existsSync(templatesDir) ? readdirSync(templatesDir) : [])
      const steps: ReadonlyArray<readonly [string, () => boolean]> = [
        ["a VMM", () => processesOf(home).some(({ argv }) => argv.startsWith("qemu-system"))],
        ["a bundle in the making", () => made().length > 0],
        ["its memory", () => made().some((name) => existsSync(path.join(templatesDir, name, "memory")))]
      ]
      for (const [what, reached] of steps) {
        rmSync(templatesDir, { recursive: true, force: true })
        const maker = yield* startCli(home, ["prepare", "--image", "micro"], { env: settings })
        yield* eventually(what, reached)
        yield* maker.kill("SIGKILL")
        yield* maker.result
        yield* assertNothingLeftAfterNextCommand(home)
        yield* Effect.gen(function* () {
          assert.isTrue((yield* prepare()).made)
          assert.isTrue(yield* Effect.scoped(Effect.map(boot(), isPrepared)))
          assert.lengthOf(readdirSync(templatesDir), 1)
        }).pipe(Effect.provide(program))
      }
    })
  )
})
