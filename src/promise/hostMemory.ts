import { Effect, Option } from "effect"
import { autoMemoryMib } from "../machine/BootOptions.ts"
import * as memory from "../platform/memory.ts"
import * as processes from "../platform/processes.ts"
import { defaultFreeMemoryThreshold, refusal } from "../snapshot/forkBackpressure.ts"

/** Half of the host's memory in MiB, from 512 to 16384. */
export const autoSizeMemoryMib = (hostBytes: number = readHostTotalBytes()): number => autoMemoryMib(hostBytes)

/** Bytes that new processes can have without swapping. */
export const readHostFreeBytes = (): Promise<number> => Effect.runPromise(memory.availableBytes)

export const readHostTotalBytes = (): number => Effect.runSync(memory.totalBytes)

/** Resident bytes of a process; null when it has ended. `_statsPath` is ignored: it is for hosts without /proc, which are not supported. */
export const readHostRssBytes = (pid: number, _statsPath?: string): number | null =>
  Option.getOrNull(Effect.runSync(processes.residentBytes(pid)))

export interface RssTarget {
  readonly pid: number
  readonly statsPath?: string
}

/** Resident bytes by pid. Processes that have ended are left out. */
export const readHostRssBytesMulti = (targets: ReadonlyArray<RssTarget | number>): Map<number, number> =>
  new Map(
    targets.flatMap((target) => {
      const pid = typeof target === "number" ? target : target.pid
      const rss = readHostRssBytes(pid)
      return rss === null ? [] : [[pid, rss] as const]
    })
  )

export const DEFAULT_FREE_MEMORY_THRESHOLD = defaultFreeMemoryThreshold

export interface CheckForkBackpressureOptions {
  /** The part of the memory that must be free, 0 to 1. 0 or less: no limit, and nothing is read. */
  readonly threshold: number
  readonly readFree?: () => Promise<number>
  readonly totalBytes?: number
}

/** Rejects with FORK_MEMORY_BACKPRESSURE when the host is too low on memory for a fork. */
export const checkForkBackpressure = async (options: CheckForkBackpressureOptions): Promise<void> => {
  const { readFree = readHostFreeBytes, threshold, totalBytes = readHostTotalBytes() } = options
  if (threshold <= 0) return
  const refused = refusal({ freeBytes: await readFree(), totalBytes, threshold })
  if (refused !== undefined) throw refused
}
