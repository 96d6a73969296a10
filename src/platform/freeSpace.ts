import { statfsSync } from "node:fs"
import { Effect } from "effect"

/** A file system with less free space than this (bytes) counts as full. */
const fullBelow = 1024 * 1024

/** The bytes that can still be written below a directory; infinity when the file system cannot be asked. */
const freeBytes = (dir: string): Effect.Effect<number> =>
  Effect.try(() => statfsSync(dir)).pipe(
    // a file system may run out of inodes first; some report a total of 0 because they have no limit
    Effect.map(({ bavail, bsize, ffree, files }) => (files > 0 && ffree === 0 ? 0 : bavail * bsize)),
    Effect.orElseSucceed(() => Number.POSITIVE_INFINITY)
  )

/** Whether the file system of a directory is full. Says why a program failed to write more reliably than the program's messages do. */
export const isFull = (dir: string): Effect.Effect<boolean> => Effect.map(freeBytes(dir), (free) => free < fullBelow)
