import { readFileSync, writeFileSync } from "node:fs"
import { Effect } from "effect"

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
