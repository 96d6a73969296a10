import { Effect, Stream } from "effect"
import * as Tar from "tar"

/** A directory's contents as a tar stream: modes, mtimes, symlinks and hard links; not owners. `skip` sees paths relative to `dir`. */
export const pack = (dir: string, skip: (relative: string) => boolean): Stream.Stream<Uint8Array, Error> =>
  Stream.suspend(() =>
    Stream.fromAsyncIterable(
      Tar.create({ cwd: dir, portable: false, noPax: false, filter: (path) => !skip(path.replace(/^\.\//, "")) }, [
        "."
      ]),
      toError
    )
  )

/** One file as a tar stream, under its own base name. */
export const packFile = (dir: string, name: string, as: string): Stream.Stream<Uint8Array, Error> =>
  Stream.suspend(() =>
    Stream.fromAsyncIterable(
      Tar.create(
        {
          cwd: dir,
          onWriteEntry: (entry) => {
            entry.path = as
          }
        },
        [name]
      ),
      toError
    )
  )

/**
 * Unpacks a tar stream into a directory that exists. The stream may come from a hostile guest: the library drops entries that would leave
 * the directory (absolute, `..`, through a symlink), and any warning of it becomes a failure here. Files belong to the caller.
 */
export const unpack = <E, R>(dir: string, bytes: Stream.Stream<Uint8Array, E, R>): Effect.Effect<void, E | Error, R> =>
  Effect.suspend(() => {
    let failure: Error | undefined
    const unpack = new Tar.Unpack({
      cwd: dir,
      preserveOwner: false,
      strict: false,
      onwarn: (code, message) => {
        failure ??= new Error(`${code}: ${message}`)
      }
    })
    unpack.on("error", (error: Error) => {
      failure ??= error
    })
    const write = (chunk: Uint8Array) =>
      Effect.async<void, Error>((resume) => {
        if (failure !== undefined) return resume(Effect.fail(failure))
        if (unpack.write(Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength))) return resume(Effect.void)
        unpack.once("drain", () => resume(failure === undefined ? Effect.void : Effect.fail(failure)))
      })
    const end = Effect.async<void, Error>((resume) => {
      unpack.once("close", () => resume(failure === undefined ? Effect.void : Effect.fail(failure)))
      unpack.end()
    })
    return Effect.zipRight(Stream.runForEach(bytes, write), end)
  })

const toError = (cause: unknown) => (cause instanceof Error ? cause : new Error(String(cause)))
