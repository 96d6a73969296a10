import * as path from "node:path"
import { Effect, ExecutionStrategy, Scope } from "effect"
import { BootError } from "../errors.ts"
import { refuseUnknown } from "../machine/BootOptions.ts"
import { Registry } from "../machine/Registry.ts"
import { given } from "../platform/given.ts"
import type { OptionNames } from "../platform/knownOptions.ts"
import * as memory from "../platform/memory.ts"
import * as Launch from "../vm/launch.ts"
import type { EngineName } from "./BundleManifest.ts"
import { defaultFreeMemoryThreshold, refusal } from "./forkBackpressure.ts"
import { restoreAttached } from "./restore.ts"
import { detachAll, type Restored, type ReviveOptions, revive } from "./revive.ts"
import type { Source } from "./SnapshotEngine.ts"
import { checkSource, chooseEngine, defaultTimeoutMs, holdTimed, snapshot } from "./snapshot.ts"

/** Options of a fork. Every option has a default. */
export interface ForkOptions extends ReviveOptions {
  /** Number of siblings, all from one moment: 1 (default) to 256; with a `name` only 1. */
  readonly count?: number
  /** Keeps the bundle in this directory. Default: no bundle is kept. */
  readonly outDir?: string
  readonly engine?: EngineName
  /** True: established TCP connections survive in the siblings. Default false; `vmstate` keeps them in any case. */
  readonly tcpKeep?: boolean
  /** As `lazyUmount` of a snapshot. Default false. */
  readonly lazyUmount?: boolean
  /** Time limit for freezing (criu: dumping) the guest's processes, in milliseconds, as of a snapshot. Default 90,000. */
  readonly timeoutMs?: number
  /** The part of the host's memory that must be free, from 0 (no limit) to 1, else FORK_MEMORY_BACKPRESSURE. Default 0.01. */
  readonly freeMemoryThreshold?: number
}

const optionNames: OptionNames<ForkOptions> = {
  count: true,
  outDir: true,
  engine: true,
  tcpKeep: true,
  lazyUmount: true,
  timeoutMs: true,
  freeMemoryThreshold: true,
  name: true,
  liveMounts: true,
  env: true,
  secrets: true,
  detached: true,
  portForward: true,
  lazy: true
}

/** The siblings of a fork. */
export interface Forked {
  readonly siblings: ReadonlyArray<Restored>
  /** Milliseconds for which the source's processes stood still. */
  readonly pausedMs: number
}

const maxSiblings = 256
/** Siblings that are started at once. More would wait for each other: a start is work for a core or two. */
const startedAtOnce = 4

/**
 * Forks a running VM into siblings in the current scope, which ends them unless they are detached; the source keeps running. All siblings start
 * or none: they are launched attached, and detached (if asked for) when the last one is ready.
 */
export const fork = Effect.fn("fork")(function* (source: Source, options: ForkOptions = {}) {
  const forked = yield* Launch.inOwnScope(start(source, options), ExecutionStrategy.parallelN(startedAtOnce))
  if (options.detached === true) yield* detachAll(forked.siblings)
  return forked
})

const start = Effect.fnUntraced(function* (source: Source, options: ForkOptions) {
  yield* refuseUnknown("fork", options, optionNames)
  const { count = 1, engine, freeMemoryThreshold, lazyUmount = false, outDir, tcpKeep, timeoutMs, ...rest } = options
  if (!Number.isSafeInteger(count) || count < 1 || count > maxSiblings || (count > 1 && options.name !== undefined)) {
    return yield* new BootError({
      code: "BOOT_OPTION_INVALID",
      message:
        count > 1 && options.name !== undefined
          ? `${count} siblings cannot have one name`
          : `a VM cannot be forked into ${count} siblings at once`,
      hint: `give a whole number from 1 to ${maxSiblings}, and a name only to one`
    })
  }
  if (count > 1 && (options.portForward ?? []).length > 0) {
    return yield* new BootError({
      code: "BOOT_PORT_FORWARD_CONFLICT",
      message: `a port of this host cannot lead to ${count} siblings`,
      hint: "fork them one by one, each with ports of its own, or reach them by tunnels"
    })
  }
  const tcpClose = !(tcpKeep ?? false)
  yield* checkSource(source)
  yield* checkMemory(freeMemoryThreshold ?? defaultFreeMemoryThreshold)
  const siblings = Array.from({ length: count })

  if (outDir !== undefined) {
    const taken = yield* snapshot(source, {
      outDir,
      leaveRunning: true,
      tcpClose,
      lazyUmount,
      ...given({ engine, timeoutMs })
    })
    const restored = yield* Effect.forEach(siblings, () => restoreAttached({ ...rest, snapDir: outDir }), {
      concurrency: startedAtOnce
    })
    const kept: Forked = { siblings: restored, pausedMs: taken.pausedMs ?? 0 }
    return kept
  }

  // When this scope ends, the siblings hold the files open, so the directory can be removed.
  return yield* Effect.scopedWith((files) =>
    Effect.gen(function* () {
      const registry = yield* Registry
      const chosen = yield* chooseEngine(engine)
      const dir = yield* Effect.provideService(registry.scratch, Scope.Scope, files)
      const capture = yield* chosen
        .take(source, {
          dir,
          remove: [],
          sync: false,
          tcpClose,
          lazyUmount,
          timeoutMs: timeoutMs ?? defaultTimeoutMs
        })
        .pipe(Effect.provideService(Scope.Scope, files))
      const pausedMs = yield* holdTimed(capture)
      yield* capture.commit
      const { entry } = source
      const seed = {
        engine: chosen,
        dir,
        disks: (entry.disks ?? []).map((disk) =>
          disk.readOnly ? disk : { ...disk, path: path.join(dir, `${disk.id}.img`) }
        ),
        mount: entry.mount,
        liveMounts: entry.liveMounts ?? [],
        image: entry.image,
        command: entry.command,
        kernel: entry.kernel ?? "",
        memoryMib: entry.memoryMib,
        vcpus: entry.vcpus,
        network: entry.network,
        sourceName: entry.name,
        forkedFrom: entry.id
      }
      const forked: Forked = {
        siblings: yield* Effect.forEach(siblings, () => revive(seed, rest), { concurrency: startedAtOnce }),
        pausedMs
      }
      return forked
    })
  )
})

/** Fails with FORK_MEMORY_BACKPRESSURE when the host has too little free memory. */
const checkMemory = Effect.fnUntraced(function* (threshold: number) {
  const [freeBytes, totalBytes] = [yield* memory.availableBytes, yield* memory.totalBytes]
  const refused = refusal({ freeBytes, totalBytes, threshold })
  if (refused !== undefined) return yield* refused
})
