import { Effect, Option } from "effect"
import type { ProcessIdentity } from "./ProcessIdentity.ts"
import { read, sizeIn } from "./procfs.ts"

/** Fields of /proc/<pid>/stat from the 3rd on. The 2nd, the name in parentheses, may hold spaces and parentheses itself (proc(5)). */
const statFields = (pid: number): Option.Option<ReadonlyArray<string>> =>
  Option.map(read(`/proc/${pid}/stat`), (text) => text.slice(text.lastIndexOf(")") + 2).split(" "))

/** The id of this host's boot. Start times of processes can be compared only within one boot. */
export const bootId: Effect.Effect<string> = Effect.sync(() =>
  Option.getOrElse(read("/proc/sys/kernel/random/boot_id"), () => "unknown").trim()
)

/** The process that has this pid now, if there is one. A zombie does not count. */
export const identify = (pid: number): Effect.Effect<Option.Option<ProcessIdentity>> =>
  Effect.sync(() =>
    Option.flatMap(statFields(pid), (fields) => {
      const [state] = fields
      const startTime = Number(fields[19])
      return state === "Z" || state === "X" || !Number.isSafeInteger(startTime)
        ? Option.none()
        : Option.some({ pid, startTime })
    })
  )

/** Whether exactly this process still runs. */
export const isAlive = (identity: ProcessIdentity): Effect.Effect<boolean> =>
  Effect.map(
    identify(identity.pid),
    Option.exists((now) => now.startTime === identity.startTime)
  )

/** The identity of this process. Dies when /proc is not mounted. */
export const self: Effect.Effect<ProcessIdentity> = Effect.flatMap(
  identify(process.pid),
  Option.match({
    onNone: () => Effect.dieMessage("/proc is not mounted: machinen needs a Linux host with /proc"),
    onSome: Effect.succeed
  })
)

/** Resident memory in bytes (VmRSS of /proc/<pid>/status), or none when the process is gone. */
export const residentBytes = (pid: number): Effect.Effect<Option.Option<number>> =>
  Effect.sync(() => Option.flatMap(read(`/proc/${pid}/status`), (status) => sizeIn(status, "VmRSS")))
