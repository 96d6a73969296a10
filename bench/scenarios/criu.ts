import { Effect } from "effect"
import type { Bundle } from "../../src/index.ts"
import { Machinen } from "../../src/Machinen.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { newPath } from "../files.ts"
import { BenchError, type Scenario, type Variant } from "../harness.ts"

/** Heap sizes of the process that is dumped beside an idle shell. */
const heapsMib = [8, 128] as const
const memoryMib = 512

/** Starts a process with a heap of `heapMib`. */
const process = (vm: Vm, heapMib: number) =>
  Effect.gen(function* () {
    const program = `import os,time\nheap=os.urandom(1<<20)*${heapMib}\nopen("/run/up","w")\nwhile True: time.sleep(0.05)`
    yield* Effect.forkScoped(vm.execRaw({ argv: ["python3", "-c", program] }))
    const { exitCode } = yield* vm.execRaw("until test -e /run/up; do sleep 0.05; done")
    if (exitCode !== 0) return yield* new BenchError({ message: "the process did not come up" })
  })

const dump = (heapMib: number, vm: Vm): Variant => ({
  name: `dump ${heapMib}`,
  released: false,
  run: ({ record }) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const outDir = yield* newPath("bundle")
      const taken = yield* machinen.snapshot(vm, { outDir, engine: "criu", leaveRunning: true })
      yield* record("paused", taken.pausedMs ?? Number.NaN, "ms")
      yield* record("elapsed", taken.elapsedMs, "ms")
      const data = taken.bundle.manifest.blobs.reduce((sum, { dataBytes }) => sum + dataBytes, 0)
      yield* record("data", data / 2 ** 20, "MiB")
    })
})

const back = (heapMib: number, { dir }: Bundle, lazy: boolean): Variant => ({
  name: `restore ${heapMib}${lazy ? " lazily" : ""}`,
  released: false,
  run: ({ elapsed, mark }) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const began = yield* elapsed
      const { vm } = yield* machinen.restore({ snapDir: dir, lazy })
      yield* mark("restored", (yield* elapsed) - began)
      const { exitCode } = yield* vm.execRaw({ argv: ["true"] })
      yield* mark("first-exec", (yield* elapsed) - began)
      if (exitCode !== 0) return yield* new BenchError({ message: `true ended with code ${exitCode}` })
    })
})

export const criu: Scenario = {
  name: "criu",
  description: "processes dumped and brought back by the engine criu, by the size of their heap (debian)",
  setup: Effect.fn("criu.setup")(function* ({ runs = 8 }) {
    const machinen = yield* Machinen
    const probe = yield* HostProbe
    const cases = yield* Effect.forEach(heapsMib, (heapMib) =>
      Effect.gen(function* () {
        const { vm } = yield* machinen.boot({ image: "debian", memoryMib })
        yield* process(vm, heapMib)
        const outDir = yield* newPath(`bundle-${heapMib}`)
        const { bundle } = yield* machinen.snapshot(vm, { outDir, engine: "criu", leaveRunning: true })
        return [dump(heapMib, vm), back(heapMib, bundle, false), back(heapMib, bundle, true)]
      })
    )
    return {
      warmup: 1,
      runs,
      variants: cases.flat(),
      settings: { image: "debian", memoryMib, heapsMib, accelerator: yield* probe.accelerator },
      skipped: [],
      verdicts: () => []
    }
  })
}
