import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, identity, Option, Schema } from "effect"
import { Assets } from "../host/Assets.ts"
import type { BootPlan } from "../machine/BootOptions.ts"
import type { Disk } from "../machine/MachineSpec.ts"
import type { Leftover } from "../machine/Registry.ts"
import { Vmm } from "../machine/Vmm.ts"
import * as fileState from "../platform/fileState.ts"
import { FileState } from "../platform/fileState.ts"
import * as HostLock from "../platform/HostLock.ts"
import { Settings } from "../Settings.ts"
import * as Bundle from "../snapshot/Bundle.ts"
import { misfits } from "../snapshot/compatibility.ts"
import { type SnapshotEngine, SnapshotEngines } from "../snapshot/SnapshotEngine.ts"
import { TemplateRecord, TemplateShape } from "./Template.ts"

/**
 * Templates: bundles of machines that have booted and run nothing, in `<cacheDir>/templates/<key>`. Under TCG most of a kernel's boot is spent on
 * translating code that runs once. A machine of the same shape continues from the template instead, with an identity and a configuration of its
 * own. A template that is missing or cannot be used is never an error of a boot: the boot then uses a kernel.
 */
export interface Template {
  readonly bundle: Bundle.Bundle
  readonly engine: SnapshotEngine
  /** Path of the template's upper, which is copied for each VM. */
  readonly upper: string
}

/** The fields of a boot plan that decide the machine. */
export type Shaping = Pick<BootPlan, "rootDisk" | "mounts" | "memoryMib" | "vcpus" | "rootDiskSizeBytes" | "network">

/** Whether a machine can start from a template: its disks must be shared or empty, so that it is the same for every VM. */
export const canBePrepared = ({ mounts, rootDisk }: Shaping) =>
  rootDisk === undefined && mounts.mount === undefined && mounts.liveMounts.length === 0

const recordFile = "template.json"
const RecordJson = Schema.parseJson(TemplateRecord)

const templatesDir = Effect.map(Settings, ({ cacheDir }) => path.join(cacheDir, "templates"))

/** Runs an effect while no other process makes or removes the template. */
export const withTemplateLock = <F>(dir: string, onFailure: (cause: Error) => F) =>
  HostLock.withLock(HostLock.fileFor(dir), onFailure)

/** The directory in which a template is made, before it gets its name. */
export const stagingDir = (dir: string) => `${dir}.making`

/** The shape of a boot's machine, and the directory of its template. */
export const shapeOf = Effect.fn("templates.shapeOf")(function* (plan: Shaping, base: string) {
  const assets = yield* Assets
  const vmm = yield* Vmm
  const disks: ReadonlyArray<Disk> = [
    { id: "root", path: base, readOnly: true },
    { id: "upper", path: "", readOnly: false }
  ]
  const { tscKhz: _, ...machine } = yield* vmm.fingerprint({ disks, network: plan.network === "nat", shares: false })
  const shape = new TemplateShape({
    recipe: 1,
    kernel: yield* assets.kernel,
    init: yield* assets.init,
    kernelArguments: yield* vmm.kernelArguments,
    base: yield* fileState.read(base),
    rootDiskSizeBytes: plan.rootDiskSizeBytes,
    memoryMib: plan.memoryMib,
    vcpus: plan.vcpus,
    network: plan.network,
    machine
  })
  return { shape, dir: path.join(yield* templatesDir, shape.key) }
})

/** The engine that saves whole machines; `undefined` when there is none. */
export const machineEngine = Effect.map(SnapshotEngines, (engines) =>
  [...engines.values()].find(({ sameMachine }) => sameMachine)
)

/** Time limit of the search, which takes milliseconds: a VMM that hangs when asked for its version must not hold up a boot. */
const searchTimeout = "5 seconds"

/** The template for a boot; `None` when there is no undamaged one that fits. */
export const find = Effect.fn("templates.find")(
  function* (plan: Shaping, base: string) {
    const fs = yield* FileSystem.FileSystem
    // without templates nothing needs to be probed
    if (!(yield* fs.exists(yield* templatesDir))) return Option.none<Template>()
    const { dir, shape } = yield* shapeOf(plan, base)
    if (!(yield* fs.exists(dir))) return Option.none<Template>()
    return Option.some(yield* open(dir, shape))
  },
  Effect.timeoutFail({ duration: searchTimeout, onTimeout: () => new Error(`no answer within ${searchTimeout}`) }),
  Effect.catchAll((error) => Effect.as(Effect.logDebug(`no template: ${error.message}`), Option.none<Template>()))
)

/**
 * Checks a template as a restore checks its bundle, but by the states of the files instead of their contents: the files are our own, and every
 * boot pays for the check.
 */
const open = Effect.fnUntraced(function* (dir: string, shape: TemplateShape) {
  const [bundle, { files, shape: made }] = yield* Effect.all([Bundle.read(dir), recordOf(dir)], { concurrency: 2 })
  const { manifest } = bundle
  const engine = yield* machineEngine
  if (engine?.name !== manifest.engine) return yield* unusable(dir, "no engine here can go on with it")
  const [root, upper] = manifest.disks.map(({ source }) => source)
  const blob = (name: string) => manifest.blobs.find((blob) => blob.name === name)
  const upperBlob = upper?._tag === "Blob" ? blob(upper.name) : undefined
  if (
    made.key !== shape.key ||
    manifest.disks.map(({ id }) => id).join(" ") !== "root upper" ||
    root?._tag !== "Image" ||
    root.path !== shape.base.path ||
    upperBlob?.sizeBytes !== shape.rootDiskSizeBytes ||
    manifest.memoryMib !== shape.memoryMib ||
    manifest.vcpus !== shape.vcpus ||
    manifest.network !== shape.network ||
    engine.blobs.some((name) => blob(name) === undefined)
  ) {
    return yield* unusable(dir, "it holds another machine")
  }
  const [reasons, now] = yield* Effect.all([misfits(bundle, {}), statesOf(dir, bundle)], { concurrency: 2 })
  if (reasons.length > 0) return yield* unusable(dir, reasons.join("; "))
  if (!sameFiles(now, files)) return yield* unusable(dir, "its files are not those it was made with")
  const template: Template = { bundle, engine, upper: path.join(dir, upperBlob.name) }
  return template
})

const recordOf = Effect.fnUntraced(function* (dir: string) {
  const fs = yield* FileSystem.FileSystem
  return yield* Schema.decode(RecordJson)(yield* fs.readFileString(path.join(dir, recordFile)))
})

const statesOf = (dir: string, { manifest }: Bundle.Bundle) =>
  Effect.forEach(manifest.blobs, ({ name }) =>
    Effect.map(fileState.read(path.join(dir, name)), (state): FileState => ({ ...state, path: name }))
  )

const sameFiles = Schema.equivalence(Schema.Array(FileState))

const unusable = (dir: string, why: string) => Effect.fail(new Error(`${dir}: ${why}`))

/** Writes the record of a template. */
export const writeRecord = Effect.fnUntraced(function* (bundle: Bundle.Bundle, shape: TemplateShape) {
  const fs = yield* FileSystem.FileSystem
  const record = new TemplateRecord({ shape, files: yield* statesOf(bundle.dir, bundle) })
  const text = yield* Effect.orDie(Schema.encode(RecordJson)(record))
  yield* fs.writeFileString(path.join(bundle.dir, recordFile), text)
})

/** Removes templates whose kernel, init or image is gone, and leftovers of killed makers. With `dryRun` only lists them. */
export const collect = Effect.fn("templates.collect")(function* (options: { readonly dryRun?: boolean } = {}) {
  const fs = yield* FileSystem.FileSystem
  const dir = yield* templatesDir
  const names = yield* Effect.orElseSucceed(fs.readDirectory(dir), () => [])
  const found = yield* Effect.forEach(names, (name) => {
    const at = path.join(dir, name)
    const making = name.endsWith(stagingDir(""))
    return withTemplateLock(
      making ? at.slice(0, -stagingDir("").length) : at,
      identity
    )(
      Effect.gen(function* () {
        // the maker may have renamed it while we waited for the lock
        if (!(yield* fs.exists(at)) || (!making && (yield* isUsable(at)))) return []
        const removed = options.dryRun === true || (yield* Effect.isSuccess(fs.remove(at, { recursive: true })))
        const leftover: Leftover = {
          id: name,
          name: "template",
          removedPaths: removed ? [at] : [],
          failedPaths: removed ? [] : [at]
        }
        return [leftover]
      })
    ).pipe(Effect.orElseSucceed(() => []))
  })
  return found.flat()
})

const isUsable = (dir: string) =>
  Effect.gen(function* () {
    const fs = yield* FileSystem.FileSystem
    const { shape } = yield* recordOf(dir)
    const { base, init, kernel } = shape
    const there = yield* Effect.forEach([init, kernel, base.path], (file) => fs.exists(file))
    return (
      shape.key === path.basename(dir) && there.every(Boolean) && sameFiles([yield* fileState.read(base.path)], [base])
    )
  }).pipe(Effect.orElseSucceed(() => false))
