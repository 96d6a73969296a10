import { execFileSync } from "node:child_process"
import { createHmac } from "node:crypto"
import * as fs from "node:fs"
import * as path from "node:path"
import { afterEach, assert, beforeAll, describe, it } from "@effect/vitest"
import { Effect, Either, type Scope } from "effect"
import type { YieldWrap } from "effect/Utils"
import { Machinen } from "../../src/Machinen.ts"
import type { BootOptions } from "../../src/machine/BootOptions.ts"
import { channelVersion } from "../../src/snapshot/BundleManifest.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import {
  assertNothingLeft,
  assertNothingLeftAfterNextCommand,
  atOnce,
  type CliProcess,
  cli,
  eventually,
  inTime,
  leftovers,
  live,
  newBundle,
  processesOf,
  settled,
  sh,
  sha256,
  smallDisk,
  startCli,
  temporaryDirectory,
  temporaryHome,
  vmEntry,
  vmIds
} from "../fixtures.ts"

const home = temporaryHome()
const vmsDir = path.join(home, "vms")
afterEach(() => settled(home))

const run = <A, E>(effect: Effect.Effect<A, E, Machinen | Scope.Scope>, where = home) =>
  effect.pipe(Effect.scoped, Effect.provide(live(where)))
type Body = () => Generator<YieldWrap<Effect.Effect<unknown, unknown, Machinen | Scope.Scope>>, unknown, never>
const test = (name: string, body: Body) => it.live(name, () => run(Effect.gen(body)))

/** Something in the guest that runs on its own: it stands still while it is frozen. */
const heart = "(i=0; while :; do i=$((i+1)); echo $i >/dev/shm/beat; sleep 0.02; done) </dev/null >/dev/null 2>&1 &"
/** Ends when it has been seen to beat. */
const pulse =
  'b() { cat /dev/shm/beat; }; until [ "$(b)" ]; do :; done; n=$(b); while [ "$(b)" = "$n" ]; do :; done 2>&1'
const source = (options: BootOptions = {}) =>
  Effect.gen(function* () {
    const { vm } = yield* (yield* Machinen).boot({ image: "micro", ...options })
    yield* sh(vm, heart)
    return vm
  })
const goesOn = (vm: Vm) => sh(vm, pulse)
const snap = (vm: Vm, outDir: string) => Effect.flatMap(Machinen, (m) => m.snapshot(vm, { outDir, leaveRunning: true }))
const verify = (dir: string) => Effect.flatMap(Machinen, (m) => m.verify(dir))
const restore = (snapDir: string) => Effect.flatMap(Machinen, (m) => m.restore({ snapDir }))
/** Restores it, and finds its processes going on. */
const restorable = (dir: string) => Effect.scoped(Effect.flatMap(restore(dir), ({ vm }) => goesOn(vm)))
/** The error of what must fail, without a VM in the report when it does not. */
const failure = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
  Effect.flip(Effect.zipRight(effect, Effect.dieMessage("it succeeded")))

/** Two bundles of two VMs, made once and never changed. */
const sound = { one: newBundle(), other: newBundle() }
beforeAll(() =>
  run(Effect.forEach([sound.one, sound.other], (dir) => Effect.flatMap(source(), (vm) => snap(vm, dir)))).pipe(
    Effect.runPromise
  )
)
const copied = (): string => {
  const dir = newBundle()
  execFileSync("cp", ["-r", "--sparse=always", sound.one, dir])
  return dir
}

const flip = (file: string, at: number, bit = 0) => {
  const fd = fs.openSync(file, "r+")
  const byte = Buffer.alloc(1)
  fs.readSync(fd, byte, 0, 1, at)
  fs.writeSync(fd, Buffer.from([(byte[0] ?? 0) ^ (1 << bit)]), 0, 1, at)
  fs.closeSync(fd)
}
/** Where a block of data begins, in the middle if the file has any there. */
const data = (file: string): number => {
  const fd = fs.openSync(file, "r")
  const blocks = Math.floor(fs.fstatSync(fd).size / 4096)
  const block = Buffer.alloc(4096)
  for (let i = 0; i < blocks; i++) {
    const at = ((i + Math.floor(blocks / 2)) % blocks) * 4096
    fs.readSync(fd, block, 0, 4096, at)
    if (block.some((byte) => byte !== 0)) return at
  }
  return assert.fail(`${file} is empty`)
}

/** Restoring must be refused before anything is started: not even a directory for the VM was made. */
const refused = (dir: string) =>
  Effect.gen(function* () {
    const before = fs.statSync(vmsDir, { bigint: true }).mtimeNs
    const error = yield* failure(restore(dir))
    assert.isNotEmpty(error.message)
    assert.isNotEmpty(error.hint ?? "")
    assert.strictEqual(fs.statSync(vmsDir, { bigint: true }).mtimeNs, before)
    assertNothingLeft(home)
    return error
  })

describe("a damaged bundle", () => {
  const damages: ReadonlyArray<readonly [what: string, harm: (file: string, blob: string) => void]> = [
    ["has a flipped bit", (file) => flip(file, data(file))],
    ["is missing", (file) => fs.rmSync(file)],
    ["is another VM's", (file, blob) => execFileSync("cp", ["--sparse=always", path.join(sound.other, blob), file])],
    ["has lost its end", (file) => fs.truncateSync(file, Math.floor(fs.statSync(file).size / 2))]
  ]
  for (const blob of ["memory", "upper.img", "state"]) {
    for (const [what, harm] of damages) {
      test(`whose ${blob} ${what} is found to be damaged`, function* () {
        const dir = copied()
        harm(path.join(dir, blob), blob)
        assert.deepStrictEqual(yield* verify(dir), [blob])
        // one bit in a large file is only found by reading all of it
        if (what !== "has a flipped bit" || blob === "state") {
          assert.strictEqual((yield* refused(dir)).code, "BOOT_SNAPSHOT_INVALID")
        }
      })
    }
  }

  test("with any bit of meta.json flipped is refused", function* () {
    const dir = copied()
    const meta = path.join(dir, "meta.json")
    const { size } = fs.statSync(meta)
    for (let i = 0; i < 24; i++) {
      const at = Math.floor((i * size) / 24)
      flip(meta, at, i % 8)
      // one in the MAC makes it somebody else's
      assert.match((yield* refused(dir)).code, /^BOOT_SNAPSHOT_(INVALID|MISMATCH|NOT_FOUND|FOREIGN)$/, `byte ${at}`)
      flip(meta, at, i % 8)
    }
    assert.deepStrictEqual(yield* verify(dir), [])
  })

  const notBundles: ReadonlyArray<readonly [what: string, make: () => string]> = [
    ["a directory without meta.json", () => temporaryDirectory()],
    ["a directory that is not there", newBundle],
    ["a file", () => path.join(sound.one, "meta.json")]
  ]
  for (const [what, make] of notBundles) {
    test(`${what} is no bundle`, function* () {
      assert.strictEqual((yield* refused(make())).code, "BOOT_SNAPSHOT_NOT_FOUND")
    })
  }
})

describe("a bundle that is sound, but not of this host", () => {
  // biome-ignore lint/suspicious/noExplicitAny: these are forged
  type Forged = any
  const forged = (change: (manifest: Forged) => void): string => {
    const dir = copied()
    const { checksum: _, mac: __, ...manifest } = JSON.parse(fs.readFileSync(path.join(dir, "meta.json"), "utf8"))
    change(manifest)
    const text = JSON.stringify(manifest)
    const checksum = sha256(Buffer.from(text))
    // signed with the user's own key: what is wrong with it is found all the same
    const mac = createHmac("sha256", fs.readFileSync(path.join(home, "bundle.key")))
      .update(text)
      .digest("hex")
    fs.writeFileSync(path.join(dir, "meta.json"), JSON.stringify({ ...manifest, checksum, mac }))
    return dir
  }
  const image = (manifest: Forged) =>
    manifest.disks.find((disk: Forged) => disk.source._tag === "Image")?.source ?? assert.fail("no image")
  const zeros = "0".repeat(64)
  const rows: ReadonlyArray<readonly [what: string, change: (m: Forged) => void, message: RegExp, code?: string]> = [
    ["format", (m) => Object.assign(m, { format: 2 }), /has format 2; this version reads format 1/],
    ["backend", (m) => Object.assign(m.machine, { backend: "bhyve" }), /the backend was bhyve/],
    ["VMM version", (m) => Object.assign(m.machine, { vmmVersion: "1.0" }), /the VMM's version was 1\.0/],
    ["accelerator", (m) => Object.assign(m.machine, { accel: otherOf(m.machine.accel) }), /the accelerator was/],
    ["machine type", (m) => Object.assign(m.machine, { machine: "pdp11" }), /the machine type was pdp11/],
    ["CPU model", (m) => Object.assign(m.machine, { cpu: "z80" }), /the CPU model was z80/],
    ["TSC rate", (m) => Object.assign(m.machine, { tscKhz: 1000 }), /the TSC rate in kHz was 1000/],
    ["list of devices", (m) => m.machine.devices.reverse(), /the list of devices was/],
    [
      "channel",
      (m) => Object.assign(m, { channel: channelVersion - 1 }),
      new RegExp(`the version of the guest's channel was ${channelVersion - 1}, here it is ${channelVersion}`)
    ],
    ["channel, which manifests did not record then", (m) => void delete m.channel, /the guest's channel was 1/],
    ["kernel", (m) => Object.assign(m, { kernelSha256: zeros }), /another guest kernel/],
    ["memory size", (m) => Object.assign(m, { memoryMib: 256 }), /its memory has 536870912 bytes, the machine 256 MiB/],
    ["image", (m) => Object.assign(image(m), { sha256: zeros }), /the image of its disk "root" is another one/],
    ["place of its image", (m) => Object.assign(image(m), { path: "/no/such" }), /disk "root" is gone: \/no\/such/],
    ["engine", (m) => Object.assign(m, { engine: "magic" }), /something else than a manifest/, "BOOT_SNAPSHOT_INVALID"],
    [
      "path of a blob, outside of the bundle",
      (m) => Object.assign(m.blobs[0], { name: "../state" }),
      /damaged/,
      "BOOT_SNAPSHOT_INVALID"
    ]
  ]
  const otherOf = (accel: string) => (accel === "tcg" ? "kvm" : "tcg")
  for (const [what, change, message, code] of rows) {
    test(`is refused for another ${what}`, function* () {
      const error = yield* refused(forged(change))
      assert.strictEqual(error.code, code ?? "BOOT_SNAPSHOT_MISMATCH")
      assert.match(error.message, message)
    })
  }

  const unlisted: typeof rows = [
    ["a disk outside of the bundle", (m) => Object.assign(m.disks.at(-1).source, { name: "../../etc/passwd" }), /./],
    ["no list of blobs", (m) => Object.assign(m, { blobs: [] }), /./],
    ["a blob twice", (m) => m.blobs.push(m.blobs[0]), /./]
  ]
  for (const [what, change] of unlisted) {
    test(`${what} is refused before anything starts`, function* () {
      assert.match((yield* refused(forged(change))).code, /^BOOT_SNAPSHOT_(INVALID|MISMATCH)$/)
    })
  }
})

describe("a directory that cannot hold a bundle", () => {
  const listing = (dir: string) => execFileSync("find", [dir, "-printf", "%p %y %s %T@\n"]).toString()
  const full = () => {
    const dir = temporaryDirectory()
    fs.writeFileSync(path.join(dir, "memory"), "precious")
    return dir
  }
  const rows: ReadonlyArray<readonly [what: string, make: () => string, outDir: (dir: string) => string]> = [
    ["not empty", full, (dir) => dir],
    ["a bundle already", copied, (dir) => dir],
    ["a file", full, (dir) => path.join(dir, "memory")],
    ["below a file", full, (dir) => path.join(dir, "memory", "a", "b")],
    ["claimed by another", () => writing(), (dir) => dir],
    ["where nothing can be made", () => "/proc/sys/kernel", (dir) => path.join(dir, "a", "b")]
  ]
  const writing = () => {
    const dir = temporaryDirectory()
    fs.symlinkSync("somebody", path.join(dir, "claim"))
    return dir
  }
  for (const [what, make, outDir] of rows) {
    test(`${what}: refused, untouched, and the source goes on`, function* () {
      const vm = yield* source()
      const dir = make()
      const before = listing(dir)
      const error = yield* failure(snap(vm, outDir(dir)))
      assert.strictEqual(error.code, "SNAPSHOT_DUMP_FAILED")
      assert.isNotEmpty(error.hint ?? "")
      if (!dir.startsWith("/proc")) assert.strictEqual(listing(dir), before)
      yield* goesOn(vm)
    })
  }

  for (const [what, make] of [
    ["an empty directory", () => temporaryDirectory()],
    ["a new directory", newBundle]
  ] as const) {
    test(`of two that want ${what} at once exactly one gets it`, function* () {
      const vms = yield* Effect.all([source(), source()], { concurrency: 2 })
      for (let round = 0; round < 3; round++) {
        const dir = make()
        const both = yield* Effect.all(
          vms.map((vm) => Effect.either(snap(vm, dir))),
          { concurrency: 2 }
        )
        const codes = both.map((one) => (Either.isLeft(one) ? one.left.code : "taken")).sort()
        assert.deepStrictEqual(codes, ["SNAPSHOT_DUMP_FAILED", "taken"])
        assert.deepStrictEqual(yield* verify(dir), [])
        yield* Effect.forEach(vms, goesOn)
      }
    })
  }
})

describe("no space", () => {
  for (const [what, sub] of [
    ["in a new directory", "bundle"],
    ["in an empty directory", ""]
  ] as const) {
    test(`for the memory, ${what}: nothing is left there and the source goes on`, function* () {
      const small = yield* smallDisk("8M")
      const vm = yield* source()
      const error = yield* failure(snap(vm, path.join(small, sub)))
      assert.strictEqual(error.code, "SNAPSHOT_DUMP_FAILED")
      assert.match(`${error.message} ${error.hint}`, /space/)
      assert.deepStrictEqual(fs.readdirSync(small), [])
      yield* goesOn(vm)
      yield* snap(vm, newBundle())
    })
  }

  test("for a fork: the source goes on and nothing is left of the sibling", function* () {
    const small = yield* smallDisk("24M")
    yield* run(
      Effect.gen(function* () {
        const vm = yield* source()
        const error = yield* failure(Effect.flatMap(Machinen, (m) => m.fork(vm)))
        assert.include(["SNAPSHOT_DUMP_FAILED", "BOOT_NO_SPACE"], error.code)
        assert.match(`${error.message} ${error.hint}`, /space/)
        assert.deepStrictEqual(fs.readdirSync(path.join(small, "vms")), [vm.id])
        yield* goesOn(vm)
      }),
      small
    )
    yield* Effect.promise(() => settled(small))
  })
})

const size = (file: string) => fs.lstatSync(file, { throwIfNoEntry: false })
const partOf = (id: string, part: "shim" | "vmm") => vmEntry(home, id)?.[part] ?? assert.fail(`${id} has no ${part}`)

/** A detached VM with a heart, which the rest of the test must leave going on; returns its id. */
const detachedOf = (image: string) =>
  Effect.gen(function* () {
    yield* Effect.addFinalizer(() => cli(home, ["stop", "--force", "src"]))
    assert.strictEqual((yield* cli(home, ["boot", "-d", "--image", image, "--name", "src"])).code, 0)
    assert.strictEqual((yield* cli(home, ["exec", "src", "--", "sh", "-c", heart])).code, 0)
    return vmIds(home)[0] ?? ""
  })
const detached = detachedOf("micro")
const srcGoesOn = Effect.gen(function* () {
  const { code, stderr } = yield* cli(home, ["exec", "src", "--", "sh", "-c", pulse])
  assert.deepStrictEqual({ code, stderr }, { code: 0, stderr: "" })
})
/** Waits for a moment of what runs, or for its end where that is too fast. */
const reaches = (starter: CliProcess, moment: Effect.Effect<unknown>) =>
  inTime(home, starter, Effect.raceFirst(moment, starter.result))
const killed = (starter: CliProcess, when: Effect.Effect<unknown>) =>
  Effect.gen(function* () {
    yield* reaches(starter, when)
    yield* starter.kill("SIGKILL")
    return yield* inTime(home, starter, starter.result)
  })

const claimOnly = (dir: string) => fs.existsSync(dir) && fs.readdirSync(dir).every((file) => file === "claim")

/** Moments of a snapshot, in their order. */
const moments: ReadonlyArray<readonly [what: string, reached: (dir: string) => boolean]> = [
  ["the directory is there", (dir) => size(dir) !== undefined],
  ["it is claimed", (dir) => size(path.join(dir, "claim")) !== undefined],
  ["there is a state", (dir) => size(path.join(dir, "state")) !== undefined],
  ["the state is written", (dir) => (size(path.join(dir, "state"))?.size ?? 0) > 0],
  ["there is a memory", (dir) => size(path.join(dir, "memory")) !== undefined],
  ["memory is written", (dir) => (size(path.join(dir, "memory"))?.blocks ?? 0) > 0],
  ["there is a disk", (dir) => size(path.join(dir, "upper.img")) !== undefined],
  ["the manifest is written", (dir) => (size(path.join(dir, "meta.json.partial"))?.size ?? 0) > 200],
  ["it is a bundle", (dir) => size(path.join(dir, "meta.json")) !== undefined]
]

describe("kill -9 of the program that takes a snapshot, when", () => {
  for (const [what, reached] of moments) {
    // the shim knows of the bundle once it has been asked to prepare; before that there may be a claim, of no effect without its maker
    const early = moments.findIndex(([moment]) => moment === what) < 2
    test(`${what}, leaves the source running, and a whole bundle or none`, function* () {
      yield* detached
      const dir = newBundle()
      const starter = yield* startCli(home, ["snapshot", "--keep-alive", "src", dir])
      yield* killed(
        starter,
        atOnce(() => reached(dir))
      )
      yield* srcGoesOn
      yield* eventually(
        `a bundle or nothing, not ${fs.existsSync(dir) ? fs.readdirSync(dir) : ""}`,
        () => !fs.existsSync(dir) || fs.existsSync(path.join(dir, "meta.json")) || (early && claimOnly(dir))
      )
      if (claimOnly(dir)) assert.strictEqual((yield* cli(home, ["snapshot", "--keep-alive", "src", dir])).code, 0)
      if (fs.existsSync(dir)) yield* run(restorable(dir))
      // whoever died, another can take one
      assert.strictEqual((yield* cli(home, ["snapshot", "--keep-alive", "src", newBundle()])).code, 0)
      assert.deepStrictEqual(leftovers(home).names, ["src"])
    })
  }
})

test("kill -9 of the program that takes a snapshot leaves the VM with the host's time", function* () {
  yield* detached
  const dir = newBundle()
  const starter = yield* startCli(home, ["snapshot", "--keep-alive", "src", dir])
  // The state is saved while the machine stands still. A program that is stopped there keeps it so.
  yield* reaches(
    starter,
    atOnce(() => size(path.join(dir, "state")) !== undefined)
  )
  yield* starter.kill("SIGSTOP")
  yield* Effect.sleep("4 seconds")
  yield* starter.kill("SIGKILL")
  yield* inTime(home, starter, starter.result)
  yield* eventually("the end of the undoing", () => !fs.existsSync(dir))
  const before = Math.floor(Date.now() / 1000)
  const { stdout } = yield* cli(home, ["exec", "src", "--", "date", "+%s"])
  assert.isAtLeast(Number(stdout), before - 1)
})

describe("kill -9 during a dump by criu", () => {
  const state = (moment: string) => moments.find(([what]) => what === moment)?.[1] ?? assert.fail(moment)
  const reached = ["it is claimed", "there is a disk", "the manifest is written", "it is a bundle"] as const

  for (const moment of reached) {
    test(`of the program that takes it, when ${moment}, leaves the source running, and a whole bundle or none`, function* () {
      yield* detachedOf("debian")
      const dir = newBundle()
      const starter = yield* startCli(home, ["snapshot", "--engine", "criu", "--keep-alive", "src", dir])
      yield* killed(
        starter,
        atOnce(() => state(moment)(dir))
      )
      yield* srcGoesOn
      yield* eventually(
        "a bundle or nothing",
        () => !fs.existsSync(dir) || fs.existsSync(path.join(dir, "meta.json")) || claimOnly(dir)
      )
      if (fs.existsSync(path.join(dir, "meta.json"))) yield* run(restorable(dir))
      // whoever died, another can take one
      const next = newBundle()
      assert.strictEqual((yield* cli(home, ["snapshot", "--engine", "criu", "--keep-alive", "src", next])).code, 0)
      yield* run(restorable(next))
      assert.deepStrictEqual(leftovers(home).names, ["src"])
    })
  }

  for (const part of ["vmm", "shim"] as const) {
    for (const moment of ["it is claimed", "there is a disk"] as const) {
      test(`of the source's ${part}, when ${moment}, leaves a whole bundle or none`, function* () {
        const id = yield* detachedOf("debian")
        const { pid } = partOf(id, part)
        const dir = newBundle()
        const starter = yield* startCli(home, ["snapshot", "--engine", "criu", "--keep-alive", "src", dir])
        yield* reaches(
          starter,
          atOnce(() => state(moment)(dir))
        )
        process.kill(pid, "SIGKILL")
        const { code, stderr } = yield* inTime(home, starter, starter.result)
        // a source that dies when all is copied has left a sound bundle
        if (code === 0) yield* run(restorable(dir))
        else {
          assert.match(stderr, /\((SNAPSHOT|EXEC|REGISTRY)_[A-Z_]+\)/)
          assert.isFalse(fs.existsSync(dir))
        }
        yield* assertNothingLeftAfterNextCommand(home)
      })
    }
  }

  const copies = (id: string) => vmIds(home).filter((other) => other !== id)
  const begun = (id: string) => copies(id).some((copy) => fs.existsSync(path.join(vmsDir, copy, "console.log")))
  for (const [what, reachedBy] of [
    ["a sibling has a directory", (id: string) => copies(id).length > 0],
    ["a sibling boots", begun]
  ] as const) {
    test(`of the program that forks, when ${what}, leaves the source alone`, function* () {
      const id = yield* detachedOf("debian")
      const starter = yield* startCli(home, ["fork", "--engine", "criu", "src"], { stdin: "open" })
      yield* killed(
        starter,
        atOnce(() => reachedBy(id))
      )
      yield* srcGoesOn
      yield* eventually("the sibling's end", () => processesOf(home).length === 2)
      assert.strictEqual((yield* cli(home, ["ls"])).code, 0)
      assert.deepStrictEqual([leftovers(home).vms, leftovers(home).names], [[id], ["src"]])
    })
  }
})

describe("kill -9 of the source's", () => {
  for (const part of ["vmm", "shim"] as const) {
    for (const [what, reached] of [moments[1], moments[3], moments[5], moments[6]].flatMap((m) => (m ? [m] : []))) {
      test(`${part} during a snapshot, when ${what}, leaves a whole bundle or none`, function* () {
        const id = yield* detached
        const { pid } = partOf(id, part)
        const dir = newBundle()
        const starter = yield* startCli(home, ["snapshot", "--keep-alive", "src", dir])
        yield* reaches(
          starter,
          atOnce(() => reached(dir))
        )
        process.kill(pid, "SIGKILL")
        const { code, stderr } = yield* inTime(home, starter, starter.result)
        // a source that dies when all is copied has left a sound bundle
        if (code === 0) yield* run(restorable(dir))
        else {
          assert.match(stderr, /\((SNAPSHOT|EXEC|REGISTRY)_[A-Z_]+\)/)
          assert.isFalse(fs.existsSync(dir))
        }
        yield* assertNothingLeftAfterNextCommand(home)
      })
    }
  }
})

describe("kill -9 of the program that starts", () => {
  const others = (id: string) => vmIds(home).filter((other) => other !== id)
  const running = (id: string) => vmEntry(home, id)?.state === "running"
  const steps: ReadonlyArray<readonly [what: string, reached: (id: string) => boolean]> = [
    ["it has a place to work", (id) => leftovers(home).vms.length > (id === "" ? 0 : 1)],
    ["the sibling has a directory", (id) => others(id).length > 0],
    [
      "the sibling has an entry",
      (id) => others(id).some((other) => fs.existsSync(path.join(vmsDir, other, "entry.json")))
    ],
    ["the sibling runs", (id) => others(id).some(running)]
  ]
  for (const [what, reached] of steps) {
    test(`a restored VM, when ${what}, leaves nothing`, function* () {
      const starter = yield* startCli(home, ["restore", sound.one], { stdin: "open" })
      yield* killed(
        starter,
        atOnce(() => reached(""))
      )
      yield* assertNothingLeftAfterNextCommand(home)
    })
    test(`a detached restored VM, when ${what}: it is there and answers, or is not`, function* () {
      yield* Effect.addFinalizer(() => cli(home, ["stop", "--force", "sibling"]))
      const starter = yield* startCli(home, ["restore", "--detach", "--name", "sibling", sound.one])
      yield* killed(
        starter,
        atOnce(() => reached(""))
      )
      const { code } = yield* cli(home, ["exec", "--timeout", "10 seconds", "sibling", "--", "sh", "-c", pulse])
      if (code === 0) assert.strictEqual((yield* cli(home, ["stop", "--force", "sibling"])).code, 0)
      yield* assertNothingLeftAfterNextCommand(home)
    })
    test(`a fork, when ${what}, leaves the source alone`, function* () {
      const id = yield* detached
      const starter = yield* startCli(home, ["fork", "src"], { stdin: "open" })
      yield* killed(
        starter,
        atOnce(() => reached(id))
      )
      yield* srcGoesOn
      yield* eventually("the sibling's end", () => processesOf(home).length === 2)
      const listed = JSON.parse((yield* cli(home, ["ls", "--json"])).stdout)
      assert.deepStrictEqual(
        listed.map((vm: { readonly id: string }) => vm.id),
        [id]
      )
      assert.deepStrictEqual(leftovers(home).vms, [id])
      assert.deepStrictEqual(leftovers(home).names, ["src"])
      yield* srcGoesOn
    })
  }
})

test("kill -9 of a restored VM's QEMU leaves nothing, and the bundle as it was", function* () {
  yield* Effect.scoped(
    Effect.gen(function* () {
      const { vm } = yield* restore(sound.one)
      yield* sh(vm, "echo changed >/changed; head -c 1000000 /dev/urandom >/dev/shm/changed; sync")
      process.kill(vm.pid, "SIGKILL")
      assert.strictEqual((yield* vm.wait).vmm.signal, 9)
      assertNothingLeft(home)
    })
  )
  assert.deepStrictEqual(yield* verify(sound.one), [])
  yield* restorable(sound.one)
})

test("a paused VM is not captured: it stays paused, and goes on when it is resumed", function* () {
  const vm = yield* source()
  yield* vm.pause
  const fork = Effect.flatMap(Machinen, (m) => Effect.scoped(m.fork(vm)))
  for (const capture of [Effect.asVoid(snap(vm, newBundle())), Effect.asVoid(fork)]) {
    const error = yield* failure(capture)
    assert.strictEqual(error.code, "SNAPSHOT_DUMP_FAILED")
    assert.include(error.hint ?? "", "machinen resume")
  }
  yield* vm.resume
  yield* goesOn(vm)
  yield* snap(vm, newBundle())
})
