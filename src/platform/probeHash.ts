import { createHash } from "node:crypto"
import { FileSystem } from "@effect/platform"
import { Effect, Option } from "effect"

const blockSize = 4096
const probeBytes = 1024 * 1024

/**
 * sha256 over the first, middle and last MiB of a file: each block of 4096 bytes that is not all zero, with its offset. Reads at most 3 MiB;
 * a file of up to 3 MiB is covered whole. The hash tells one snapshot from another, because guest memory keeps changing at both ends, and a disk
 * in its journal, which ext4 has in the middle. Fails with PlatformError when the file cannot be read.
 */
export const probeHash = Effect.fnUntraced(function* (file: string) {
  const fs = yield* FileSystem.FileSystem
  const hash = createHash("sha256")
  yield* Effect.scoped(
    Effect.gen(function* () {
      const handle = yield* fs.open(file, { flag: "r" })
      const size = Number((yield* handle.stat).size)
      const block = (at: number) => Math.floor(at / blockSize) * blockSize
      const middle = Math.max(probeBytes, block(size / 2))
      const tail = Math.max(middle + probeBytes, block(size - probeBytes))
      for (const [from, to] of [
        [0, Math.min(size, probeBytes)],
        [middle, Math.min(size, middle + probeBytes)],
        [tail, size]
      ] as const) {
        if (to <= from) continue
        yield* handle.seek(from, "start")
        let at = from
        while (at < to) {
          const read = yield* handle.readAlloc(Math.min(to - at, probeBytes))
          if (Option.isNone(read)) break
          addBlocks(hash, read.value, at)
          at += read.value.length
        }
      }
    })
  )
  return hash.digest("hex")
})

const zeros = Buffer.alloc(blockSize)

const addBlocks = (hash: ReturnType<typeof createHash>, bytes: Uint8Array, at: number) => {
  for (let i = 0; i < bytes.length; i += blockSize) {
    const block = bytes.subarray(i, i + blockSize)
    if (zeros.subarray(0, block.length).equals(block)) continue
    const offset = Buffer.alloc(8)
    offset.writeBigUInt64BE(BigInt(at + i))
    hash.update(offset).update(block)
  }
}
