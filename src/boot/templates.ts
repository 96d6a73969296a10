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
 * Templates: bundles of machines that have booted and run nothing, `<cacheDir>/templates/<key>`. Emulated, a kernel's boot is the
 * translation of code that runs once; a machine of the same shape begins where the template stands, and is given an identity and a
 * configuration of its own. Whoever looks for one finds it or boots: nothing about a template is ever an error of a boot.
 */
export interface Template {
  readonly bundle: Bundle.Bundle
  readonly engine: SnapshotEngine
  /** What the guest has written until then: the beginning of a VM's own upper. */
  readonly upper: string
}

/** What a boot's plan says about the machine. */
export type Shaping = Pick<BootPlan, "rootDisk" | "mounts" | "memoryMib" | "vcpus" | "rootDiskSizeBytes" | "network">

/** Only a machine that is made of shared files and empty ones is the same for everybody. */
export const canBePrepared = ({ mounts, rootDisk }: Shaping) =>
  rootDisk === undefined && mounts.mount === undefined && mounts.liveMounts.length === 0

const recordFile = "template.json"
const RecordJson = Schema.parseJson(TemplateRecord)

const templatesDir = Effect.map(Settings, ({ cacheDir }) => path.join(cacheDir, "templates"))

/** One maker, and one who clears away, at a time. */
export const exclusively = <F>(dir: string, onFailure: (cause: Error) => F) =>
  HostLock.withLock(HostLock.fileFor(dir), onFailure)

/** Where a template is made, before it has its name. */
export const stagingDir = (dir: string) => `${dir}.making`

/** The machine such a boot would have: the disks of its root, the key of its template, and where that lies. */
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

/** The engine that saves machines as they are, if this program has one. */
export const wholeMachines = Effect.map(SnapshotEngines, (engines) =>
  [...engines.values()].find(({ sameMachine }) => sameMachine)
)

/** Long for what takes milliseconds, short for a VMM that hangs when it is asked for its version. */
const lookWithin = "5 seconds"

/** The template for such a boot, if there is one that is whole and fits. */
export const find = Effect.fn("templates.find")(
  function* (plan: Shaping, base: string) {
    const fs = yield* FileSystem.FileSystem
    // a host without templates is asked nothing
    if (!(yield* fs.exists(yield* templatesDir))) return Option.none<Template>()
    const { dir, shape } = yield* shapeOf(plan, base)
    if (!(yield* fs.exists(dir))) return Option.none<Template>()
    return Option.some(yield* open(dir, shape))
  },
  Effect.timeoutFail({ duration: lookWithin, onTimeout: () => new Error(`no answer within ${lookWithin}`) }),
  Effect.catchAll((error) => Effect.as(Effect.logDebug(`no template: ${error.message}`), Option.none<Template>()))
)

/**
 * Looks at a template as a restore looks at its bundle, but at its files' states instead of their contents: they are ours, and this is on
 * the way of every boot.
 */
const open = Effect.fnUntraced(function* (dir: string, shape: TemplateShape) {
  const [bundle, { files, shape: made }] = yield* Effect.all([Bundle.read(dir), recordOf(dir)], { concurrency: 2 })
  const { manifest } = bundle
  const engine = yield* wholeMachines
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

/** Writes down what the bundle is a template of. */
export const describe = Effect.fnUntraced(function* (bundle: Bundle.Bundle, shape: TemplateShape) {
  const fs = yield* FileSystem.FileSystem
  const record = new TemplateRecord({ shape, files: yield* statesOf(bundle.dir, bundle) })
  const text = yield* Effect.orDie(Schema.encode(RecordJson)(record))
  yield* fs.writeFileString(path.join(bundle.dir, recordFile), text)
})

/** Removes the templates nobody can use any more, their kernel, init or image being gone, and what a killed maker left. */
export const collect = Effect.fn("templates.collect")(function* (options: { readonly dryRun?: boolean } = {}) {
  const fs = yield* FileSystem.FileSystem
  const dir = yield* templatesDir
  const names = yield* Effect.orElseSucceed(fs.readDirectory(dir), () => [])
  const found = yield* Effect.forEach(names, (name) => {
    const at = path.join(dir, name)
    const making = name.endsWith(stagingDir(""))
    return exclusively(
      making ? at.slice(0, -stagingDir("").length) : at,
      identity
    )(
      Effect.gen(function* () {
        // it may have got its name while we waited for its maker
        if (!(yield* fs.exists(at)) || (!making && (yield* isOfUse(at)))) return []
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

const isOfUse = (dir: string) =>
  Effect.gen(function* () {
    const fs = yield* FileSystem.FileSystem
    const { shape } = yield* recordOf(dir)
    const { base, init, kernel } = shape
    const there = yield* Effect.forEach([init, kernel, base.path], (file) => fs.exists(file))
    return (
      shape.key === path.basename(dir) && there.every(Boolean) && sameFiles([yield* fileState.read(base.path)], [base])
    )
  }).pipe(Effect.orElseSucceed(() => false))
