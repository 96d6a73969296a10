import { readFileSync, statSync, writeFileSync } from "node:fs"
import { Effect } from "effect"
import { memoryFd } from "../backends/qemu/commandLine.ts"
import type { Vm } from "../src/vm/Vm.ts"
import { BenchError } from "./harness.ts"

export interface Memory {
  readonly residentMib: number
  /** The highest since `resetPeak`, or since the process began. */
  readonly peakMib: number
}

/** What the kernel says a process holds (proc_pid_status(5)). The peak is the kernel's own: nothing falls between two looks. */
export const of = (pid: number): Effect.Effect<Memory> =>
  Effect.sync(() => {
    const status = readFileSync(`/proc/${pid}/status`, "utf8")
    const mib = (field: string) => Number(new RegExp(`^${field}:\\s+(\\d+) kB$`, "m").exec(status)?.[1]) / 1024
    return { residentMib: mib("VmRSS"), peakMib: mib("VmHWM") }
  })

/** Starts the peak over (proc_pid_clear_refs(5)). */
export const resetPeak = (pid: number): Effect.Effect<void> =>
  Effect.sync(() => writeFileSync(`/proc/${pid}/clear_refs`, "5"))

/** What a process costs when what it shares is divided by those who share it (proc_pid_smaps(5)). */
export const proportionalMib = (pid: number): Effect.Effect<number> =>
  Effect.sync(() => Number(/^Pss:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, "utf8"))?.[1]) / 1024)

/** How much of a booted VM's memory exists on the host: the allocated part of its memfd. */
export const allocatedMib = (vm: Vm): Effect.Effect<number> =>
  Effect.sync(() => (statSync(`/proc/${vm.pid}/fd/${memoryFd}`).blocks * 512) / 2 ** 20)

/** Random data in the guest's tmpfs, until so much of its memory exists on the host. */
export const fill = Effect.fn("memory.fill")(function* (vm: Vm, wantedMib: number) {
  // what a first command touches is there before it is counted
  yield* vm.execRaw({ argv: ["true"] })
  const missing = Math.round(wantedMib - (yield* allocatedMib(vm)))
  if (missing > 0) {
    const { exitCode } = yield* vm.execRaw({
      argv: ["dd", "if=/dev/urandom", "of=/dev/shm/fill", "bs=1M", `count=${missing}`]
    })
    if (exitCode !== 0) return yield* new BenchError({ message: `the guest's memory cannot be filled: ${exitCode}` })
  }
  return yield* allocatedMib(vm)
})
