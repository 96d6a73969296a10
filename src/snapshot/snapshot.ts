import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import { BootError, SnapshotError } from "../errors.ts"
import { RootfsImage } from "../image/RootfsImage.ts"
import type { Disk } from "../machine/MachineSpec.ts"
import { Vmm } from "../machine/Vmm.ts"
import { given } from "../platform/given.ts"
import { type OptionNames, unknownOption, unknownOptionText } from "../platform/knownOptions.ts"
import { Settings } from "../Settings.ts"
import * as PhaseTimer from "../vm/PhaseTimer.ts"
import * as Bundle from "./Bundle.ts"
import { type BundleDisk, channelVersion, type EngineName } from "./BundleManifest.ts"
import { FileHasher } from "./FileHasher.ts"
import { type PendingCapture, type SnapshotEngine, SnapshotEngines, type Source } from "./SnapshotEngine.ts"

export interface SnapshotOptions {
  /** Absent, or an empty directory. */
  readonly outDir: string
  /** Default: MACHINEN_SNAPSHOT_ENGINE, else the first of the engines there are, `vmstate`. */
  readonly engine?: EngineName
  /** The source goes on after the snapshot; without it the source ends, since two that hold the same connections and jobs rarely are wanted. */
  readonly leaveRunning?: boolean
  /** Established TCP connections are closed in what is restored. An engine that saves the whole machine keeps them. Default false. */
  readonly tcpClose?: boolean
  /**
   * Processes may hold files on live mounts: in what is restored these give EIO, and a share comes back once they are closed. Without it such
   * a VM is refused (SNAPSHOT_MOUNT_BUSY). Default false.
   */
  readonly lazyUmount?: boolean
  /** For freezing the guest's processes. Default 90 s. */
  readonly timeoutMs?: number
}

export interface Snapshot {
  readonly bundle: Bundle.Bundle
  /** For how long the guest's processes stood still, in milliseconds; not for a source that ended. */
  readonly pausedMs: number | null
  readonly elapsedMs: number
  /** Where the time went, milliseconds by phase. */
  readonly phases: ReadonlyMap<string, number>
}

export const defaultTimeoutMs = 90_000

const optionNames: OptionNames<SnapshotOptions> = {
  outDir: true,
  engine: true,
  leaveRunning: true,
  tcpClose: true,
  lazyUmount: true,
  timeoutMs: true
}

/** JavaScript, and an `as`, can leave out what the type demands, and say what it does not know. */
const checkOptions = (options: SnapshotOptions): Effect.Effect<void, SnapshotError> => {
  const unknown = unknownOption(options, optionNames)
  if (unknown !== undefined) {
    return new SnapshotError({
      code: "SNAPSHOT_OPTION_INVALID",
      ...unknownOptionText("snapshot", unknown, optionNames)
    })
  }
  return typeof options.outDir === "string" && options.outDir !== ""
    ? Effect.void
    : new SnapshotError({
        code: "SNAPSHOT_OPTION_INVALID",
        message: "no directory was given for the bundle",
        hint: "give `outDir`: a directory that does not exist yet, or an empty one"
      })
}

/** The engine asked for, or the one configured. */
export const chooseEngine = Effect.fnUntraced(function* (wanted: EngineName | undefined) {
  const engines = yield* SnapshotEngines
  const { snapshotEngine } = yield* Settings
  const configured = snapshotEngine.trim().toLowerCase()
  const engine =
    wanted === undefined && configured === ""
      ? engines.values().next().value
      : [...engines.values()].find(({ name }) => name === (wanted ?? configured))
  if (engine === undefined) {
    return yield* new BootError({
      code: "BOOT_SNAPSHOT_ENGINE_INVALID",
      message: `there is no snapshot engine ${JSON.stringify(wanted ?? snapshotEngine)}`,
      hint: `the engines are: ${[...engines.keys()].join(", ")}`
    })
  }
  return engine
})

/**
 * Takes a snapshot: the directory is claimed, the guest held for as long as the copying takes, the bundle hashed and finished when it goes on
 * again. Until the commit a failure or an interruption lets the source go on and removes the bundle. From the commit on the bundle stays,
 * and what is left to do, ending a source that is to end, cannot be interrupted.
 */
export const snapshot = Effect.fn("snapshot")(function* (source: Source, options: SnapshotOptions) {
  const began = performance.now()
  yield* checkOptions(options)
  const leaveRunning = options.leaveRunning ?? false
  const { phase, phases } = yield* PhaseTimer.make
  const engine = yield* chooseEngine(options.engine)
  const images = yield* RootfsImage
  yield* checkSource(source)
  const result = yield* Effect.scoped(
    Effect.gen(function* () {
      const claim = yield* Bundle.claim(options.outDir, possibleBlobs)
      // while the VM still keeps them from being removed
      const shared = (source.entry.disks ?? []).filter(({ readOnly }) => readOnly)
      yield* Effect.forEach(shared, (disk) => images.noteBundle(disk.path, claim.dir))
      const taking = yield* engine
        .take(source, {
          dir: claim.dir,
          remove: claim.remove,
          sync: true,
          tcpClose: options.tcpClose ?? false,
          lazyUmount: options.lazyUmount ?? false,
          timeoutMs: options.timeoutMs ?? defaultTimeoutMs
        })
        .pipe(phase("prepare"))
      const carried = yield* carry(source, claim.dir)
      const facts = yield* Effect.fork(factsOf(source, engine))
      let pausedMs: number | null = null
      if (leaveRunning) pausedMs = yield* held(taking).pipe(phase("hold"))
      else yield* taking.hold.pipe(phase("hold"))
      const bundle = yield* Bundle.finish(claim.dir, [...taking.blobs, ...carried], yield* facts).pipe(
        phase("finalize")
      )
      yield* taking.commit.pipe(
        Effect.zipRight(claim.keep),
        Effect.zipRight(leaveRunning ? Effect.void : phase("poweroff")(source.machine.kill)),
        Effect.uninterruptible
      )
      return { bundle, pausedMs }
    })
  )
  const done: Snapshot = { ...result, elapsedMs: performance.now() - began, phases: phases() }
  return done
})

/** What a snapshot would refuse before it touches anything: the engine, the VM, the directory. */
export const checkSnapshot = Effect.fn("checkSnapshot")(function* (source: Source, options: SnapshotOptions) {
  yield* checkOptions(options)
  yield* chooseEngine(options.engine)
  yield* checkSource(source)
  yield* Bundle.checkDir(options.outDir)
})

/** What engines may put into a bundle, for the case that this process dies in the middle. */
const possibleBlobs = [
  "state",
  "memory",
  "upper.img",
  "root.img",
  "scratch.img",
  "mountlower.img",
  "mountupper.img",
  "img"
]

/** Read-only disks that were made for their VMs alone and are not to be found again elsewhere; returns the names of the blobs. */
const carry = Effect.fnUntraced(
  function* ({ entry }: Source, dir: string) {
    const fs = yield* FileSystem.FileSystem
    return yield* Effect.forEach((entry.disks ?? []).filter(isCarried), (disk) => {
      const name = `${disk.id}.img`
      // nobody writes them: a second name is as good as a copy, where it can be had
      return Effect.as(
        Effect.orElse(fs.link(disk.path, path.join(dir, name)), () => fs.copyFile(disk.path, path.join(dir, name))),
        name
      )
    })
  },
  Effect.mapError(
    (cause) =>
      new SnapshotError({
        code: "SNAPSHOT_DUMP_FAILED",
        message: `the VM's mounted directory could not be saved: ${cause.message}`,
        hint: "check the free space there, and that nobody has removed the image",
        cause
      })
  )
)

const isCarried = ({ id, readOnly }: Disk) => id === "mountlower" && readOnly

/** Holds the source while the blobs are made; returns for how long it stood. */
export const held = Effect.fnUntraced(function* (taking: PendingCapture) {
  const since = yield* Effect.scoped(taking.hold)
  return performance.now() - since
})

/** A disk that is the user's own and written in place is copied like any other; one that is not known is a VM of an older version. */
export const checkSource = ({ entry }: Source) =>
  entry.disks === undefined || entry.kernel === undefined
    ? Effect.fail(
        new SnapshotError({
          code: "SNAPSHOT_NO_DISK",
          message: `VM "${entry.label}" was started by a version that did not record its disks`,
          hint: "stop it and boot it again"
        })
      )
    : Effect.void

const factsOf = Effect.fnUntraced(
  function* ({ entry }: Source, engine: SnapshotEngine) {
    const digests = yield* FileHasher
    const vmm = yield* Vmm
    const all = entry.disks ?? []
    const disks = yield* Effect.forEach(all, (disk) =>
      Effect.gen(function* () {
        const { id, path, readOnly } = disk
        const blob = { _tag: "Blob", name: `${id}.img`, readOnly } as const
        const source: BundleDisk["source"] =
          readOnly && !isCarried(disk) ? { _tag: "Image", path, sha256: yield* digests.remembered(path) } : blob
        return { id, source }
      })
    )
    const facts: Bundle.Facts = {
      engine: engine.name,
      snappedAt: Date.now(),
      sourceId: entry.id,
      ...given({ sourceName: entry.name }),
      sourceImage: entry.image,
      ...given({ command: entry.command }),
      machine: yield* vmm.fingerprint({
        disks: all,
        network: entry.network === "nat",
        shares: (entry.liveMounts ?? []).length > 0
      }),
      kernelSha256: yield* digests.remembered(entry.kernel ?? ""),
      channel: channelVersion,
      memoryMib: entry.memoryMib,
      vcpus: entry.vcpus,
      network: entry.network,
      disks,
      ...given({ mount: entry.mount, liveMounts: entry.liveMounts })
    }
    return facts
  },
  Effect.mapError(
    (cause) =>
      new SnapshotError({
        code: "SNAPSHOT_DUMP_FAILED",
        message: `what the VM is made of cannot be told: ${cause.message}`,
        cause
      })
  )
)
