import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Effect, Scope } from "effect"
import { memoizeSuccess } from "./memoizeSuccess.ts"

/**
 * A log file. The first line replaces an earlier log; without a line the earlier log stays. Never fails: lines that cannot be written are
 * lost. The file is closed with the scope.
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
