import { readdirSync, readFileSync } from "node:fs"
import { Effect } from "effect"

/** For how long the threads a process has now have run, in ms (the kernel's Documentation/scheduler/sched-stats). */
export const usedMs = (pid: number): Effect.Effect<number> =>
  Effect.sync(() =>
    readdirSync(`/proc/${pid}/task`)
      .map((thread) => Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8").split(" ")[0]) / 1e6)
      .reduce((sum, ms) => sum + ms, 0)
  )
