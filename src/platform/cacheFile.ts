import { randomUUID } from "node:crypto"
import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Effect } from "effect"

/**
 * Writes down what was found out, whole or not at all, while others may be noting the same. Losing a note costs finding it out again, so
 * nothing fails.
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
