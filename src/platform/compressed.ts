import { createHash } from "node:crypto"
import { createWriteStream } from "node:fs"
import { PassThrough, pipeline, Transform } from "node:stream"
import { createGzip } from "node:zlib"
import { Deferred, Effect, Runtime, Stream } from "effect"

/** A file that was written: its size in bytes and its sha256. */
export interface Written {
  readonly sizeBytes: number
  readonly sha256: string
}

/** gzip's level. A higher one would make the host slower than the guest that sends the stream. */
const level = 4

/**
 * Writes a stream to an existing, empty file, as gzip unless `plain`. Returns the file's size in bytes and sha256 once it is on disk. The
 * same input gives the same bytes. Fails with the stream's error or Node's.
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
          // `flush` syncs on close: the file gets its final name later, which must not be on disk before the bytes are
          pipeline(first, count, createWriteStream(file, { flags: "r+", flush: true }), (error) =>
            runFork(error ? Deferred.fail(done, error) : Deferred.succeed(done, undefined))
          )
          return first
        }),
        // ends the pipeline if it has not ended; the file is closed once `done` is completed, also by a failure
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
      // fails at once when the file cannot be written, not when the whole stream has been read
      yield* Effect.raceFirst(pushed, Effect.zipRight(Deferred.await(done), Effect.never))
      return { sizeBytes, sha256: hash.digest("hex") }
    })
  )
