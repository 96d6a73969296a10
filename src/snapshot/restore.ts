import { Effect } from "effect"
import { BootError } from "../errors.ts"
import { Assets } from "../host/Assets.ts"
import { refuseUnknown, validateMemory, validateVcpus } from "../machine/BootOptions.ts"
import type { NetworkMode } from "../machine/Network.ts"
import { Vmm } from "../machine/Vmm.ts"
import type { OptionNames } from "../platform/knownOptions.ts"
import * as memory from "../platform/memory.ts"
import * as Bundle from "./Bundle.ts"
import type { BundleManifest } from "./BundleManifest.ts"
import { disksOf, engineOf, misfits } from "./compatibility.ts"
import { refuseUnasked } from "./foreignBundle.ts"
import { detachAll, type ReviveOptions, revive } from "./revive.ts"
import type { SnapshotEngine } from "./SnapshotEngine.ts"

/** Options of a restore. Every option but `snapDir` has a default. */
export interface RestoreOptions extends ReviveOptions {
  /** The bundle's directory. */
  readonly snapDir: string
  /** The read-only image, if it is not where it was. Its content must be the same. */
  readonly image?: string
  /**
   * The network mode. Default: the source's. A bundle that is not this user's own is connected only when this says `nat`
   * (BOOT_SNAPSHOT_FOREIGN). With `criu` the mode may differ from the source's, with `vmstate` it may not.
   */
  readonly network?: NetworkMode
  /** Guest memory, as of a boot. Default: the source's. With `vmstate` it cannot differ (BOOT_MEMORY_INVALID). */
  readonly memoryMib?: number | "auto"
}

const optionNames: OptionNames<RestoreOptions> = {
  snapDir: true,
  name: true,
  image: true,
  liveMounts: true,
  env: true,
  secrets: true,
  detached: true,
  portForward: true,
  lazy: true,
  network: true,
  memoryMib: true
}

/**
 * Restores a bundle into the current scope, which ends the VM unless it is detached. Bundle, host and options are checked before anything is
 * acquired. A restore that fails or is interrupted leaves nothing, though the scope goes on.
 */
export const restore = Effect.fn("restore")(function* (options: RestoreOptions) {
  const restored = yield* restoreAttached(options)
  if (options.detached === true) yield* detachAll([restored])
  return restored
})

/** A restore without its last step: the caller detaches the VM once all VMs that it starts are ready. */
export const restoreAttached = Effect.fn("restoreAttached")(function* (options: RestoreOptions) {
  yield* refuseUnknown("restore", options, optionNames)
  if (typeof options.snapDir !== "string" || options.snapDir === "") {
    return yield* invalid("no bundle was given to restore", "give `snapDir`: the directory that a snapshot made")
  }
  const bundle = yield* Bundle.read(options.snapDir)
  const engine = yield* engineOf(bundle.manifest)
  const machine = yield* machineOf(bundle.manifest, engine, options)
  yield* refuseUnasked(bundle, options)
  const [reasons, sound] = yield* Effect.all(
    [misfits(bundle, options), Effect.exit(Bundle.check(bundle, engine.blobs))],
    { concurrency: 2 }
  )
  if (reasons.length > 0) {
    return yield* new BootError({
      code: "BOOT_SNAPSHOT_MISMATCH",
      message: `this host cannot go on with the snapshot ${bundle.dir}: ${reasons.join("; ")}`,
      hint: "restore it where it was taken, or take the snapshot again here"
    })
  }
  yield* sound
  const { manifest } = bundle
  return yield* revive(
    {
      engine,
      dir: bundle.dir,
      disks: yield* disksOf(bundle, options.image),
      mount: manifest.mount,
      liveMounts: manifest.liveMounts ?? [],
      image: manifest.sourceImage,
      command: manifest.command,
      kernel: yield* (yield* Assets).kernel,
      ...machine,
      // another user's bundle must not choose a name either
      sourceName: bundle.isOwn ? manifest.sourceName : undefined,
      forkedFrom: bundle.dir
    },
    options
  )
})

const invalid = (message: string, hint: string) => new BootError({ code: "BOOT_OPTION_INVALID", message, hint })

/** The machine into which a bundle is restored: a saved machine's own, or for saved processes what the options say. */
const machineOf = Effect.fnUntraced(function* (
  manifest: BundleManifest,
  { name, sameMachine }: SnapshotEngine,
  options: RestoreOptions
) {
  const { vcpus } = manifest
  const { memoryMib = manifest.memoryMib, network = manifest.network } = options
  if (!sameMachine) {
    const limits = { memoryBytes: yield* memory.totalBytes, maxVcpus: (yield* (yield* Vmm).capabilities).maxVcpus }
    return { memoryMib: yield* validateMemory(memoryMib, limits), vcpus: yield* validateVcpus(vcpus, limits), network }
  }
  if (memoryMib !== manifest.memoryMib) {
    return yield* new BootError({
      code: "BOOT_MEMORY_INVALID",
      message: `the engine ${name} saved the whole machine, which has ${manifest.memoryMib} MiB of memory and cannot be given ${memoryMib}`,
      hint: "leave the memory out; bundles of the engine criu go on in a machine of another size"
    })
  }
  if (network !== manifest.network) {
    return yield* invalid(
      `the engine ${name} saved the whole machine, whose network is "${manifest.network}" and cannot be "${network}"`,
      "restore it with the network it had, or take a snapshot of a VM that was booted otherwise"
    )
  }
  return { memoryMib: manifest.memoryMib, vcpus, network }
})
