import * as fs from "node:fs"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import {
  assertNothingLeft,
  atOnce,
  type CliProcess,
  cli,
  eventually,
  fakeVmm,
  inTime,
  leftovers,
  live,
  newBundle,
  processesOf,
  settled,
  sh,
  startCli,
  temporaryDirectory,
  temporaryHome,
  vmEntry,
  vmIds
} from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

/** Sends a signal at a moment of a command, or after its end where that is too fast; returns how it ended. */
const signalled = (starter: CliProcess, signal: NodeJS.Signals, moment: Effect.Effect<unknown>) =>
  Effect.gen(function* () {
    yield* inTime(home, starter, Effect.raceFirst(moment, starter.result))
    yield* starter.kill(signal)
    return yield* inTime(home, starter, starter.result)
  })

const listed = Effect.map(
  cli(home, ["ls", "--json"]),
  ({ stdout }): ReadonlyArray<{ readonly name: string }> => JSON.parse(stdout)
)
const names = Effect.map(listed, (vms) => vms.map(({ name }) => name).sort())

describe("a detached boot whose command cannot be started", () => {
  const commands: ReadonlyArray<readonly [what: string, args: ReadonlyArray<string>, code: number]> = [
    ["is not there", ["--", "nosuchcmd"], 127],
    ["is no program", ["--", "/etc/passwd"], 126],
    ["has no directory", ["-w", "/nodir", "--", "true"], 125],
    ["has no user", ["-u", "nobodyx", "--", "true"], 125]
  ]
  for (const [what, args, code] of commands) {
    it.live(`because it ${what} leaves no VM, and the name to another`, () =>
      Effect.gen(function* () {
        const failed = yield* cli(home, ["boot", "--image", "micro", "--name", "x", "-d", ...args])
        assert.deepStrictEqual({ code: failed.code, stdout: failed.stdout }, { code, stdout: "" })
        assert.match(failed.stderr, /\(EXEC_[A-Z_]+\)/)
        yield* eventually("the end of its VM", () => processesOf(home).length === 0)
        assertNothingLeft(home)
      })
    )
  }
})

describe("an interruption of a detached boot", () => {
  const running = (): boolean => vmIds(home).some((id) => vmEntry(home, id)?.state === "running")
  const moments: ReadonlyArray<readonly [what: string, reached: () => boolean]> = [
    ["it has a directory", () => vmIds(home).length > 0],
    ["it has a shim", () => vmIds(home).some((id) => vmEntry(home, id)?.shim !== undefined)],
    ["it is ready", running]
  ]
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    for (const [what, reached] of moments) {
      it.scopedLive(`by ${signal} when ${what} leaves a VM that was named, or none`, () =>
        Effect.gen(function* () {
          yield* Effect.addFinalizer(() => cli(home, ["stop", "--force", "lasting"]))
          const args = ["boot", "-d", "--image", "micro", "--name", "lasting", "--", "sleep", "1000"]
          const starter = yield* startCli(home, args)
          const { stdout } = yield* signalled(starter, signal, atOnce(reached))
          assert.deepStrictEqual(yield* names, stdout === "" ? [] : ["lasting"])
          if (stdout === "") assertNothingLeft(home)
          else assert.strictEqual((yield* cli(home, ["exec", "lasting", "--", "pidof", "sleep"])).code, 0)
        })
      )
    }
  }
})

/** A detached VM for the rest of the test. */
const source = Effect.gen(function* () {
  yield* Effect.addFinalizer(() => cli(home, ["stop", "--force", "src"]))
  assert.strictEqual((yield* cli(home, ["boot", "-d", "--image", "micro", "--name", "src"])).code, 0)
  return vmIds(home)[0] ?? assert.fail("it has no directory")
})

describe("an interruption of a snapshot that ends its VM", () => {
  const moments: ReadonlyArray<readonly [what: string, reached: (dir: string, vmm: number) => boolean]> = [
    ["the bundle is whole", (dir) => fs.existsSync(path.join(dir, "meta.json"))],
    ["the VM is ending", (_, vmm) => !fs.existsSync(`/proc/${vmm}/exe`)]
  ]
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    for (const [what, reached] of moments) {
      it.scopedLive(`by ${signal} when ${what} leaves the VM or its bundle`, () =>
        Effect.gen(function* () {
          const id = yield* source
          const { pid: vmm } = vmEntry(home, id)?.vmm ?? assert.fail("it has no VMM")
          yield* cli(home, ["exec", "src", "--", "sh", "-c", "echo kept >/dev/shm/note"])
          const dir = newBundle()
          const starter = yield* startCli(home, ["snapshot", "src", dir])
          yield* signalled(
            starter,
            signal,
            atOnce(() => reached(dir, vmm))
          )
          const isBundle = fs.existsSync(path.join(dir, "meta.json"))
          assert.deepStrictEqual(yield* names, isBundle ? [] : ["src"])
          // an end that has begun means that the bundle was committed
          if (what === "the VM is ending") assert.isTrue(isBundle)
          if (!isBundle) {
            assert.isFalse(fs.existsSync(dir))
            assert.strictEqual((yield* cli(home, ["exec", "src", "--", "cat", "/dev/shm/note"])).stdout, "kept\n")
            return
          }
          yield* Effect.addFinalizer(() => cli(home, ["stop", "--force", "again"]))
          const restored = yield* cli(home, ["restore", dir, "-d", "--name", "again"])
          assert.deepStrictEqual([restored.code, restored.stderr], [0, ""])
          assert.strictEqual((yield* cli(home, ["exec", "again", "--", "cat", "/dev/shm/note"])).stdout, "kept\n")
        })
      )
    }
  }
})

describe("a fork into several detached siblings", () => {
  const siblings = (id: string) => vmIds(home).filter((other) => other !== id)
  const stopAll = Effect.flatMap(names, (all) =>
    Effect.forEach(all, (name) => (name === "src" ? Effect.void : cli(home, ["stop", "--force", name])))
  )

  it.scopedLive("of which one fails leaves none of them, and the source goes on", () =>
    Effect.gen(function* () {
      const id = yield* source
      // the third machine that is started as a copy ends at once
      const count = path.join(temporaryDirectory(), "count")
      fs.writeFileSync(count, "")
      const vmm = fakeVmm(
        home,
        "third",
        `case "$*" in *-incoming*) echo >>"${count}"; [ "$(wc -l <"${count}")" -ge 3 ] && { echo no third >&2; exit 3; } ;; esac; exec qemu-system-x86_64 "$@"`
      )
      const { code, stderr, stdout } = yield* cli(home, ["fork", "src", "--count", "4", "-d"], {
        env: { MACHINEN_VMM: vmm, MACHINEN_ACCEL: "tcg" }
      })
      assert.deepStrictEqual({ code, stdout }, { code: 1, stdout: "" })
      assert.include(stderr, "(BOOT_VMM_FAILED)")
      assert.include(stderr, "no third")
      assert.isAtLeast(fs.readFileSync(count, "utf8").length, 3)
      yield* eventually("the siblings' end", () => processesOf(home).length === 2)
      assert.deepStrictEqual(leftovers(home).vms, [id])
      assert.deepStrictEqual(yield* names, ["src"])
      assert.strictEqual((yield* cli(home, ["exec", "src", "--", "true"])).code, 0)
    })
  )

  for (const [what, reached] of [
    ["the first has a directory", (id: string) => siblings(id).length > 0],
    ["all have one", (id: string) => siblings(id).length === 3],
    ["the first is detached", (id: string) => siblings(id).some((other) => vmEntry(home, other)?.detached === true)]
  ] as const) {
    it.scopedLive(`interrupted when ${what} leaves all of them, named, or none`, () =>
      Effect.gen(function* () {
        const id = yield* source
        yield* Effect.addFinalizer(() => stopAll)
        const starter = yield* startCli(home, ["fork", "src", "--count", "3", "-d"])
        const { stdout } = yield* signalled(
          starter,
          "SIGINT",
          atOnce(() => reached(id))
        )
        const named = stdout.split("\n").filter((line) => line !== "")
        assert.include([0, 3], named.length)
        assert.deepStrictEqual(yield* names, [...named, "src"].sort())
      })
    )
  }
})

describe("a start that fails in a scope that goes on", () => {
  it.live("leaves its name to the next one: boot, restore and fork", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const broken = fakeVmm(home, "broken", "echo no >&2; exit 3")
      const failing = { MACHINEN_VMM: broken, MACHINEN_ACCEL: "tcg" }
      const outDir = newBundle()
      const other = yield* Effect.provide(Machinen, live(home, failing))
      const { vm } = yield* machinen.boot({ image: "micro", name: "one" })
      yield* machinen.snapshot(vm, { outDir, leaveRunning: true })
      const starts = [
        (m: Machinen["Type"]) => Effect.map(m.boot({ image: "micro", name: "two", prepared: false }), (it) => it.vm),
        (m: Machinen["Type"]) =>
          Effect.map(m.fork(vm, { name: "two" }), ({ siblings }) => siblings[0]?.vm ?? assert.fail())
      ]
      for (const start of starts) {
        const before = leftovers(home).vms
        const error = yield* Effect.flip(Effect.asVoid(start(other)))
        assert.strictEqual(error.code, "BOOT_VMM_FAILED")
        assert.deepStrictEqual([leftovers(home).vms, leftovers(home).names], [before, ["one"]])
        const second = yield* start(machinen)
        assert.strictEqual(yield* sh(second, "hostname"), "two")
        yield* second.kill
      }
      // of a bundle, a name that is taken is found when everything else of the VM is there
      const taken = yield* Effect.flip(Effect.asVoid(machinen.restore({ snapDir: outDir, name: "one" })))
      assert.strictEqual(taken.code, "REGISTRY_NAME_IN_USE")
      yield* vm.kill
      const { vm: again } = yield* machinen.restore({ snapDir: outDir, name: "one" })
      assert.strictEqual(yield* sh(again, "hostname"), "one")
    }).pipe(Effect.scoped, Effect.provide(live(home)))
  )
})
