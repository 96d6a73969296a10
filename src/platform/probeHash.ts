import { createHash } from "node:crypto"
import { FileSystem } from "@effect/platform"
import { Effect, Option } from "effect"

const blockSize = 4096
const probeBytes = 1024 * 1024

/**
 * sha256 over the blocks that are not all zero in a file's first, middle and last MiB, each with its offset; reads at most 3 MiB of however
 * large a file. Small files are covered whole. Guest memory changes at both ends all the time, a disk where its journal is, which ext4 has in
 * the middle; so it tells one snapshot from another.
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
