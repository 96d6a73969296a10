import { spawn } from "node:child_process"
import { closeSync, constants, fstatSync, mkdirSync, openSync, statSync, unlinkSync } from "node:fs"
import * as path from "node:path"
import { Error as PlatformErrors } from "@effect/platform"
import { Effect, Exit, Scope } from "effect"

/**
 * A lock between the processes that share a directory: flock(2) on a file in it. The file is the user's own (mode 0600), so no other user
 * can hold the lock, and processes in different containers that share the directory exclude each other.
 *
 * flock(2) belongs to the open file description, not to a process. Node cannot call it, so util-linux's flock(1) does, on a descriptor that
 * it inherits from us and shares with us; the lock then lives as long as our descriptor. The kernel closes that when this process ends,
 * however it ends.
 */

/** The lock file of `target`: in a directory beside the target's, so that no listing of the targets shows it. */
export const fileFor = (target: string) => path.join(`${path.dirname(target)}.locks`, path.basename(target))

/** Opens a lock file without following a symbolic link. Node adds O_CLOEXEC, so no other child keeps the lock. */
const flags = constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW

const failed = (file: string, cause: unknown) =>
  new PlatformErrors.SystemError({
    reason: "Unknown",
    module: "FileSystem",
    method: "withLock",
    pathOrDescriptor: file,
    description: `the lock ${file} cannot be taken: ${cause instanceof Error ? cause.message : String(cause)}`,
    cause
  })

const open = (file: string) =>
  Effect.acquireRelease(
    Effect.try({
      try: () => {
        mkdirSync(path.dirname(file), { recursive: true, mode: 0o700 })
        return openSync(file, flags, 0o600)
      },
      catch: (cause) => failed(file, cause)
    }),
    (fd) => Effect.sync(() => closeSync(fd))
  )

/** Waits until the file behind `fd` is locked. An interruption ends the helper; closing `fd` gives up a lock that it has just taken. */
const flock = (file: string, fd: number) =>
  Effect.async<void, PlatformErrors.SystemError>((resume) => {
    // fd 3 of the child; in a session of its own, out of reach of the terminal's ctrl-c
    const child = spawn("flock", ["--exclusive", "3"], { detached: true, stdio: ["ignore", "ignore", "ignore", fd] })
    child.once("error", (cause) => resume(Effect.fail(failed(file, cause))))
    child.once("exit", (code, signal) =>
      resume(code === 0 ? Effect.void : Effect.fail(failed(file, `flock(1) ended with ${signal ?? `code ${code}`}`)))
    )
    return Effect.sync(() => child.kill("SIGKILL"))
  })

const isSameFile = (file: string, fd: number) => {
  const mine = fstatSync(fd)
  const there = statSync(file, { throwIfNoEntry: false })
  return there !== undefined && there.ino === mine.ino && there.dev === mine.dev
}

/**
 * Takes the lock for the scope. The holder removes the file before it releases the lock, so that no empty files pile up. A process that
 * waited for the removed file finds that the name leads to another file, or to none, and tries again.
 */
const hold = (file: string): Effect.Effect<void, PlatformErrors.SystemError, Scope.Scope> =>
  Effect.uninterruptibleMask((restore) =>
    Effect.gen(function* () {
      const attempt = yield* Scope.make()
      const isHeld = yield* Effect.gen(function* () {
        const fd = yield* open(file)
        yield* restore(flock(file, fd))
        return isSameFile(file, fd)
      }).pipe(
        Scope.extend(attempt),
        Effect.onError((cause) => Scope.close(attempt, Exit.failCause(cause)))
      )
      if (!isHeld) {
        yield* Scope.close(attempt, Exit.void)
        return yield* restore(hold(file))
      }
      yield* Effect.addFinalizer((exit) =>
        Effect.zipRight(Effect.ignore(Effect.try(() => unlinkSync(file))), Scope.close(attempt, exit))
      )
    })
  )

/**
 * Runs an effect while no other process on this host runs one under the same lock file. It waits for the lock without a time limit and
 * without polling; the wait may be interrupted. The lock is released when the effect has ended. Fails with `onFailure`'s error when the file
 * cannot be made or opened, or flock(1) cannot be run.
 */
export const withLock =
  <F>(file: string, onFailure: (cause: PlatformErrors.SystemError) => F) =>
  <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E | F, R> =>
    Effect.acquireUseRelease(
      Scope.make(),
      (scope) => Effect.zipRight(Effect.mapError(Scope.extend(hold(file), scope), onFailure), effect),
      (scope, exit) => Scope.close(scope, exit)
    )
