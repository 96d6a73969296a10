import { readdirSync, readFileSync } from "node:fs"
import { Effect } from "effect"

/** CPU time of the threads that a process has now, in milliseconds (Documentation/scheduler/sched-stats.rst of the kernel). */
export const usedMs = (pid: number): Effect.Effect<number> =>
  Effect.sync(() =>
    readdirSync(`/proc/${pid}/task`)
      .map((thread) => Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8").split(" ")[0]) / 1e6)
      .reduce((sum, ms) => sum + ms, 0)
  )
