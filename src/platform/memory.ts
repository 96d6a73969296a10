import { readFileSync } from "node:fs"
import * as os from "node:os"
import { Effect } from "effect"

/** Physical memory of the host in bytes. */
export const totalBytes: Effect.Effect<number> = Effect.sync(() => os.totalmem())

/** Memory the host can give away without swapping (MemAvailable, proc(5)); the total where it cannot be read, so that nothing blocks. */
export const availableBytes: Effect.Effect<number> = Effect.sync(() => {
  try {
    const kib = /^MemAvailable:\s+(\d+) kB$/m.exec(readFileSync("/proc/meminfo", "utf8"))?.[1]
    return kib === undefined ? os.totalmem() : Number(kib) * 1024
  } catch {
    return os.totalmem()
  }
})
