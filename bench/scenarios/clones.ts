import { Effect } from "effect"
import type { Bundle } from "../../src/index.ts"
import { Machinen } from "../../src/Machinen.ts"
import { defaultMemoryMib } from "../../src/machine/BootOptions.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import { newPath } from "../files.ts"
import { atMost, BenchError, max, type Scenario, type Variant } from "../harness.ts"
import * as memory from "../memory.ts"
import * as rawRestore from "../rawRestore.ts"

const counts = [8, 32] as const
/** Most MiB that each clone may take. */
const limitMib = 20
/** Siblings that a fork starts at once (src/snapshot/fork.ts). */
const startedAtOnce = 4

const raw = (bundle: Bundle, count: number): Variant => ({
  name: `raw ${count}`,
  released: false,
  run: ({ elapsed, mark, record }) =>
    Effect.gen(function* () {
      const ready = yield* Effect.replicateEffect(rawRestore.prepare(rawRestore.ofBundle(bundle)), count)
      const began = yield* elapsed
      const pids = yield* Effect.forEach(ready, rawRestore.start, { concurrency: startedAtOnce })
      yield* mark("all answered", (yield* elapsed) - began)
      for (const pid of pids) yield* record("PSS of each", yield* memory.proportionalMib(pid), "MiB")
    })
})

const ours = (bundle: Bundle, count: number): Variant => ({
  name: `machinen ${count}`,
  released: true,
  run: ({ mark, record }) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const vms = yield* Effect.forEach(
        Array.from({ length: count }),
        Effect.fnUntraced(function* () {
          const { vm } = yield* machinen.restore({ snapDir: bundle.dir })
          const { exitCode } = yield* vm.execRaw({ argv: ["true"] })
          if (exitCode !== 0) return yield* new BenchError({ message: `true ended with code ${exitCode}` })
          return vm
        }),
        { concurrency: startedAtOnce }
      )
      yield* mark("all answered")
      for (const vm of vms) {
        yield* record("PSS of each", yield* memory.proportionalMib(vm.pid), "MiB")
        if (vm.entry.shim !== undefined)
          yield* record("PSS of each shim", yield* memory.proportionalMib(vm.entry.shim.pid), "MiB")
      }
    })
})

export const clones: Scenario = {
  name: "clones",
  description:
    "many VMs of one bundle at once: until all have answered, and what each costs in memory, beside QEMU alone",
  setup: Effect.fn("clones.setup")(function* ({ images, runs = 5 }) {
    const machinen = yield* Machinen
    const probe = yield* HostProbe
    const image = images[0] ?? "micro"
    const outDir = yield* newPath("bundle")
    const { vm } = yield* machinen.boot({ image, memoryMib: defaultMemoryMib, ...rawRestore.asRaw })
    yield* vm.execRaw({ argv: ["true"] })
    const { bundle } = yield* machinen.snapshot(vm, { outDir })
    return {
      warmup: 1,
      runs,
      variants: counts.flatMap((count) => [raw(bundle, count), ours(bundle, count)]),
      settings: { image, memoryMib: defaultMemoryMib, startedAtOnce, accelerator: yield* probe.accelerator },
      skipped: [],
      verdicts: (results) =>
        counts.map((count) =>
          atMost(
            `${count} clones: PSS of each QEMU (worst)`,
            "MiB",
            max(results, `machinen ${count}`, "PSS of each"),
            limitMib
          )
        )
    }
  })
}
