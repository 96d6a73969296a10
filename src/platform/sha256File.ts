import { createHash } from "node:crypto"
import type { FileSystem } from "@effect/platform"
import { Effect, Stream } from "effect"

/** The sha256 of a file's content, in hexadecimal digits. */
export const sha256File = Effect.fn("sha256File")(function* (fs: FileSystem.FileSystem, file: string) {
  const hash = createHash("sha256")
  yield* Stream.runForEach(fs.stream(file, { chunkSize: 1024 * 1024 }), (chunk) =>
    Effect.sync(() => void hash.update(chunk))
  )
  return hash.digest("hex")
})
