import { type ChildProcess, spawn } from "node:child_process"
import { mkdirSync, readdirSync, readFileSync, readlinkSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import * as processes from "../../src/platform/processes.ts"
import {
  assertNothingLeft,
  assertNothingLeftAfterNextCommand,
  type CliProcess,
  cli,
  collectGarbage,
  eventually,
  fakeVmm,
  hang,
  leftovers,
  processesOf,
  settled,
  startCli,
  temporaryHome,
  vmEntry,
  vmIds
} from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

const vmsDir = path.join(home, "vms")
/** The only VM's entry. */
const entry = () => vmEntry(home, vmIds(home)[0] ?? "")
const binaryOf = (pid: number): string => {
  try {
    return readlinkSync(`/proc/${pid}/exe`)
  } catch {
    return ""
  }
}
const running = (binary: string) => () => processesOf(home).some(({ pid }) => binaryOf(pid).includes(binary))

/** Steps of a boot that can be seen from outside, in their order. */
const steps: ReadonlyArray<readonly [step: string, reached: (vm: CliProcess) => Effect.Effect<unknown>]> = [
  ["it has just started", () => Effect.void],
  ["the VM's directory is there", () => eventually("a directory", () => vmIds(home).length > 0)],
  ["the name is taken", () => eventually("a name", () => leftovers(home).names.length > 0)],
  ["the shim runs", () => eventually("the shim", running("machinen-shim"))],
  ["QEMU runs", () => eventually("QEMU", running("qemu-system"))],
  ["the entry has the shim", () => eventually("the shim's entry", () => entry()?.shim !== undefined)],
  ["the VM is ready", () => eventually("a ready VM", () => entry()?.state === "running")],
  ["its command runs", (vm) => vm.printed("working")]
]
const startRun = startCli(
  home,
  ["run", "--image", "micro", "--name", "victim", "--", "sh", "-c", "echo working; exec sleep 1000"],
  {
    stdin: "open"
  }
)

describe("kill -9 of the program that boots", () => {
  for (const [step, reached] of steps) {
    it.scopedLive(`leaves nothing behind when ${step}`, () =>
      Effect.gen(function* () {
        const vm = yield* startRun
        yield* reached(vm)
        yield* vm.kill("SIGKILL")
        yield* vm.result
        yield* assertNothingLeftAfterNextCommand(home)
      })
    )
  }

  it.scopedLive("leaves nothing behind while it stops the VM", () =>
    Effect.gen(function* () {
      const vm = yield* startCli(home, ["boot", "--image", "micro", "--name", "victim"], { stdin: "open" })
      yield* vm.printed("is up")
      yield* vm.kill("SIGTERM")
      yield* vm.kill("SIGKILL")
      yield* vm.result
      yield* assertNothingLeftAfterNextCommand(home)
    })
  )

  it.scopedLive("a stopping command's death does not keep the VM from stopping", () =>
    Effect.gen(function* () {
      const settings = { env: { MACHINEN_STOP_GRACE: "2 seconds" } }
      assert.strictEqual((yield* cli(home, ["boot", "-d", "--image", "micro", "--name", "slow"], settings)).code, 0)
      // a guest that is paused does not answer: the stop takes its whole grace
      assert.strictEqual((yield* cli(home, ["pause", "slow"])).code, 0)
      const control = entry()?.controlPath ?? ""
      const stopping = yield* startCli(home, ["stop", "slow"])
      yield* eventually("a connection to the shim", () =>
        readFileSync("/proc/net/unix", "utf8")
          .split("\n")
          .some((line) => line.endsWith(control) && / 03 +\d+ /.test(line))
      )
      yield* stopping.kill("SIGKILL")
      yield* stopping.result
      yield* cli(home, ["stop", "--force", "slow"])
      yield* assertNothingLeftAfterNextCommand(home)
    })
  )
})

describe("ctrl-c", () => {
  for (const [step, reached] of steps.slice(1)) {
    it.scopedLive(`leaves nothing behind when ${step}`, () =>
      Effect.gen(function* () {
        const vm = yield* startRun
        yield* reached(vm)
        yield* vm.kill("SIGINT")
        assert.strictEqual((yield* vm.result).code, 130)
        assertNothingLeft(home) // at once
      })
    )
  }
})

/** Kills one of the VM's processes by its pid in the entry. */
const killPart = (part: "shim" | "vmm") =>
  Effect.gen(function* () {
    const who = yield* eventually(`the ${part} in the entry`, () => entry()?.[part])
    assert.isTrue(yield* processes.isAlive(who))
    process.kill(who.pid, "SIGKILL")
  })

describe("kill -9 of", () => {
  for (const part of ["shim", "vmm"] as const) {
    it.scopedLive(`the ${part} during the boot fails the boot, and nothing is left`, () =>
      Effect.gen(function* () {
        const vm = yield* startRun
        yield* killPart(part)
        assert.strictEqual((yield* vm.result).code, 125)
        yield* assertNothingLeftAfterNextCommand(home)
      })
    )
    it.scopedLive(`the ${part} while a command runs fails the command, and nothing is left`, () =>
      Effect.gen(function* () {
        const vm = yield* startRun
        yield* vm.printed("working")
        yield* killPart(part)
        const { code, stderr } = yield* vm.result
        assert.strictEqual(code, 125)
        assert.match(stderr, /\(EXEC_VM_FAILED\)/)
        yield* assertNothingLeftAfterNextCommand(home)
      })
    )
    it.scopedLive(`the ${part} of a detached VM leaves nothing, and the VM is not found any more`, () =>
      Effect.gen(function* () {
        assert.strictEqual((yield* cli(home, ["boot", "-d", "--image", "micro", "--name", "gone"])).code, 0)
        yield* killPart(part)
        yield* assertNothingLeftAfterNextCommand(home)
        const error = yield* cli(home, ["exec", "gone", "--", "true"])
        assert.include(error.stderr, "(REGISTRY_VM_NOT_FOUND)")
      })
    )
  }
})

describe("names", () => {
  /**
   * A VMM that never answers: the VM keeps its name for as long as the test wants, at no cost. Its version is not asked for, which only the
   * search for a prepared machine wants to know, and waits for.
   */
  const env = () => ({
    MACHINEN_VMM: fakeVmm(home, "hangs", hang(home)),
    MACHINEN_ACCEL: "tcg",
    MACHINEN_PREPARED: "off"
  })

  it.live(
    "of two that claim one at once exactly one gets it, ten times",
    () =>
      Effect.gen(function* () {
        for (let round = 0; round < 10; round++) {
          // every other round over the pin of a VM that is dead
          if (round % 2 === 1) {
            mkdirSync(path.join(home, "names"), { recursive: true })
            writeFileSync(path.join(home, "names", "wanted"), "a00000000000")
          }
          yield* Effect.scoped(
            Effect.gen(function* () {
              const args = ["run", "--image", "micro", "--name", "wanted", "--", "true"]
              const two = yield* Effect.all([
                startCli(home, args, { env: env() }),
                startCli(home, args, { env: env() })
              ])
              const [loser, winner] = yield* Effect.raceFirst(
                Effect.map(two[0].result, (result) => [result, two[1]] as const),
                Effect.map(two[1].result, (result) => [result, two[0]] as const)
              )
              assert.include(loser.stderr, "(REGISTRY_NAME_IN_USE)")
              assert.strictEqual(loser.code, 125)
              yield* eventually("the winner's VM", () => entry()?.shim !== undefined)
              assert.strictEqual(vmIds(home).length, 1)
              assert.deepStrictEqual(leftovers(home).names, ["wanted"])
              yield* winner.kill("SIGINT")
              assert.strictEqual((yield* winner.result).code, 130)
              assertNothingLeft(home)
            })
          )
        }
      }),
    120_000
  )

  it.scopedLive("ls and gc while it boots leave the VM alone", () =>
    Effect.gen(function* () {
      const vm = yield* startCli(home, ["boot", "--image", "micro", "--name", "young"], { env: env() })
      yield* eventually("the shim's entry", () => entry()?.shim !== undefined)
      for (let turn = 0; turn < 3; turn++) {
        const [listed] = JSON.parse((yield* cli(home, ["ls", "--json"])).stdout)
        assert.deepInclude(listed, { name: "young", state: "booting" })
        assert.deepStrictEqual(JSON.parse((yield* collectGarbage(home)).stdout), [])
      }
      yield* vm.kill("SIGINT")
      assert.strictEqual((yield* vm.result).code, 130)
      assertNothingLeft(home)
    })
  )
})

describe("a forged entry", () => {
  const bystander = Effect.acquireRelease(
    Effect.sync(() => spawn("sleep", ["1004"], { stdio: "ignore" })),
    (child) => Effect.sync(() => void child.kill("SIGKILL"))
  )
  const id = "abcdef012345"
  const forge = (child: ChildProcess, changes: { readonly startTimeOff: number; readonly bootId?: string }) =>
    Effect.gen(function* () {
      const who = yield* eventually("the bystander", () =>
        Effect.runSync(processes.identify(child.pid ?? 0)).pipe((o) => (o._tag === "Some" ? o.value : undefined))
      )
      const them = { pid: who.pid, startTime: who.startTime + changes.startTimeOff }
      const dir = path.join(vmsDir, id)
      mkdirSync(dir, { recursive: true })
      mkdirSync(path.join(home, "names"), { recursive: true })
      writeFileSync(path.join(home, "names", "forged"), id)
      const forged = {
        version: 1,
        id,
        name: "forged",
        state: "running",
        bootId: changes.bootId ?? (yield* processes.bootId),
        owner: them,
        shim: them,
        vmm: them,
        detached: true,
        backend: "qemu",
        accel: "tcg",
        image: "micro",
        memoryMib: 512,
        vcpus: 1,
        createdAt: Date.now(),
        vsockPath: path.join(dir, "vsock.sock"),
        controlPath: path.join(dir, "shim.sock")
      }
      writeFileSync(path.join(dir, "entry.json"), JSON.stringify(forged))
    })
  const alive = (child: ChildProcess) => {
    assert.isNull(child.exitCode)
    assert.isNull(child.signalCode)
    process.kill(child.pid ?? 0, 0)
  }

  for (const [what, changes] of [
    ["the wrong start time", { startTimeOff: 1 }],
    ["another boot's id", { startTimeOff: 0, bootId: "00000000-0000-0000-0000-000000000000" }]
  ] as const) {
    it.scopedLive(`with somebody else's pid and ${what} is not believed, and removed`, () =>
      Effect.gen(function* () {
        const child = yield* bystander
        for (const args of [
          ["stop", "forged"],
          ["stop", "--force", String(child.pid)],
          ["exec", "forged", "--", "true"],
          ["gc"],
          ["ls"]
        ]) {
          yield* forge(child, changes)
          const { stderr } = yield* args[0] === "gc" ? collectGarbage(home) : cli(home, args)
          if (args.length > 1) assert.include(stderr, "(REGISTRY_VM_NOT_FOUND)")
          alive(child)
          assertNothingLeft(home)
        }
      })
    )
  }

  it.scopedLive("with somebody else's pid and start time: the bystander is never signalled", () =>
    Effect.gen(function* () {
      const child = yield* bystander
      yield* forge(child, { startTimeOff: 0 })
      for (const args of [["stop", "forged"], ["stop", "--force", "forged"], ["stop", String(child.pid)], ["gc"]]) {
        yield* args[0] === "gc" ? collectGarbage(home) : cli(home, args)
        alive(child)
      }
      child.kill("SIGKILL")
      yield* eventually("the bystander's end", () => child.signalCode !== null)
      yield* assertNothingLeftAfterNextCommand(home)
    })
  )

  const rubbish: ReadonlyArray<readonly [what: string, contents: string]> = [
    ["no JSON", "{"],
    ["nothing", ""],
    ["another format", '{"version":99}'],
    ["another VM's id", JSON.stringify({ version: 1, id: "bbbbbbbbbbbb" })]
  ]
  for (const [what, contents] of rubbish) {
    it.live(`that holds ${what} is removed`, () =>
      Effect.gen(function* () {
        mkdirSync(path.join(vmsDir, id), { recursive: true })
        writeFileSync(path.join(vmsDir, id, "entry.json"), contents)
        yield* assertNothingLeftAfterNextCommand(home)
      })
    )
  }

  it.live("gc says what it removes; a dry run removes nothing", () =>
    Effect.gen(function* () {
      mkdirSync(path.join(home, "names"), { recursive: true })
      writeFileSync(path.join(home, "names", "stale"), id)
      const dry = JSON.parse((yield* collectGarbage(home, "--dry-run")).stdout)
      const left = readdirSync(path.join(home, "names"))
      const wet = JSON.parse((yield* collectGarbage(home)).stdout)
      assertNothingLeft(home)
      assert.deepStrictEqual(left, ["stale"])
      assert.deepStrictEqual(dry, [
        { id, name: "stale", removedPaths: [path.join(home, "names", "stale")], failedPaths: [] }
      ])
      assert.deepStrictEqual(wet, dry)
    })
  )

  it.scopedLive("a stale pin does not keep a name from being taken", () =>
    Effect.gen(function* () {
      const child = yield* bystander
      yield* forge(child, { startTimeOff: 1 })
      const { code, stdout } = yield* cli(home, ["run", "--image", "micro", "--name", "forged", "--", "echo", "mine"])
      assert.deepStrictEqual({ code, stdout }, { code: 0, stdout: "mine\n" })
      alive(child)
    })
  )
})
