import * as path from "node:path"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Context, Effect, Layer, Schema } from "effect"
import { Assets } from "../host/Assets.ts"
import * as command from "../platform/command.ts"
import * as fileState from "../platform/fileState.ts"
import { Settings } from "../Settings.ts"

/** Digest of a file's content; holes and zeros are the same (docs/protocol.md §5.6). Sizes are in bytes. */
export const Digest = Schema.Struct({ sizeBytes: Schema.Number, dataBytes: Schema.Number, sha256: Schema.String })
export type Digest = typeof Digest.Type

/** A file that cannot be read. */
export class DigestFailed extends Schema.TaggedError<DigestFailed>()("DigestFailed", {
  message: Schema.String,
  cause: Schema.optional(Schema.Defect)
}) {}

/** Hashes large sparse files. The shim computes the hashes, because it skips holes and uses the CPU's SHA instructions. */
export class FileHasher extends Context.Tag("machinen/FileHasher")<
  FileHasher,
  {
    /** Reads the files and returns their digests in the same order. */
    readonly of: (files: ReadonlyArray<string>) => Effect.Effect<ReadonlyArray<Digest>, DigestFailed>
    /** The sha256 of a file that rarely changes, cached by the file's state. */
    readonly remembered: (file: string) => Effect.Effect<string, DigestFailed>
  }
>() {
  static readonly layer = Layer.effect(
    FileHasher,
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const executor = yield* CommandExecutor.CommandExecutor
      const assets = yield* Assets
      const { cacheDir } = yield* Settings

      const of = Effect.fn("FileHasher.of")(
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

      return FileHasher.of({
        of,
        remembered: Effect.fn("FileHasher.remembered")(
          function* (file) {
            const dir = path.join(cacheDir, "digests")
            const blocks = Effect.flatMap(of([file]), ([found]) =>
              found === undefined
                ? Effect.fail(new DigestFailed({ message: `the shim gave no digest of ${file}` }))
                : Effect.succeed(found.sha256)
            )
            return yield* fileState.remembered(fs, { dir, file, what: "blocks", schema: Sha256 }, blocks)
          },
          Effect.catchTag("FileUnreadable", (cause) => new DigestFailed({ message: cause.message, cause }))
        )
      })
    })
  )
}

const Sha256 = Schema.String.pipe(Schema.pattern(/^[0-9a-f]{64}$/))
