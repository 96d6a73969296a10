import { FileSystem } from "@effect/platform"
import { Effect, Option } from "effect"
import { BootError, SnapshotError } from "../errors.ts"
import { RootfsImage } from "../image/RootfsImage.ts"
import type { BootOptions } from "../machine/BootOptions.ts"
import { given } from "../platform/given.ts"
import { Settings } from "../Settings.ts"
import * as Bundle from "../snapshot/Bundle.ts"
import { snapshot } from "../snapshot/snapshot.ts"
import { boot, check } from "./boot.ts"
import * as templates from "./templates.ts"

/** The boot options that decide the template. All other options apply to a machine that starts from it. */
export type PrepareOptions = Pick<BootOptions, "image" | "memoryMib" | "vcpus" | "rootDiskSizeBytes" | "network">

/** A template on disk. */
export interface Prepared {
  /** The template's directory. */
  readonly dir: string
  /** Bytes of data in the template's files. */
  readonly dataBytes: number
  /** False: an undamaged template was there already. */
  readonly made: boolean
}

/** A command that is run before the template is saved, so that its memory holds what every first command reads from the disk. */
const warmUpCommand = { argv: ["true"], user: "0:0", cwd: "/" } as const

/**
 * Makes the template of such a machine, unless it exists: boots a machine, lets it come to rest and saves it. Any number of concurrent callers
 * make it once. The template gets its name only when all of it is on disk. Fails as a boot or a snapshot does.
 */
export const prepare = Effect.fn("prepare")(function* (options: PrepareOptions) {
  const { image, memoryMib, network, rootDiskSizeBytes, vcpus } = options
  const wanted: BootOptions = {
    ...given({ image, memoryMib, network, rootDiskSizeBytes, vcpus })
  }
  const plan = yield* check(wanted)
  const engine = yield* templates.machineEngine
  if (engine === undefined) {
    return yield* new BootError({
      code: "BOOT_SNAPSHOT_ENGINE_INVALID",
      message: "no snapshot engine of this build saves whole machines",
      hint: "boots use a kernel, which needs no preparation"
    })
  }
  const base = yield* (yield* RootfsImage).resolve(plan.image)
  const { cacheDir } = yield* Settings
  const failed = Effect.mapError((cause: Error) => unwritable(cacheDir, cause))
  const { dir, shape } = yield* templates
    .shapeOf(plan, base)
    .pipe(Effect.catchTag("FileUnreadable", (error) => unwritable(cacheDir, error)))
  return yield* templates.withTemplateLock(dir, (cause) => unwritable(cacheDir, cause))(
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const there = yield* templates.find(plan, base)
      // reads the whole template: here is time to find damage, at a boot there is not
      if (Option.isSome(there) && (yield* Bundle.verify(there.value.bundle)).length === 0) {
        return toPrepared(there.value.bundle, false)
      }
      const outDir = templates.stagingDir(dir)
      // left by a killed maker: we hold the lock
      yield* failed(fs.remove(outDir, { recursive: true, force: true }))
      const { bundle } = yield* Effect.scoped(
        Effect.gen(function* () {
          const { vm } = yield* boot({ ...wanted, prepared: false })
          // an image without this command is prepared all the same
          yield* Effect.ignore(vm.execRaw(warmUpCommand))
          const source = { entry: vm.entry, machine: vm.machine, agent: vm }
          return yield* snapshot(source, { outDir, engine: engine.name })
        })
      )
      yield* failed(
        Effect.gen(function* () {
          yield* templates.writeRecord(bundle, shape)
          yield* fs.remove(dir, { recursive: true, force: true })
          yield* fs.rename(outDir, dir)
        })
      )
      return toPrepared({ ...bundle, dir }, true)
    }).pipe(Effect.onError(() => removeUnfinished(templates.stagingDir(dir))))
  )
})

const removeUnfinished = (dir: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) => Effect.ignore(fs.remove(dir, { recursive: true, force: true })))

const toPrepared = ({ dir, manifest }: Bundle.Bundle, made: boolean): Prepared => ({
  dir,
  dataBytes: manifest.blobs.reduce((sum, { dataBytes }) => sum + dataBytes, 0),
  made
})

const unwritable = (cacheDir: string, cause: Error) =>
  new SnapshotError({
    code: "SNAPSHOT_DUMP_FAILED",
    message: `the template cannot be written: ${cause.message}`,
    hint: `check the owner, the permissions and the free space of ${cacheDir}, or set MACHINEN_CACHE_DIR`,
    cause
  })
