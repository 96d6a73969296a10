import * as fs from "node:fs"
import * as path from "node:path"
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

/** One file's header and content, as they stand in an archive; it is root's, and of no time. */
export const entry = (name: string, content: Uint8Array): Uint8Array => {
  const header = new Tar.Header({
    path: name,
    mode: 0o644,
    uid: 0,
    gid: 0,
    size: content.length,
    mtime: new Date(0),
    type: "File"
  })
  const padded = Buffer.alloc(512 + Math.ceil(content.length / 512) * 512)
  header.encode(padded, 0)
  padded.set(content, 512)
  return padded
}

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
 * Unpacks a tar stream into a directory that exists. The stream may come from a hostile guest: what would leave the directory (absolute,
 * `..`, through a symlink) is a failure. Symlinks are made last, with the target they had, so that nothing is written through one of the
 * archive's own. Files belong to the caller.
 */
export const unpack = <E, R>(dir: string, bytes: Stream.Stream<Uint8Array, E, R>): Effect.Effect<void, E | Error, R> =>
  Effect.suspend(() => {
    let failure: Error | undefined
    const links: Array<{ readonly path: string; readonly target: string }> = []
    const unpack = new Tar.Unpack({
      cwd: dir,
      preserveOwner: false,
      strict: false,
      filter: (path, entry) => {
        if (!("type" in entry) || entry.type !== "SymbolicLink") return true
        links.push({ path, target: entry.linkpath ?? "" })
        return false
      },
      onwarn: (code, message) => {
        failure ??= new Error(`${code}: ${message}`)
      }
    })
    unpack.on("error", (error: Error) => {
      failure ??= error
    })
    const settled = () => (failure === undefined ? Effect.void : Effect.fail(failure))
    const write = (chunk: Uint8Array) =>
      Effect.async<void, Error>((resume) => {
        if (failure !== undefined) return resume(settled())
        if (unpack.write(Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength))) return resume(Effect.void)
        unpack.once("drain", () => resume(settled()))
      })
    const end = Effect.async<void, Error>((resume) => {
      unpack.once("close", () => resume(settled()))
      unpack.end()
    })
    const makeLinks = Effect.try({
      try: () => {
        for (const { path, target } of links) makeLink(dir, path, target)
      },
      catch: toError
    })
    return Stream.runForEach(bytes, write).pipe(Effect.zipRight(end), Effect.zipRight(makeLinks))
  })

/** Makes one symlink, in a directory that is really below `dir`. */
const makeLink = (dir: string, relative: string, target: string): void => {
  const root = fs.realpathSync(dir)
  const at = path.resolve(root, relative)
  if (!at.startsWith(`${root}/`)) throw new Error(`the symlink ${relative} would be made outside of ${dir}`)
  const parent = fs.realpathSync(path.dirname(at))
  if (parent !== root && !parent.startsWith(`${root}/`)) throw new Error(`the symlink ${relative} leads out of ${dir}`)
  fs.rmSync(at, { force: true })
  fs.symlinkSync(target, at)
}

const toError = (cause: unknown) => (cause instanceof Error ? cause : new Error(String(cause)))
