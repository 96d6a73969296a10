import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, identity, Option } from "effect"
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

/** The marker of a file that may be about to be removed. */
export const asideMarker = (target: string) => `${marker(target)}.aside`

/** Notes that a file is used now. False: it does not count any more, or somebody looks whether it is to be removed. */
export const markUsed = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => {
    const now = new Date()
    return Effect.isSuccess(fs.utimes(marker(target), now, now))
  })

/** When a file was used last, in milliseconds since 1970; one that does not count, when it was made. */
export const lastUsedAt = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) =>
    fs.stat(marker(target)).pipe(
      Effect.orElse(() => fs.stat(asideMarker(target))),
      Effect.orElse(() => fs.stat(target)),
      Effect.map(({ mtime }) => Option.match(mtime, { onNone: () => 0, onSome: Number }))
    )
  )

/** By who holds the lock: what somebody has set aside, and then was killed. */
const putBack = (target: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => Effect.ignore(fs.rename(asideMarker(target), marker(target))))

const locked = (target: string) => HostLock.withLock(HostLock.fileFor(target), identity)

/** Complete, once nobody is looking whether it can be removed. */
export const isSettled = (target: string) =>
  Effect.flatMap(isComplete(target), (complete) =>
    complete
      ? Effect.succeed(true)
      : Effect.zipRight(Effect.ignore(locked(target)(putBack(target))), isComplete(target))
  )

/** Runs an effect, which may remove the file, while it does not count and nobody builds it; where it is still there, it counts again afterwards. */
export const setAside =
  (target: string) =>
  <A, E, R>(effect: Effect.Effect<A, E, R>) =>
    locked(target)(
      Effect.gen(function* () {
        const fs = yield* FileSystem.FileSystem
        yield* Effect.ignore(fs.rename(marker(target), asideMarker(target)))
        // where the file is gone, so is its marker
        return yield* Effect.ensuring(effect, putBack(target))
      })
    )

const stagingOf = (target: string) => `${target}.building`

/** Removes what builds in a directory left that were killed, and that nobody has begun again since that time. */
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
      // a build that goes on is waited for, and leaves nothing
      const target = staging.slice(0, -stagingOf("").length)
      if (isOld) yield* Effect.ignore(locked(target)(fs.remove(staging, { recursive: true, force: true })))
    }
  })

/**
 * Makes `target` from the file `image` that `build` leaves in a directory beside it; complete or not there. Any number of callers at once,
 * in any process, build it once.
 */
export const publish = <E, R>(target: string, build: (staging: string) => Effect.Effect<void, E, R>) =>
  locked(target)(
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      yield* putBack(target)
      if (yield* isComplete(target)) return
      yield* unmark(target)
      // a killed build's leftovers: we hold the lock, so nobody is at work on them
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
