import { Effect, Stream } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import { defaultMemoryMib } from "../../src/machine/BootOptions.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { atLeast, atMost, BenchError, max, p50, type Scenario, type Variant } from "../harness.ts"
import * as memory from "../memory.ts"

const gibibyte = 2 ** 30

const warm = (vm: Vm, runs: number): Variant => ({
  name: "true",
  runs,
  warmup: 20,
  released: false,
  run: ({ mark }) =>
    Effect.gen(function* () {
      const { exitCode } = yield* vm.execRaw({ argv: ["true"] })
      yield* mark("answer")
      if (exitCode !== 0) return yield* new BenchError({ message: `true ended with code ${exitCode}` })
    })
})

const stdout = (vm: Vm, shimPid: number, runs: number): Variant => ({
  name: "1 GiB",
  runs,
  warmup: 0,
  released: false,
  run: ({ elapsed, record }) =>
    Effect.gen(function* () {
      const shimBefore = yield* memory.of(shimPid)
      const before = yield* memory.of(process.pid)
      yield* Effect.forEach([shimPid, process.pid], memory.resetPeak)
      const began = yield* elapsed

      // not head: busybox's head copies byte by byte (17 MB/s under TCG) and would dominate the measurement
      const blocks = ["bs=64k", `count=${gibibyte / 65536}`]
      const command = yield* vm.start({ argv: ["dd", "if=/dev/zero", ...blocks] })
      const bytes = yield* Stream.runFold(command.output, 0, (sum, { bytes, channel }) =>
        channel === "stdout" ? sum + bytes.length : sum
      )
      const { code } = yield* command.exit

      const seconds = ((yield* elapsed) - began) / 1000
      if (code !== 0 || bytes !== gibibyte) {
        return yield* new BenchError({ message: `1 GiB was written, ${bytes} bytes arrived, code ${code}` })
      }
      yield* record("throughput", gibibyte / 1e6 / seconds, "MB/s")
      yield* record("host growth", (yield* memory.of(process.pid)).peakMib - before.residentMib, "MiB")
      yield* record("shim at rest", shimBefore.residentMib, "MiB")
      yield* record("shim peak", (yield* memory.of(shimPid)).peakMib, "MiB")
    })
})

export const exec: Scenario = {
  name: "exec",
  description: "commands in a VM that is up: the answer's delay, the output's throughput, and what both cost in memory",
  setup: Effect.fn("exec.setup")(function* ({ images, runs = 200 }) {
    const machinen = yield* Machinen
    const probe = yield* HostProbe
    const image = images[0] ?? "micro"
    const { vm } = yield* machinen.boot({ image, memoryMib: defaultMemoryMib })
    const shim = vm.entry.shim
    if (shim === undefined) return yield* new BenchError({ message: "a running VM has no shim" })
    return {
      warmup: 0,
      runs,
      variants: [stdout(vm, shim.pid, Math.min(runs, 5)), warm(vm, runs)],
      settings: { image, memoryMib: defaultMemoryMib, accelerator: yield* probe.accelerator },
      skipped: [],
      verdicts: (results) => [
        atMost("exec true, warm (median)", "ms", p50(results, "true", "answer"), 6),
        atLeast("1 GiB through stdout (median)", "MB/s", p50(results, "1 GiB", "throughput"), 100),
        atMost("growth of this process meanwhile (worst)", "MiB", max(results, "1 GiB", "host growth"), 64),
        atMost("shim at rest (worst)", "MiB", max(results, "1 GiB", "shim at rest"), 5)
      ]
    }
  })
}
