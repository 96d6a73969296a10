import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Effect, Scope } from "effect"
import { memoizeSuccess } from "./memoizeSuccess.ts"

/**
 * A log of lines in a file, which takes the place of an earlier one with its first line: who has nothing to say leaves that. Where it
 * cannot be written nothing is kept, and nothing fails. The file is closed with the scope.
 */
export const make = (fs: FileSystem.FileSystem, file: string) =>
  Effect.gen(function* () {
    const scope = yield* Effect.scope
    const open = yield* memoizeSuccess(
      fs
        .makeDirectory(path.dirname(file), { recursive: true })
        .pipe(Effect.zipRight(fs.open(file, { flag: "w" })), Scope.extend(scope))
    )
    return (line: string) =>
      open.pipe(
        Effect.flatMap((log) => log.writeAll(Buffer.from(`${line}\n`))),
        Effect.ignore
      )
  })
