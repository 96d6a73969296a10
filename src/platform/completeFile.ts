import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import * as HostLock from "./HostLock.ts"

/**
 * Large files that are built once and then shared: a file counts only with its `.ok` marker, which is made when it is whole and on disk.
 * One without (a build cut short) is built again.
 */
const marker = (target: string) => `${target}.ok`

export const isComplete = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) =>
    Effect.all([
      Effect.orElseSucceed(fs.exists(target), () => false),
      Effect.orElseSucceed(fs.exists(marker(target)), () => false)
    ]).pipe(Effect.map(([file, ok]) => file && ok))
  )

/** The file is as it should be, whatever is in it: whoever says so has looked. */
export const markComplete = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => fs.writeFileString(marker(target), ""))

export const unmark = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => fs.remove(marker(target), { force: true }))

/**
 * Makes `target` from the file `image` that `build` leaves in a directory beside it; complete or not there. Any number of callers at once,
 * in any process, build it once.
 */
export const publish = <E, R>(target: string, build: (staging: string) => Effect.Effect<void, E, R>) =>
  HostLock.withLock(`complete:${target}`)(
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      if (yield* isComplete(target)) return
      yield* unmark(target)
      // a killed build's leftovers: we hold the lock, so nobody is at work on them
      const staging = `${target}.building`
      yield* fs.remove(staging, { recursive: true, force: true })
      yield* fs.makeDirectory(staging, { recursive: true, mode: 0o700 })
      yield* Effect.gen(function* () {
        const image = path.join(staging, "image")
        yield* build(staging)
        yield* Effect.scoped(Effect.flatMap(fs.open(image, { flag: "r+" }), (file) => file.sync))
        yield* fs.rename(image, target)
        yield* markComplete(target)
      }).pipe(Effect.ensuring(Effect.ignore(fs.remove(staging, { recursive: true, force: true }))))
    })
  )
