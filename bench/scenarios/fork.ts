import { Effect } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import { defaultMemoryMib } from "../../src/machine/BootOptions.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { atMost, BenchError, p50, type Scenario, type Variant } from "../harness.ts"
import * as memory from "../memory.ts"
import * as rawRestore from "../rawRestore.ts"
import { residentMib } from "./snapshot.ts"

/** Limits for medians, in milliseconds. */
const forkLimit = 130
const pauseLimit = 60

const raw = (vm: Vm): Variant => ({
  name: "raw",
  released: false,
  run: ({ mark, record }) =>
    Effect.gen(function* () {
      const { pausedMs, saved } = yield* rawRestore.save(vm)
      yield* record("paused", pausedMs, "ms")
      const ready = yield* rawRestore.prepare(saved)
      yield* rawRestore.start(ready)
      yield* mark("guest answers")
    })
})

const ours = (name: string, vm: Vm): Variant => ({
  name,
  released: false,
  run: ({ mark, record }) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const { pausedMs, siblings } = yield* machinen.fork(vm)
      yield* record("paused", pausedMs, "ms")
      yield* mark("forked")
      const [child] = siblings
      const exitCode = child === undefined ? null : (yield* child.vm.execRaw({ argv: ["true"] })).exitCode
      yield* mark("first-exec")
      if (exitCode !== 0) return yield* new BenchError({ message: `true in the child ended with code ${exitCode}` })
      yield* Effect.forEach(child?.phases ?? [], ([phase, ms]) => record(`phase ${phase}`, ms, "ms"))
    })
})

export const fork: Scenario = {
  name: "fork",
  description:
    "a sibling of a running VM to its first command's answer, and its source's pause, beside QEMU and cp by hand",
  setup: Effect.fn("fork.setup")(function* ({ images, runs = 10 }) {
    const machinen = yield* Machinen
    const probe = yield* HostProbe
    const image = images[0] ?? "micro"
    const { vm } = yield* machinen.boot({ image, memoryMib: defaultMemoryMib, ...rawRestore.asRaw })
    const resident = yield* memory.fill(vm, residentMib)
    const { siblings } = yield* machinen.fork(vm)
    const forks = [
      { name: "of a booted VM", of: vm },
      ...siblings.map((clone) => ({ name: "of a clone", of: clone.vm }))
    ]
    return {
      warmup: 1,
      runs,
      variants: [raw(vm), ...forks.map(({ name, of }) => ours(name, of))],
      settings: { image, memoryMib: defaultMemoryMib, residentMib: resident, accelerator: yield* probe.accelerator },
      skipped: [],
      verdicts: (results) =>
        forks.flatMap(({ name }) => [
          atMost(`${name}: first-exec (median)`, "ms", p50(results, name, "first-exec"), forkLimit),
          atMost(`${name}: the source's pause (median)`, "ms", p50(results, name, "paused"), pauseLimit)
        ])
    }
  })
}
