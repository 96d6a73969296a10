import { readFile } from "node:fs"
import * as os from "node:os"
import { Effect } from "effect"

/** Physical memory of the host in bytes. */
export const totalBytes: Effect.Effect<number> = Effect.sync(() => os.totalmem())

/** Bytes that new processes can have without swapping: MemAvailable of /proc/meminfo (proc(5)). All memory, when that cannot be read. */
export const availableBytes: Effect.Effect<number> = Effect.async((resume) => {
  readFile("/proc/meminfo", "utf8", (_error, text) =>
    resume(Effect.succeed(parseAvailable(text ?? "") ?? os.totalmem()))
  )
})

export const parseAvailable = (meminfo: string): number | undefined => {
  const kib = /^MemAvailable:\s+(\d+) kB$/m.exec(meminfo)?.[1]
  return kib === undefined ? undefined : Number(kib) * 1024
}
