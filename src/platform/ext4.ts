import * as path from "node:path"
import { Command } from "@effect/platform"
import { Data, Effect, Option, Stream } from "effect"
import { searchPath } from "./searchPath.ts"
import { ToolFailed, ToolMissing } from "./tool.ts"

/** The image's file system, or the file in it, cannot be read. */
class Ext4Unreadable extends Data.TaggedError("Ext4Unreadable")<{ readonly message: string }> {}

/** The file is longer than the caller's `maxBytes`. */
class Ext4TooLarge extends Data.TaggedError("Ext4TooLarge")<{ readonly message: string }> {}

const missing = (cause: unknown) => new ToolMissing({ tool: "debugfs", cause })

const maxListing = 16 * 1024 * 1024
const maxWords = 4096

/**
 * Asks debugfs, and fails when the answer has more than `maxBytes`. debugfs exits with 0 even when it could not serve the request, so callers
 * check that the answer holds what it must hold.
 */
const ask = (image: string, request: string, maxBytes: number) =>
  Effect.scoped(
    Effect.gen(function* () {
      const child = yield* Command.start(
        Command.make("debugfs", "-R", request, image).pipe(Command.env({ PATH: searchPath(), LC_ALL: "C" }))
      )
      let size = 0
      const [pieces, stderr] = yield* Effect.all(
        [
          child.stdout.pipe(
            Stream.tap((piece) => {
              size += piece.length
              return size > maxBytes
                ? Effect.fail(new Ext4TooLarge({ message: `${request}: more than ${maxBytes} bytes` }))
                : Effect.void
            }),
            Stream.runCollect
          ),
          child.stderr.pipe(
            Stream.decodeText(),
            Stream.runFold("", (words, more) => (words + more).slice(-maxWords))
          )
        ],
        { concurrency: 2 }
      )
      const code = yield* child.exitCode
      if (code !== 0) return yield* new ToolFailed({ tool: "debugfs", code, stderr })
      return { bytes: Buffer.concat([...pieces]), stderr }
    })
  ).pipe(Effect.catchTags({ BadArgument: missing, SystemError: missing }))

/** Parses a line of `ls -p`: `/inode/mode/uid/gid/name/size/`, one for each entry of a directory; the directory's own entry is `.`. */
const entryOf = (line: string) => {
  const [, inode = "", mode = "", , , name = "", size = ""] = line.split("/")
  return { inode, name, isFile: mode.startsWith("10"), leadsOn: /^(04|12)/.test(mode), size: Number(size) }
}

const list = (image: string, dir: string) =>
  Effect.flatMap(ask(image, `ls -p ${dir}`, maxListing), ({ bytes, stderr }) => {
    const entries = bytes.toString("latin1").split("\n").map(entryOf)
    return entries.some(({ name }) => name === ".")
      ? Effect.succeed(entries)
      : Effect.fail(new Ext4Unreadable({ message: `${image}: ${dir} cannot be read: ${lastLine(stderr)}` }))
  })

const lastLine = (text: string) => text.trim().split("\n").at(-1) ?? ""

/**
 * Reads a file out of an ext4 image that is not mounted. `None` means for certain that the image has no such regular file. Everything that
 * leaves this open is an error: Ext4Unreadable, Ext4TooLarge, ToolMissing, ToolFailed.
 */
export const readFile = Effect.fn("ext4.readFile")(function* (image: string, file: string, maxBytes: number) {
  const parts = file.split("/").filter((part) => part !== "")
  for (let depth = 0; depth < parts.length; depth++) {
    const dir = `/${parts.slice(0, depth).join("/")}`
    const found = (yield* list(image, dir)).find(({ inode, name }) => name === parts[depth] && inode !== "0")
    if (found === undefined) return Option.none<Buffer>()
    const isLast = depth === parts.length - 1
    if (isLast ? !found.isFile : !found.leadsOn) return Option.none<Buffer>()
    if (!isLast) continue
    if (found.size > maxBytes) return yield* new Ext4TooLarge({ message: `${image}: ${file} has ${found.size} bytes` })
    const { bytes, stderr } = yield* ask(image, `cat ${path.posix.join("/", file)}`, maxBytes)
    if (bytes.length === found.size) return Option.some(bytes)
    return yield* new Ext4Unreadable({ message: `${image}: ${file} cannot be read: ${lastLine(stderr)}` })
  }
  return Option.none<Buffer>()
})
