import { Effect } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import { defaultMemoryMib } from "../../src/machine/BootOptions.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { newPath } from "../files.ts"
import type { Scenario, Variant } from "../harness.ts"
import * as memory from "../memory.ts"
import * as rawRestore from "../rawRestore.ts"

/** MiB that the guest uses: as much as a small server with its caches. */
export const residentMib = 116

const raw = (vm: Vm): Variant => ({
  name: "raw",
  released: false,
  run: ({ elapsed, mark, record }) =>
    Effect.gen(function* () {
      const began = yield* elapsed
      const { pausedMs } = yield* rawRestore.save(vm)
      yield* mark("elapsed", (yield* elapsed) - began)
      yield* record("paused", pausedMs, "ms")
    })
})

const goesOn = (name: string, vm: Vm): Variant => ({
  name,
  released: false,
  run: ({ record }) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const outDir = yield* newPath("bundle")
      const { elapsedMs, pausedMs } = yield* machinen.snapshot(vm, { outDir, leaveRunning: true })
      yield* record("elapsed", elapsedMs, "ms")
      yield* record("paused", pausedMs ?? Number.NaN, "ms")
    })
})

/** Snapshots that end their VM, so each sample boots one. */
const ends = (image: string, runs: number): Variant => ({
  name: "destructive",
  runs,
  released: false,
  run: ({ record }) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const outDir = yield* newPath("bundle")
      const { vm } = yield* machinen.boot({ image, memoryMib: defaultMemoryMib, ...rawRestore.asRaw })
      yield* record("resident", yield* memory.fill(vm, residentMib), "MiB")
      const { elapsedMs } = yield* machinen.snapshot(vm, { outDir })
      yield* record("elapsed", elapsedMs, "ms")
    })
})

export const snapshot: Scenario = {
  name: "snapshot",
  description: "a bundle of a running VM: the pause and the whole, beside QEMU and cp by hand",
  setup: Effect.fn("snapshot.setup")(function* ({ images, runs = 10 }) {
    const machinen = yield* Machinen
    const probe = yield* HostProbe
    const image = images[0] ?? "micro"
    const { vm } = yield* machinen.boot({ image, memoryMib: defaultMemoryMib, ...rawRestore.asRaw })
    const resident = yield* memory.fill(vm, residentMib)
    const { siblings } = yield* machinen.fork(vm)
    return {
      warmup: 1,
      runs,
      variants: [
        raw(vm),
        goesOn("leave-running", vm),
        ...siblings.map((clone) => goesOn("leave-running, a clone", clone.vm)),
        ends(image, runs)
      ],
      settings: { image, memoryMib: defaultMemoryMib, residentMib: resident, accelerator: yield* probe.accelerator },
      skipped: [],
      verdicts: () => []
    }
  })
}
