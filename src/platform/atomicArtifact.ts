import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, identity, Option } from "effect"
import * as HostLock from "./HostLock.ts"

/**
 * Large files that are built once and then shared. A file counts only with its `.ok` marker, which is made once the file is whole and on disk.
 * A file without a marker comes from a build that was cut short, and is built again.
 */
const marker = (target: string) => `${target}.ok`

/** Whether the file has its marker. */
export const isComplete = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) =>
    Effect.all([
      Effect.orElseSucceed(fs.exists(target), () => false),
      Effect.orElseSucceed(fs.exists(marker(target)), () => false)
    ]).pipe(Effect.map(([file, ok]) => file && ok))
  )

/** Makes the marker of a file that the caller knows to be whole. */
const markComplete = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => fs.writeFileString(marker(target), ""))

/** Removes the marker of a file. */
export const unmark = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => fs.remove(marker(target), { force: true }))

/** The name of the marker while a process decides whether to remove the file. */
export const asideMarker = (target: string) => `${marker(target)}.aside`

/** Notes that a file is used now. False when the file has no marker: it was removed, or a process decides whether to remove it. */
export const markUsed = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => {
    const now = new Date()
    return Effect.isSuccess(fs.utimes(marker(target), now, now))
  })

/** When a file was used last, in Unix milliseconds. Of a file without a marker: when it was made. */
export const lastUsedAt = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) =>
    fs.stat(marker(target)).pipe(
      Effect.orElse(() => fs.stat(asideMarker(target))),
      Effect.orElse(() => fs.stat(target)),
      Effect.map(({ mtime }) => Option.match(mtime, { onNone: () => 0, onSome: Number }))
    )
  )

/** Gives a marker back that a killed process had set aside. The caller holds the lock. */
const putBack = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => Effect.ignore(fs.rename(asideMarker(target), marker(target))))

const locked = (target: string) => HostLock.withLock(HostLock.fileFor(target), identity)

/** Whether the file is complete. Waits while another process decides whether to remove it. */
export const isSettled = (target: string) =>
  Effect.flatMap(isComplete(target), (complete) =>
    complete
      ? Effect.succeed(true)
      : Effect.zipRight(Effect.ignore(locked(target)(putBack(target))), isComplete(target))
  )

/**
 * Runs an effect that may remove the file, while the file does not count and no process builds it. A file that is still there afterwards counts
 * again.
 */
export const setAside =
  (target: string) =>
  <A, E, R>(effect: Effect.Effect<A, E, R>) =>
    locked(target)(
      Effect.gen(function* () {
        const fs = yield* FileSystem.FileSystem
        yield* Effect.ignore(fs.rename(marker(target), asideMarker(target)))
        // an effect that removes the file also removes the marker
        return yield* Effect.ensuring(effect, putBack(target))
      })
    )

const stagingOf = (target: string) => `${target}.building`

/** Removes the staging directories of killed builds in a directory, if no build has touched them since `before` (Unix milliseconds). */
export const removeAbandoned = (dir: string, before: number) =>
  Effect.gen(function* () {
    const fs = yield* FileSystem.FileSystem
    for (const name of yield* Effect.orElseSucceed(fs.readDirectory(dir), () => [])) {
      if (!name.endsWith(stagingOf(""))) continue
      const staging = path.join(dir, name)
      const info = yield* Effect.option(fs.stat(staging))
      const isOld = Option.exists(
        Option.flatMap(info, ({ mtime }) => mtime),
        (time) => Number(time) <= before
      )
      // the lock waits for a build that is still running, which then leaves nothing
      const target = staging.slice(0, -stagingOf("").length)
      if (isOld) yield* Effect.ignore(locked(target)(fs.remove(staging, { recursive: true, force: true })))
    }
  })

/**
 * Makes `target`: `build` writes a file named `image` into the staging directory beside it, which is then synced and renamed. `target` is
 * complete or not there. Any number of callers at once, in any process, build it once.
 */
export const publish = <E, R>(target: string, build: (staging: string) => Effect.Effect<void, E, R>) =>
  locked(target)(
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      yield* putBack(target)
      if (yield* isComplete(target)) return
      yield* unmark(target)
      // a killed build has left this: we hold the lock, so no build uses it
      const staging = stagingOf(target)
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
