import { readFileSync, statSync, writeFileSync } from "node:fs"
import { Effect, Option } from "effect"
import { memoryFd } from "../backends/qemu/commandLine.ts"
import { sizeIn } from "../src/platform/procfs.ts"
import type { Vm } from "../src/vm/Vm.ts"
import { BenchError } from "./harness.ts"

const mibIn = (table: string, name: string) => Option.getOrElse(sizeIn(table, name), () => Number.NaN) / 2 ** 20

export interface Memory {
  readonly residentMib: number
  /** Peak since `resetPeak`, or since the process began. */
  readonly peakMib: number
}

/** Resident memory of a process (proc_pid_status(5)). The kernel itself keeps the peak, so no short peak is missed. */
export const of = (pid: number): Effect.Effect<Memory> =>
  Effect.sync(() => {
    const status = readFileSync(`/proc/${pid}/status`, "utf8")
    const mib = (field: string) => mibIn(status, field)
    return { residentMib: mib("VmRSS"), peakMib: mib("VmHWM") }
  })

/** Resets the peak (proc_pid_clear_refs(5)). */
export const resetPeak = (pid: number): Effect.Effect<void> =>
  Effect.sync(() => writeFileSync(`/proc/${pid}/clear_refs`, "5"))

/** Proportional set size of a process: shared memory is divided by the number of processes that share it (proc_pid_smaps(5)). */
export const proportionalMib = (pid: number): Effect.Effect<number> =>
  Effect.sync(() => mibIn(readFileSync(`/proc/${pid}/smaps_rollup`, "utf8"), "Pss"))

/** MiB of a booted VM's memory that the host has allocated: blocks of its memfd. */
const allocatedMib = (vm: Vm): Effect.Effect<number> =>
  Effect.sync(() => (statSync(`/proc/${vm.pid}/fd/${memoryFd}`).blocks * 512) / 2 ** 20)

/** Writes random data into the guest's tmpfs until the host has allocated `wantedMib` of guest memory. */
export const fill = Effect.fn("memory.fill")(function* (vm: Vm, wantedMib: number) {
  // runs a command first, so that the memory that a first command touches is allocated before it is measured
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
