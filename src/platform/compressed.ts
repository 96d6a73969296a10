import { createHash } from "node:crypto"
import { createWriteStream } from "node:fs"
import { PassThrough, pipeline, Transform } from "node:stream"
import { createGzip } from "node:zlib"
import { Deferred, Effect, Runtime, Stream } from "effect"

export interface Written {
  readonly sizeBytes: number
  readonly sha256: string
}

/** Of the time between two streams one is idle anyway; more compression would make the host the slower end. */
const level = 4

/**
 * Writes a stream to a file that is there and empty, as gzip unless `plain`, and says what the file holds then. The same bytes in give the same
 * bytes out. Complete means on disk.
 */
export const write = <E, R>(
  file: string,
  bytes: Stream.Stream<Uint8Array, E, R>,
  options: { readonly plain: boolean }
): Effect.Effect<Written, E | NodeJS.ErrnoException, R> =>
  Effect.scoped(
    Effect.gen(function* () {
      const runFork = Runtime.runFork(yield* Effect.runtime())
      const done = yield* Deferred.make<void, NodeJS.ErrnoException>()
      const hash = createHash("sha256")
      let sizeBytes = 0
      const first = yield* Effect.acquireRelease(
        Effect.sync(() => {
          const first = options.plain ? new PassThrough() : createGzip({ level })
          const count = new Transform({
            transform: (chunk: Buffer, _encoding, next) => {
              hash.update(chunk)
              sizeBytes += chunk.length
              next(null, chunk)
            }
          })
          // `flush`: closing syncs; the name that is given to the file later must not be there before its bytes
          pipeline(first, count, createWriteStream(file, { flags: "r+", flush: true }), (error) =>
            runFork(error ? Deferred.fail(done, error) : Deferred.succeed(done, undefined))
          )
          return first
        }),
        // ends the pipeline if it has not ended; the file is closed when `done` is, whatever came of it
        (first) =>
          Effect.zipRight(
            Effect.sync(() => first.destroy()),
            Effect.exit(Deferred.await(done))
          )
      )
      const push = (chunk: Uint8Array) =>
        Effect.async<void>((resume) => {
          if (first.destroyed || first.write(chunk)) return resume(Effect.void)
          const settle = () => {
            first.off("drain", settle).off("close", settle)
            resume(Effect.void)
          }
          first.on("drain", settle).on("close", settle)
          return Effect.sync(() => first.off("drain", settle).off("close", settle))
        })
      const pushed = Stream.runForEach(bytes, push).pipe(
        Effect.zipRight(Effect.sync(() => void first.end())),
        Effect.zipRight(Deferred.await(done))
      )
      // a file that cannot be written is told at once, not when everything has been sent
      yield* Effect.raceFirst(pushed, Effect.zipRight(Deferred.await(done), Effect.never))
      return { sizeBytes, sha256: hash.digest("hex") }
    })
  )
