import { statfsSync } from "node:fs"
import { Effect } from "effect"

/** A program that could not write the rest of a file leaves less than this free. */
const fullBelow = 1024 * 1024

/** The bytes that can still be written below a directory; without bound where that cannot be told. */
export const freeBytes = (dir: string): Effect.Effect<number> =>
  Effect.try(() => statfsSync(dir)).pipe(
    // a file system may run out of inodes first; some count none
    Effect.map(({ bavail, bsize, ffree, files }) => (files > 0 && ffree === 0 ? 0 : bavail * bsize)),
    Effect.orElseSucceed(() => Number.POSITIVE_INFINITY)
  )

/** Whether the file system of a directory is full: what a failed program could not write is told from its disk, not from its words. */
export const isFull = (dir: string): Effect.Effect<boolean> => Effect.map(freeBytes(dir), (free) => free < fullBelow)
