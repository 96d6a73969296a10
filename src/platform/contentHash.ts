import { createHash } from "node:crypto"
import { readdirSync, readFileSync, statSync } from "node:fs"
import * as path from "node:path"
import { Effect } from "effect"

/** Every file below a path, in an order that does not depend on the file system. */
const filesBelow = (base: string, relative: string, ignored: ReadonlySet<string>): ReadonlyArray<string> => {
  if (!statSync(path.join(base, relative)).isDirectory()) return [relative]
  return readdirSync(path.join(base, relative), { withFileTypes: true })
    .filter(({ name }) => !ignored.has(name))
    .sort((a, b) => (a.name < b.name ? -1 : 1))
    .flatMap((entry) => {
      const below = path.join(relative, entry.name)
      return entry.isFile() ? [below] : filesBelow(base, below, ignored)
    })
}

/**
 * sha256 over the relative paths and the bytes of files and directories below `base`; entries named in `ignored` do not count.
 *
 * Synchronous on purpose: every process that boots a VM does this, and a hundred small files are read in a few milliseconds. Asynchronous
 * reads would take a turn of the event loop for each.
 */
export const contentHash = (
  base: string,
  inputs: ReadonlyArray<string>,
  ignored: ReadonlySet<string>
): Effect.Effect<string, Error> =>
  Effect.try({
    try: () => {
      const hash = createHash("sha256")
      for (const file of inputs.flatMap((input) => filesBelow(base, input, ignored))) {
        const bytes = readFileSync(path.join(base, file))
        hash.update(`${file}\0${bytes.length}\0`).update(bytes)
      }
      return hash.digest("hex")
    },
    catch: (cause) => cause as Error
  })
