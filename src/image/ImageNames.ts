import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Effect, Option, Schema } from "effect"
import type { ProvisionError } from "../errors.ts"
import { cacheUnwritable } from "../host/hostTools.ts"
import * as HostLock from "../platform/HostLock.ts"
import { ImageId } from "./Image.ts"

/** Names of images in the store: a file for each name, which holds the image's id. */
export interface ImageNames {
  readonly get: (name: string) => Effect.Effect<Option.Option<ImageId>>
  /** Sets the image of a name; `None` removes the name. */
  readonly set: (name: string, id: Option.Option<ImageId>) => Effect.Effect<void, ProvisionError>
  readonly all: Effect.Effect<ReadonlyArray<{ readonly name: string; readonly id: ImageId }>>
}

export const make = (fs: FileSystem.FileSystem, cacheDir: string): ImageNames => {
  const cacheFailed = cacheUnwritable(cacheDir)
  const namesDir = path.join(cacheDir, "names")
  const nameFile = (name: string) => path.join(namesDir, encodeURIComponent(name))

  const named = (name: string) =>
    fs.readFileString(nameFile(name)).pipe(Effect.flatMap(Schema.decode(ImageId)), Effect.option)

  const setName = (name: string, id: Option.Option<ImageId>) =>
    HostLock.withLock(
      `${namesDir}.lock`,
      cacheFailed
    )(
      Option.match(id, {
        onNone: () => fs.remove(nameFile(name), { force: true }),
        onSome: (id) => {
          // one file for all drafts, because the lock lets one writer write at a time: the leftovers of a killed writer are overwritten
          const draft = path.join(namesDir, nameDraft)
          return fs
            .makeDirectory(namesDir, { recursive: true })
            .pipe(Effect.zipRight(fs.writeFileString(draft, id)), Effect.zipRight(fs.rename(draft, nameFile(name))))
        }
      })
    ).pipe(Effect.mapError((e) => (e._tag === "ProvisionError" ? e : cacheFailed(e))))

  const names = Effect.gen(function* () {
    const files = yield* Effect.orElseSucceed(fs.readDirectory(namesDir), () => [])
    const pairs = yield* Effect.forEach(files, (file) => {
      const name = decodedName(file)
      return name === undefined
        ? Effect.succeed([])
        : Effect.map(named(name), (id) => (Option.isSome(id) ? [{ name, id: id.value }] : []))
    })
    return pairs.flat()
  })

  return { get: named, set: setName, all: names }
}

/** The file name of the draft. No name is encoded like this, because no name begins with a dot. */
const nameDraft = ".draft"

/** The name behind a file name; `undefined` for other files in the directory. */
const decodedName = (file: string): string | undefined => {
  try {
    const name = decodeURIComponent(file)
    return file !== nameDraft && encodeURIComponent(name) === file ? name : undefined
  } catch {
    return undefined
  }
}
