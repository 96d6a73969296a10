import { BootError } from "../errors.ts"

/** Default for the part of the host's memory that must be free for a fork. */
export const defaultFreeMemoryThreshold = 0.01

/**
 * The error of a fork on a host with too little free memory, if it has too little. A threshold of 0 or less allows everything, one above 1 counts
 * as 1, and exactly the required amount is enough.
 */
export const refusal = (host: {
  readonly freeBytes: number
  readonly totalBytes: number
  readonly threshold: number
}): BootError | undefined => {
  const { freeBytes, threshold, totalBytes } = host
  const needed = totalBytes * Math.min(threshold, 1)
  if (threshold <= 0 || freeBytes >= needed) return undefined
  return new BootError({
    code: "FORK_MEMORY_BACKPRESSURE",
    message: `${mib(freeBytes)} MiB of the host's ${mib(totalBytes)} MiB are free; a fork wants ${mib(needed)} MiB to be`,
    hint: "stop a VM, or lower freeMemoryThreshold"
  })
}

const mib = (bytes: number) => Math.round(bytes / 2 ** 20)
