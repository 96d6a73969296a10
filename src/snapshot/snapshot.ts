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

/** Options of a snapshot. Every option but `outDir` has a default. */
export interface SnapshotOptions {
  /** A directory that does not exist yet, or an empty one. */
  readonly outDir: string
  /** Default: MACHINEN_SNAPSHOT_ENGINE, else the first engine, `vmstate`. */
  readonly engine?: EngineName
  /** True: the source keeps running. Default false: it ends, because two VMs with the same connections and jobs are rarely wanted. */
  readonly leaveRunning?: boolean
  /** True: established TCP connections are closed in the copy. Default false. `vmstate` keeps them in any case. */
  readonly tcpClose?: boolean
  /**
   * True: processes may hold locks on files of live mounts, which a copy does not have. Default false: such a VM is refused
   * (SNAPSHOT_MOUNT_BUSY). Open files stay open in a copy, as long as the host still has them.
   */
  readonly lazyUmount?: boolean
  /**
   * Time limit for freezing (criu: dumping) the guest's processes, in milliseconds. Default 90,000. The guest takes 60,000 at most for freezing and
   * 600,000 for dumping.
   */
  readonly timeoutMs?: number
}

/** A snapshot that was taken. */
export interface Snapshot {
  readonly bundle: Bundle.Bundle
  /** Milliseconds for which the guest's processes stood still; null when the source ended. */
  readonly pausedMs: number | null
  readonly elapsedMs: number
  /** Milliseconds by phase. */
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

/** Checks the options at run time: JavaScript callers may leave out required ones and misspell others. */
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

/** The engine in the options, else the configured one. Fails with BOOT_SNAPSHOT_ENGINE_INVALID. */
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
 * Takes a snapshot: claims the directory, holds the guest while files are copied, then hashes and finishes the bundle. Until the commit a failure
 * or an interruption lets the source go on and removes the bundle. From the commit on the bundle stays; the last step, ending a source that is to
 * end, cannot be interrupted.
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
      // now, while the running VM protects the images from removal
      const shared = (source.entry.disks ?? []).filter(({ readOnly }) => readOnly)
      yield* Effect.forEach(shared, (disk) => images.noteBundle(disk.path, claim.dir))
      const capture = yield* engine
        .take(source, {
          dir: claim.dir,
          remove: claim.remove,
          sync: true,
          tcpClose: options.tcpClose ?? false,
          lazyUmount: options.lazyUmount ?? false,
          timeoutMs: options.timeoutMs ?? defaultTimeoutMs
        })
        .pipe(phase("prepare"))
      const mountImages = yield* copyMountDisks(source, claim.dir)
      const facts = yield* Effect.fork(factsOf(source, engine))
      let pausedMs: number | null = null
      if (leaveRunning) pausedMs = yield* holdTimed(capture).pipe(phase("hold"))
      else yield* capture.hold.pipe(phase("hold"))
      const bundle = yield* Bundle.finish(claim.dir, [...capture.blobs, ...mountImages], yield* facts).pipe(
        phase("finalize")
      )
      yield* capture.commit.pipe(
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

/** Fails as a snapshot would because of its options, its engine, the VM or the directory. Touches nothing. */
export const checkSnapshot = Effect.fn("checkSnapshot")(function* (source: Source, options: SnapshotOptions) {
  yield* checkOptions(options)
  yield* chooseEngine(options.engine)
  yield* checkSource(source)
  yield* Bundle.checkDir(options.outDir)
})

/** All files that engines may put into a bundle: what is removed if this process dies before the commit. */
const possibleBlobs = [
  "state",
  "memory",
  "shares",
  "upper.img",
  "root.img",
  "scratch.img",
  "mountlower.img",
  "mountupper.img",
  "img"
]

/** Copies into the bundle the read-only disks that exist for their VMs alone (`mountlower`). Returns the names of the blobs. */
const copyMountDisks = Effect.fnUntraced(
  function* ({ entry }: Source, dir: string) {
    const fs = yield* FileSystem.FileSystem
    return yield* Effect.forEach((entry.disks ?? []).filter(isMountImage), (disk) => {
      const name = `${disk.id}.img`
      // these files never change, so a hard link is as good as a copy, where one can be made
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

const isMountImage = ({ id, readOnly }: Disk) => id === "mountlower" && readOnly

/** Holds the source while the blobs are made. Returns for how many milliseconds it stood still. */
export const holdTimed = Effect.fnUntraced(function* (capture: PendingCapture) {
  const since = yield* Effect.scoped(capture.hold)
  return performance.now() - since
})

/** Fails with SNAPSHOT_NO_DISK for a VM of an older version, whose entry does not list disks and kernel. */
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
          readOnly && !isMountImage(disk) ? { _tag: "Image", path, sha256: yield* digests.remembered(path) } : blob
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
