import { readFile } from "node:fs"
import * as os from "node:os"
import { Effect, Option } from "effect"
import { sizeIn } from "./procfs.ts"

/** Physical memory of the host in bytes. */
export const totalBytes: Effect.Effect<number> = Effect.sync(() => os.totalmem())

/** Bytes that new processes can have without swapping: MemAvailable of /proc/meminfo (proc(5)). All memory, when that cannot be read. */
export const availableBytes: Effect.Effect<number> = Effect.async((resume) => {
  readFile("/proc/meminfo", "utf8", (_error, text) =>
    resume(Effect.succeed(Option.getOrElse(availableIn(text ?? ""), () => os.totalmem())))
  )
})

export const availableIn = (meminfo: string): Option.Option<number> => sizeIn(meminfo, "MemAvailable")
