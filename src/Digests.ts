import { createHash } from "node:crypto"
import * as path from "node:path"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Context, Effect, Layer, Option, Schema } from "effect"
import { Assets } from "./Assets.ts"
import * as command from "./platform/command.ts"
import { writeNote } from "./platform/note.ts"
import { Settings } from "./Settings.ts"

/** What a file holds, holes and zeros being the same (docs/protocol.md §5, digest). */
export const Digest = Schema.Struct({ sizeBytes: Schema.Number, dataBytes: Schema.Number, sha256: Schema.String })
export type Digest = typeof Digest.Type

/** A file that cannot be read. */
export class DigestFailed extends Schema.TaggedError<DigestFailed>()("DigestFailed", {
  message: Schema.String,
  cause: Schema.optional(Schema.Defect)
}) {}

/** Hashes of large sparse files, by the shim: it skips holes and uses the CPU's SHA instructions. */
export class Digests extends Context.Tag("machinen/Digests")<
  Digests,
  {
    /** Reads the files. In the order asked for. */
    readonly of: (files: ReadonlyArray<string>) => Effect.Effect<ReadonlyArray<Digest>, DigestFailed>
    /** The hash of a file that is not expected to change, remembered for its path, size, times and inode. */
    readonly remembered: (file: string) => Effect.Effect<string, DigestFailed>
  }
>() {
  static readonly layer = Layer.effect(
    Digests,
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const executor = yield* CommandExecutor.CommandExecutor
      const assets = yield* Assets
      const { cacheDir } = yield* Settings

      const of = Effect.fn("Digests.of")(
        function* (files: ReadonlyArray<string>) {
          const { code, stderr, stdout } = yield* command
            .run([yield* assets.shim, "digest", ...files])
            .pipe(Effect.provideService(CommandExecutor.CommandExecutor, executor))
          if (code !== 0) return yield* new DigestFailed({ message: stderr.trim() })
          return yield* Effect.forEach(stdout.trim().split("\n"), (line) =>
            Schema.decode(Schema.parseJson(Digest))(line)
          )
        },
        Effect.catchIf(
          (e) => e._tag !== "DigestFailed",
          (cause) => new DigestFailed({ message: cause.message, cause })
        )
      )

      return Digests.of({
        of,
        remembered: Effect.fn("Digests.remembered")(
          function* (file) {
            const info = yield* fs.stat(file)
            const stamp = [file, info.size, Option.map(info.mtime, Number), info.ino, info.dev].map(String).join("\n")
            const key = createHash("sha256").update(`blocks\n${stamp}`).digest("hex").slice(0, 32)
            const note = path.join(cacheDir, "digests", key)
            const known = yield* Effect.option(Effect.flatMap(fs.readFileString(note), Schema.decode(Sha256)))
            if (Option.isSome(known)) return known.value
            const sha = (yield* of([file]))[0]?.sha256 ?? ""
            yield* writeNote(fs, note, sha)
            return sha
          },
          Effect.catchIf(
            (e) => e._tag !== "DigestFailed",
            (cause) => new DigestFailed({ message: cause.message, cause })
          )
        )
      })
    })
  )
}

const Sha256 = Schema.String.pipe(Schema.pattern(/^[0-9a-f]{64}$/))
