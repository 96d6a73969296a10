import { randomUUID } from "node:crypto"
import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Effect } from "effect"

/**
 * Writes a cache file by rename, so that readers see it whole, whatever other processes write to the same name. Never fails: a lost file costs
 * finding its content out again.
 */
export const writeCacheFile = (fs: FileSystem.FileSystem, file: string, text: string): Effect.Effect<void> => {
  const draft = `${file}.${randomUUID()}`
  return fs.makeDirectory(path.dirname(file), { recursive: true }).pipe(
    Effect.zipRight(fs.writeFileString(draft, text)),
    Effect.zipRight(fs.rename(draft, file)),
    Effect.onError(() => Effect.ignore(fs.remove(draft, { force: true }))),
    Effect.ignore
  )
}
