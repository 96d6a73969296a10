/**
 * The Promise API: the same VMs for programs that do not use Effect. What rejects is one of our errors (`isMachinenError`), with a stable
 * `code`, and a `hint` where there is something to be done; what an AbortSignal ended rejects with its reason. Options of the reference
 * that this version cannot honour are refused (`BOOT_OPTION_INVALID`), never ignored.
 */
import { statSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import type { Readable, Writable } from "node:stream"
import { Cause, Duration, Effect, Exit, Fiber, Layer, Option, RcRef, Schedule, Scope, Stream } from "effect"
import { notReadyDetached } from "./boot/boot.ts"
import {
  BootError,
  FilesError,
  isMachinenError as isOurs,
  type MachinenError,
  RegistryError,
  type SecretsError
} from "./errors.ts"
import { Agent, type AgentClient, type ExecOptions } from "./guest/Agent.ts"
import * as baseAssets from "./host/baseAssets.ts"
import { baseNames } from "./image/RootfsImage.ts"
import * as InitramfsPackers from "./initramfs/InitramfsPackers.ts"
import { Machinen } from "./Machinen.ts"
import { autoMemoryMib } from "./machine/BootOptions.ts"
import type { Disk } from "./machine/MachineSpec.ts"
import { defaultMountUpperBytes, type LiveMountOption } from "./machine/mountOptions.ts"
import type { NetworkMode, PortForwardOption } from "./machine/Network.ts"
import type { Leftover } from "./machine/Registry.ts"
import type { VmEntry } from "./machine/VmEntry.ts"
import { type Lower, type LowerOptions, Mountdisk } from "./mount/Mountdisk.ts"
import * as memory from "./platform/memory.ts"
import * as processes from "./platform/processes.ts"
import * as execPty from "./promise/execPty.ts"
import * as VmControl from "./promise/VmControl.ts"
import * as debug from "./runtime/debug.ts"
import * as layers from "./runtime/layers.ts"
import type { Settings } from "./Settings.ts"
import type { EngineName } from "./snapshot/BundleManifest.ts"
import { defaultFreeMemoryThreshold, refusal } from "./snapshot/forkBackpressure.ts"
import type { Vm } from "./vm/Vm.ts"

export * from "./errors.ts"
export { format as formatMachinenError } from "./errors.ts"
export { bootPty, type PtyBootOptions, type PtyVmHandle } from "./promise/bootPty.ts"
export type { VsockExecPtyOptions } from "./promise/execPty.ts"
export { type OnOutputListener, type SandboxEntry, Sandboxes, type SandboxVm } from "./promise/Sandboxes.ts"
export { Supervisor, type SupervisorOptions } from "./promise/Supervisor.ts"
export { buildWriteFileCmd, buildWriteFileCmds } from "./promise/writeFileCommands.ts"

/** Bytes of a guest's, as they came: not split, not decoded. */
export interface ChunkLogEvent {
  readonly source: "guest-console" | "exec-stdout" | "exec-stderr"
  /** The command, of the exec sources. */
  readonly cmd?: string
  readonly chunk: Buffer
}

/** Where the time of an operation went, in milliseconds by phase, in the order in which the phases began. */
export interface PhaseLogEvent {
  readonly source: "phase"
  readonly kind: "boot" | "provision" | "snapshot" | "restore"
  readonly phases: ReadonlyMap<string, number>
  readonly totalMs: number
}

export type LogEvent = ChunkLogEvent | PhaseLogEvent
/** What it throws is not seen by anybody but DEBUG=machinen:promise. */
export type OnLog = (event: LogEvent) => void

interface Interruptible {
  /** Ends the operation; whatever it has acquired is released before the promise rejects with the signal's reason. */
  readonly signal?: AbortSignal
}

/** A host directory shared with the guest. */
export type LiveMount = LiveMountOption

interface StartOptions extends Interruptible {
  /** Unique among running VMs. */
  readonly name?: string
  /** Environment of the main command and of every command run later. */
  readonly env?: Readonly<Record<string, string>>
  /** TCP ports of this host that lead to the guest's, until the VM is gone; a copy has none of its source's. */
  readonly portForward?: ReadonlyArray<PortForwardOption>
  /** Commands of this handle, phases, and the console unless it is detached. */
  readonly onLog?: OnLog
  /** The VM outlives this process; the handle is that of `attach`. */
  readonly detached?: boolean
}

export interface BootOptions extends StartOptions {
  /**
   * `micro`, `debian`, a rootfs tarball, an ext4 image used as a read-only base, a container image (`docker://NAME`), or a name of `machinen image ls`. What it
   * says about its commands holds where these options say nothing.
   */
  readonly image?: string
  /** The main command, instead of the image's own; the VM ends with it. One or the other is needed where there is an image. Needs `image` or `rootDisk`. With neither, a VM of the default image idles until it is ended. */
  readonly cmd?: ReadonlyArray<string>
  /** Working directory of commands in the guest; absolute. Default `/`. */
  readonly guestCwd?: string
  /** An ext4 image that is the whole root and is written. `true`, the default: `image` stays as it is under a layer of the VM's own. */
  readonly rootDisk?: true | string
  /** Size of that layer in bytes, a multiple of 4096. Default 2 GiB; it takes the space that is written. */
  readonly rootDiskSizeBytes?: number
  /** Ceiling of guest memory in MiB; the host gives it as the guest touches it. Default 512: `autoSizeMemoryMib()` takes longer to boot. */
  readonly memory?: number
  /** Default 1. */
  readonly vcpus?: number
  /** `nat` (the default): the guest reaches what this host reaches. `none`: it has no network card. */
  readonly network?: NetworkMode
  /** A host directory copied into the guest below /mnt; it is never changed itself. */
  readonly mount?: { readonly host: string; readonly guest: string }
  /** Size of what the guest may write there, in bytes, a multiple of 4096. Default 4 GiB; it takes the space that is written. */
  readonly mountDiskUpperSizeBytes?: number
  /** Host directories shared with the guest below /mnt, at most 5; what either side changes the other sees. */
  readonly liveMounts?: ReadonlyArray<LiveMount>
  /** For `wait()`, and for a detached VM to become ready, in milliseconds; null: no limit. Default 60 000. */
  readonly timeoutMs?: number | null
  /** A VM always dies with its owner, unless it is detached. */
  readonly pdeathsig?: true
}

export interface RestoreOptions extends StartOptions {
  /** The directory `snapshot` made. */
  readonly snapDir: string
  /** Where the source's image lies now, if it was moved. */
  readonly image?: string
  /** Of the source's live mounts, by `guest`: from another directory, or in another mode. All of them, of a bundle that is not your own. */
  readonly liveMounts?: ReadonlyArray<LiveMount>
  /** Default: as the source had it. The network of a bundle that is not your own is only connected when this says `nat`. */
  readonly network?: NetworkMode
  /** Ceiling of guest memory in MiB, of a snapshot by engine criu. Default: what the source had. */
  readonly memory?: number
  /** Memory is read when it is touched, of a snapshot by engine criu; that of the other always is. Default false. */
  readonly lazy?: boolean
  /** For `wait()`, in milliseconds; null: no limit. Default 60 000. */
  readonly timeoutMs?: number | null
}

export interface ForkOptions extends StartOptions {
  /** Keep the bundle there; otherwise nothing of it stays. */
  readonly outDir?: string
  /** For the sibling's `wait()`, in milliseconds. Default null: no limit. */
  readonly timeoutMs?: number | null
  /** The part of the host's memory that must be free, 0 to 1; 0: no matter. Default `DEFAULT_FREE_MEMORY_THRESHOLD`. */
  readonly freeMemoryThreshold?: number
  /** Default: MACHINEN_SNAPSHOT_ENGINE, else `vmstate`. */
  readonly engine?: SnapshotEngine
  /** Established TCP connections of the source are in the sibling; with engine vmstate they are in any case. Default false. */
  readonly tcpKeep?: boolean
  /** As of `restore`. */
  readonly lazy?: boolean
  readonly liveMounts?: ReadonlyArray<LiveMount>
  /** As of `snapshot`. */
  readonly lazyUmount?: boolean
}

export interface ProvisionOptions extends Interruptible {
  /** As `image` of `boot`. Default `debian`. */
  readonly base?: string
  /** Turns the base into what is wanted. The handle's commands run as root; it is over when this completes. */
  readonly install: (vm: VmHandle) => Promise<void>
  /** The tarball to write; replaced when the build is done, untouched when it fails. */
  readonly out: string
  /** The image's command and environment: what a boot of it does that is not told otherwise. */
  readonly cmd?: ReadonlyArray<string>
  readonly env?: Readonly<Record<string, string>>
  /** What the root filesystem may come to, in bytes. There is no such disk: it is a limit, and takes no space. Default 16 GiB. */
  readonly scratchDiskSizeBytes?: number
  /** For the whole build. Default 600 000. */
  readonly timeoutMs?: number
  readonly onLog?: OnLog
}

export interface ProvisionResult {
  readonly imagePath: string
  readonly sizeBytes: number
  readonly elapsedMs: number
}

export interface AttachOptions {
  /** The VMM's; this or `name`. */
  readonly pid?: number
  readonly name?: string
  /** Commands of this handle. */
  readonly onLog?: OnLog
}

export interface VsockExecOptions extends Interruptible {
  /** How long the guest may take to accept the command. Default 30 000. */
  readonly connectTimeoutMs?: number
  /** The pause before an unreachable guest is tried again. Default 250. */
  readonly retryMs?: number
  /** The command is killed after this long; null or Infinity: never. Default 300 000. */
  readonly execTimeoutMs?: number | null
  /** Gets the output as it comes; the result's field is "" then. What it throws ends the command and rejects. */
  readonly onStdout?: (chunk: Buffer) => void
  readonly onStderr?: (chunk: Buffer) => void
}

export interface VsockExecResult {
  /** 128 + signal for a command that a signal ended. */
  readonly exitCode: number
  /** UTF-8, decoded as a whole. */
  readonly stdout: string
  readonly stderr: string
}

export interface VsockExecPtyResult {
  /** 128 + signal for a command that a signal ended. */
  readonly exitCode: number
}

export interface VsockExecPtyHandle {
  /** Rejects with EXEC_AGENT_UNAVAILABLE when the guest does not take the command, with EXEC_CANCELLED after `cancel()`. */
  readonly result: Promise<VsockExecPtyResult>
  /** The command is told by SIGWINCH. Throws EXEC_TERMINAL_SIZE_INVALID. */
  readonly resize: (cols: number, rows: number) => void
  /** Hangs the terminal up, and with it what runs in it. */
  readonly cancel: () => void
}

export interface WriteFileOptions {
  /** Permission bits; a new file's default is 0644. */
  readonly mode?: number
  /** Make missing parent directories. Default true. */
  readonly recursive?: boolean
  readonly append?: boolean
}

export interface SnapshotOptions extends Interruptible {
  /** Absent, or an empty directory. */
  readonly outDir: string
  /** Default false: the VM ends with its snapshot. */
  readonly leaveRunning?: boolean
  /** Default: MACHINEN_SNAPSHOT_ENGINE, else `vmstate`. */
  readonly engine?: SnapshotEngine
  /** Established TCP connections are closed in what is restored; engine vmstate keeps them in any case. Default false. */
  readonly tcpClose?: boolean
  /** Processes may hold files on live mounts, which give EIO in what is restored; else SNAPSHOT_MOUNT_BUSY. Default false. */
  readonly lazyUmount?: boolean
  /** For the guest's processes to stand still, in milliseconds. Default 90 000. */
  readonly timeoutMs?: number
  /** Beside the handle's own. */
  readonly onLog?: OnLog
}

export type { VmExit } from "./promise/VmControl.ts"
export type SnapshotEngine = EngineName

export interface SnapshotResult {
  readonly engine: SnapshotEngine
  /** Absolute. */
  readonly snapDir: string
  /** The machine's state, of engine `vmstate`. */
  readonly vmstatePath?: string
  readonly elapsedMs: number
  /** The end of what the guest had printed on its console. */
  readonly consoleLog: string
}

export interface MemoryStats {
  readonly ceilingMib: number | null
  /** The VMM's resident memory; null when it is gone. */
  readonly hostRssBytes: number | null
  /** Always 0: VMs have no balloon yet. */
  readonly balloonInflatedBytes: number
  /** Pages (of 4 KiB) of processes restored with `lazy` that are still to be read. */
  readonly lazyPagesPending: number
}

/**
 * A running VM. One from `boot`, `restore` or `fork` belongs to this process, which stays up for it, and ends with it however it ends;
 * a detached one, and one from `attach`, belongs to nobody.
 */
export interface VmHandle {
  readonly id: string
  /** The VMM's. */
  readonly pid: number
  readonly name?: string
  /** The main command's input; end it to let the command see the end. Ignored without one, as after `attach` and `restore`. */
  readonly stdin: Writable
  /**
   * The main command's output. Before it is read its last 1 MiB is kept; from then on the command waits for its reader. Ended without a
   * command, as after `attach`, `restore` and `detach`.
   */
  readonly stdout: Readable
  readonly stderr: Readable
  /** Completes when the VM is gone and nothing of it is left on the host. Fails BOOT_TIMEOUT after `timeoutMs`; the VM goes on. */
  readonly wait: () => Promise<VmControl.VmExit>
  /** Ends it at once; completes as `wait`. A VM that is gone already is fine. */
  readonly kill: () => Promise<void>
  /** Powers it off in order, or by force after the grace (default 5 s); completes as `wait`. */
  readonly stop: (graceMs?: number) => Promise<void>
  /**
   * The VM now outlives this process; the handle goes on as one of `attach`. `wait` calls under way complete with nulls; `stdin`, `stdout`
   * and `stderr` end, the main command goes on without them.
   */
  readonly detach: () => Promise<void>
  /** The last 1 MiB of what the main command has written to stdout, or stderr, so far. */
  readonly output: () => Promise<string>
  readonly errorOutput: () => Promise<string>
  /** Runs a line in the guest's `sh -c`. An exit code other than 0 rejects with EXEC_NONZERO_EXIT and the end of its stderr. */
  readonly exec: (cmd: string, options?: VsockExecOptions) => Promise<VsockExecResult>
  /** The same, for any exit code. */
  readonly execRaw: (cmd: string, options?: VsockExecOptions) => Promise<VsockExecResult>
  /** Runs a line in the guest's `sh -c`, in a terminal that the two streams become. */
  readonly execPty: (cmd: string, options: execPty.VsockExecPtyOptions) => VsockExecPtyHandle
  readonly writeFile: (guestPath: string, contents: Buffer | string, options?: WriteFileOptions) => Promise<void>
  readonly snapshot: (options: SnapshotOptions) => Promise<SnapshotResult>
  /** A sibling that goes on from here beside this VM; it belongs to this process. */
  readonly fork: (options?: ForkOptions) => Promise<VmHandle>
  readonly memoryStats: () => Promise<MemoryStats>
  /** Holds its CPUs. */
  readonly pause: () => Promise<void>
  readonly resume: () => Promise<void>
}

/** A running VM as `list` shows it. */
export interface RegistryEntry {
  readonly id: string
  readonly pid: number
  readonly name?: string
  /** The guest channel's unix socket (docs/protocol.md §2). */
  readonly socketPath: string
  readonly imagePath: string
  /** The copy of a host directory: where it is, and the files it consists of. */
  readonly mountDisk?: { readonly guest: string; readonly lowerPath: string; readonly upperPath: string }
  readonly liveMounts?: ReadonlyArray<Required<LiveMount>>
  /** The bundle or VM it goes on from. */
  readonly forkedFrom?: string
  readonly memoryCeilingMib: number
  readonly detached: boolean
  /** Unix milliseconds. */
  readonly startedAt: number
}

export interface RunGcOptions {
  /** Only tell. */
  readonly dryRun?: boolean
}

export type GcResult = Leftover

export interface Client {
  readonly boot: (options?: BootOptions) => Promise<VmHandle>
  /** Builds an image in a VM of its base. */
  readonly provision: (options: ProvisionOptions) => Promise<ProvisionResult>
  /** A handle on a running VM; it fails REGISTRY_VM_NOT_FOUND when there is none. */
  readonly attach: (options: AttachOptions) => Promise<VmHandle>
  /** Running VMs, oldest first. */
  readonly list: () => Promise<ReadonlyArray<RegistryEntry>>
  /** Removes what dead VMs left behind; every first use does that by itself. */
  readonly runGc: (options?: RunGcOptions) => Promise<ReadonlyArray<GcResult>>
  /** A VM that goes on where a snapshot's source stood. */
  readonly restore: (options: RestoreOptions) => Promise<VmHandle>
}

const defaultWaitMs = 60_000

/** Where events go. */
type Log = (event: LogEvent) => Effect.Effect<void>

/** The API over some services. They are built on first use, shared, and released when no call and no VM of this process needs them. */
export const make = <E>(services: Layer.Layer<Machinen, E>): Client => {
  const shared = Effect.runSync(
    Effect.flatMap(Scope.make(), (forever) =>
      RcRef.make({
        acquire: Layer.toRuntime(Layer.provideMerge(services, debug.layer)).pipe(Effect.mapError(unusable))
      }).pipe(Scope.extend(forever))
    )
  )

  /** Runs an effect on the services, which stay for as long as the scope. */
  const within =
    (scope: Scope.Scope) =>
    <A, F, R>(effect: Effect.Effect<A, F, R>) =>
      Effect.flatMap(Scope.extend(RcRef.get(shared), scope), (runtime) => Effect.provide(effect, runtime))

  const run = async <A, F>(effect: Effect.Effect<A, F, Machinen>, signal?: AbortSignal): Promise<A> => {
    const program = Effect.scopedWith((scope) => within(scope)(effect))
    const exit = await Effect.runPromiseExit(program, signal === undefined ? {} : { signal })
    if (Exit.isSuccess(exit)) return exit.value
    if (Cause.isInterruptedOnly(exit.cause) && signal?.aborted === true) throw signal.reason
    throw Cause.originalError(Cause.squash(exit.cause))
  }

  const begin = async <F>(
    begun: Effect.Effect<VmControl.Started, F, Machinen | Scope.Scope>,
    options: StartOptions,
    waitMs: number | null
  ): Promise<VmHandle> => {
    const { detached, onLog, signal } = options
    const log = logger(onLog)
    // the signal ends the start alone: a VM that is up when it comes is not lost
    const start = signal === undefined ? begun : Effect.raceFirst(begun, aborted(signal))
    const onConsole = (bytes: Uint8Array) => log({ source: "guest-console", chunk: toBuffer(bytes) })
    const control: Effect.Effect<VmControl.VmControl, F | MachinenError, Machinen> =
      detached === true
        ? VmControl.release(start)
        : VmControl.own(start, within, onLog === undefined ? undefined : onConsole)
    return toHandle(await run(control), log, waitMs)
  }

  const toHandle = (control: VmControl.VmControl, log: Log, waitMs: number | null): VmHandle => {
    const { detach, stderr, stdin, stdout, tail, vm, wait } = control
    const { id, name, pid } = vm()
    const execute =
      (method: "exec" | "execRaw") =>
      (cmd: string, options: VsockExecOptions = {}) =>
        run(
          Effect.gen(function* () {
            yield* refuseOthers("exec", options, execOptions)
            const result = yield* vm()[method](cmd, toExecOptions(cmd, options, log))
            return { exitCode: result.exitCode, stdout: text(result.stdout), stderr: text(result.stderr) }
          }),
          options.signal
        )
    return {
      ...given({ id, pid, name }),
      stdin,
      stdout,
      stderr,
      wait: () => run(waitMs === null ? wait : Effect.timeoutFail(wait, stillRunning(vm(), waitMs))),
      kill: () => run(Effect.suspend(() => vm().kill).pipe(Effect.zipRight(wait), Effect.asVoid)),
      stop: (graceMs) => run(Effect.suspend(() => vm().stop(graceMs)).pipe(Effect.zipRight(wait), Effect.asVoid)),
      detach: () => run(detach),
      output: async () => tail("stdout"),
      errorOutput: async () => tail("stderr"),
      exec: execute("exec"),
      execRaw: execute("execRaw"),
      execPty: (cmd, options) => {
        const { cancel, release, resize, result } = execPty.begin(vm, cmd, options)
        return { cancel, resize, result: run(result).finally(release) }
      },
      writeFile: (guestPath, contents, options) => run(vm().writeFile(guestPath, contents, options)),
      snapshot: (options) =>
        run(
          Effect.gen(function* () {
            yield* refuseOthers("snapshot", options, snapshotOptions)
            const { onLog, signal: _, ...rest } = options
            const machinen = yield* Machinen
            const consoleLog = yield* Stream.mkString(
              Stream.decodeText(vm().logs("console", { tailBytes: VmControl.tailBytes }))
            )
            const { bundle, elapsedMs, phases } = yield* machinen.snapshot(vm(), rest)
            yield* both(log, logger(onLog))(phaseEvent("snapshot", phases, elapsedMs))
            // it has ended with its snapshot: nothing is left of it when the promise resolves
            if (options.leaveRunning !== true) yield* wait
            const { engine } = bundle.manifest
            return {
              engine,
              snapDir: bundle.dir,
              ...(engine === "vmstate" ? { vmstatePath: path.join(bundle.dir, "state") } : {}),
              elapsedMs,
              consoleLog
            }
          }),
          options.signal
        ),
      fork: (options = {}) =>
        begin(
          Effect.gen(function* () {
            yield* refuseOthers("fork", options, forkOptions)
            const { detached: _, onLog, signal: __, timeoutMs: ___, ...rest } = options
            const machinen = yield* Machinen
            const [elapsed, { pausedMs, siblings }] = yield* Effect.timed(machinen.fork(vm(), rest))
            const [sibling] = siblings
            if (sibling === undefined) return yield* Effect.dieMessage("a fork has a sibling")
            const restoreMs = [...sibling.phases.values()].reduce((sum, ms) => sum + ms, 0)
            const snapshotMs = Duration.toMillis(elapsed) - restoreMs
            yield* both(log, logger(onLog))(phaseEvent("snapshot", new Map([["hold", pausedMs]]), snapshotMs))
            yield* logger(onLog)(phaseEvent("restore", sibling.phases, restoreMs))
            return { vm: sibling.vm, main: false }
          }),
          options,
          options.timeoutMs ?? null
        ),
      memoryStats: () => run(Effect.map(vm().memoryStats, (stats) => ({ ...stats, balloonInflatedBytes: 0 }))),
      pause: () => run(vm().pause),
      resume: () => run(vm().resume)
    }
  }

  return {
    boot: (options = {}) =>
      begin(
        Effect.gen(function* () {
          yield* refuseOthers("boot", options, bootOptions)
          yield* checkCommand(options)
          const { liveMounts, mount, mountDiskUpperSizeBytes } = options
          const { cmd, detached, env, guestCwd, image, name, network, portForward, rootDisk } = options
          const { rootDiskSizeBytes, timeoutMs, vcpus } = options
          const machinen = yield* Machinen
          const boot = machinen.boot(
            given({
              image,
              rootDisk: rootDisk === true ? undefined : rootDisk,
              command: cmd,
              env,
              cwd: guestCwd,
              name,
              memoryMib: options.memory,
              vcpus,
              rootDiskSizeBytes,
              network,
              portForward,
              mount,
              mountDiskUpperSizeBytes,
              liveMounts
            })
          )
          const named = detached === true ? Effect.mapError(boot, asDetached) : boot
          const limited =
            detached === true && timeoutMs != null ? Effect.timeoutFail(named, notReady(timeoutMs)) : named
          const [elapsed, { command, phases, vm }] = yield* Effect.timed(limited)
          yield* logger(options.onLog)(phaseEvent("boot", phases, Duration.toMillis(elapsed)))
          if (command === undefined && image !== undefined) return yield* nothingToRun(image)
          return { vm, main: command !== undefined }
        }),
        options,
        options.timeoutMs === undefined ? defaultWaitMs : options.timeoutMs
      ),
    provision: (options) =>
      run(
        Effect.gen(function* () {
          yield* refuseOthers("provision", options, provisionOptions)
          const { base, cmd, env, onLog, out, scratchDiskSizeBytes, timeoutMs } = options
          const [first, ...rest] = cmd ?? []
          const log = logger(onLog)
          const machinen = yield* Machinen
          const { elapsedMs, imagePath, phases, sizeBytes } = yield* machinen.provision({
            ...given({ base, timeoutMs, maxImageBytes: scratchDiskSizeBytes }),
            out,
            config: given({ cmd: first === undefined ? undefined : ([first, ...rest] as const), env }),
            install: (vm) =>
              Effect.tryPromise({
                try: () => options.install(toHandle(VmControl.unowned(vm), log, null)),
                catch: (cause) => cause
              })
          })
          yield* log(phaseEvent("provision", phases, elapsedMs))
          return { imagePath, sizeBytes, elapsedMs }
        }),
        options.signal
      ),
    attach: async ({ name, onLog, pid, ...others }) => {
      const vm = await run(
        Effect.gen(function* () {
          yield* refuseOthers("attach", others, {})
          if ((name === undefined) === (pid === undefined)) return yield* neitherOrBoth()
          return yield* (yield* Machinen).attach(name ?? String(pid))
        })
      )
      return toHandle(VmControl.unowned(vm), logger(onLog), null)
    },
    list: () => run(Effect.flatMap(Machinen, ({ list }) => Effect.map(list, (entries) => entries.flatMap(toRow)))),
    runGc: (options = {}) =>
      run(
        Effect.gen(function* () {
          yield* refuseOthers("runGc", options, gcOptions)
          return yield* (yield* Machinen).gc(options)
        })
      ),
    restore: (options) =>
      begin(
        Effect.gen(function* () {
          yield* refuseOthers("restore", options, restoreOptions)
          const { detached: _, memory, onLog, signal: __, timeoutMs: ___, ...rest } = options
          const machinen = yield* Machinen
          const [elapsed, { phases, vm }] = yield* Effect.timed(
            machinen.restore({ ...rest, ...given({ memoryMib: memory }) })
          )
          yield* logger(onLog)(phaseEvent("restore", phases, Duration.toMillis(elapsed)))
          return { vm, main: false }
        }),
        options,
        options.timeoutMs === undefined ? defaultWaitMs : options.timeoutMs
      )
  }
}

const logger = (onLog: OnLog | undefined): Log =>
  onLog === undefined
    ? () => Effect.void
    : (event) =>
        Effect.try(() => onLog(event)).pipe(
          Effect.catchAll((error) => Effect.logDebug("onLog threw", error)),
          Effect.annotateLogs({ service: "promise" })
        )

/** Dies with the signal's reason when that comes. */
const aborted = (signal: AbortSignal): Effect.Effect<never> =>
  Effect.async((resume) => {
    const end = () => resume(Effect.die(signal.reason))
    if (signal.aborted) return end()
    signal.addEventListener("abort", end, { once: true })
    return Effect.sync(() => signal.removeEventListener("abort", end))
  })

const both =
  (one: Log, other: Log): Log =>
  (event) =>
    Effect.zipRight(one(event), other(event))

const phaseEvent = (
  kind: PhaseLogEvent["kind"],
  phases: ReadonlyMap<string, number>,
  totalMs: number
): PhaseLogEvent => ({ source: "phase", kind, phases, totalMs })

const toExecOptions = (cmd: string, options: VsockExecOptions, log: Log): ExecOptions => {
  const { connectTimeoutMs = 30_000, execTimeoutMs = 300_000, onStderr, onStdout, retryMs = 250 } = options
  const callbacks = { stdout: onStdout, stderr: onStderr }
  return {
    ...(execTimeoutMs === null || execTimeoutMs === Number.POSITIVE_INFINITY ? {} : { timeout: execTimeoutMs }),
    connect: { timeout: connectTimeoutMs, pause: retryMs },
    keep: (["stdout", "stderr"] as const).filter((channel) => callbacks[channel] === undefined),
    onOutput: ({ bytes, channel }) => {
      const chunk = toBuffer(bytes)
      return Effect.zipRight(
        log({ source: `exec-${channel}`, cmd, chunk }),
        Effect.sync(() => callbacks[channel]?.(chunk))
      )
    }
  }
}

/** The same bytes. */
const toBuffer = (bytes: Uint8Array): Buffer => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
const text = (bytes: Uint8Array): string => toBuffer(bytes).toString()

const toRow = (entry: VmEntry): ReadonlyArray<RegistryEntry> => {
  const { createdAt, detached, forkedFrom, id, image, liveMounts, memoryMib, name, vmm, vsockPath } = entry
  // one that is still being started cannot be attached to
  if (vmm === undefined) return []
  return [
    given({
      id,
      pid: vmm.pid,
      name,
      socketPath: vsockPath,
      imagePath: image,
      mountDisk: mountDiskOf(entry),
      liveMounts,
      forkedFrom,
      memoryCeilingMib: memoryMib,
      detached,
      startedAt: createdAt
    })
  ]
}

const mountDiskOf = ({ disks = [], mount }: VmEntry) => {
  const pathOf = (id: Disk["id"]) => disks.find((disk) => disk.id === id)?.path ?? ""
  return mount && { guest: mount.guest, lowerPath: pathOf("mountlower"), upperPath: pathOf("mountupper") }
}

/** The properties that have a value. */
const given = <A extends object>(options: A): Given<A> =>
  Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as Given<A>
type Given<A> = { readonly [K in keyof A as undefined extends A[K] ? never : K]: A[K] } & {
  readonly [K in keyof A as undefined extends A[K] ? K : never]?: Exclude<A[K], undefined>
}

/** Which values of an option can be honoured. */
type Supported = Readonly<Record<string, (value: unknown) => boolean>>
const any = () => true
const only = (wanted: unknown) => (value: unknown) => value === wanted

const startOptions: Supported = {
  name: any,
  env: any,
  portForward: any,
  onLog: any,
  detached: any,
  signal: any,
  timeoutMs: any
}
const bootOptions: Supported = {
  ...startOptions,
  image: any,
  cmd: any,
  guestCwd: any,
  rootDisk: (value) => value === true || typeof value === "string",
  rootDiskSizeBytes: any,
  memory: any,
  vcpus: any,
  network: any,
  pdeathsig: only(true),
  mount: any,
  mountDiskUpperSizeBytes: any,
  liveMounts: any
}
const restoreOptions: Supported = {
  ...startOptions,
  snapDir: any,
  image: any,
  lazy: any,
  liveMounts: any,
  memory: any,
  network: any
}
const forkOptions: Supported = {
  ...startOptions,
  outDir: any,
  freeMemoryThreshold: any,
  engine: any,
  tcpKeep: any,
  lazy: any,
  liveMounts: any,
  lazyUmount: any
}
const snapshotOptions: Supported = {
  outDir: any,
  engine: any,
  leaveRunning: any,
  tcpClose: any,
  lazyUmount: any,
  timeoutMs: any,
  onLog: any,
  signal: any
}
const execOptions: Supported = {
  connectTimeoutMs: any,
  retryMs: any,
  execTimeoutMs: any,
  onStdout: any,
  onStderr: any,
  signal: any
}
const provisionOptions: Supported = {
  base: any,
  install: any,
  out: any,
  cmd: any,
  env: any,
  scratchDiskSizeBytes: any,
  timeoutMs: any,
  onLog: any,
  signal: any
}
const gcOptions: Supported = { dryRun: any }

/** Nothing asked for: left out, or an empty list of things. */
const isNothing = (value: unknown) =>
  value === undefined || (typeof value === "object" && value !== null && Object.keys(value).length === 0)

const refuseOthers = (what: string, options: object, supported: Supported): Effect.Effect<void, BootError> => {
  const refused = Object.entries(options).find(
    ([name, value]) => !isNothing(value) && (!Object.hasOwn(supported, name) || supported[name]?.(value) !== true)
  )
  if (refused === undefined) return Effect.void
  const [name, value] = refused
  const isKnown = Object.hasOwn(supported, name)
  return new BootError({
    code: "BOOT_OPTION_INVALID",
    message: `${what}() ${isKnown ? `cannot be given ${name}: ${String(value)}` : `has no option "${name}" in this version`}`,
    hint: `it takes: ${Object.keys(supported).join(", ")}`
  })
}

const nothingToRun = (image: string) =>
  new BootError({
    code: "BOOT_CMD_MISSING",
    message: `there is nothing to run in ${image}`,
    hint: 'give a command: cmd: ["sleep", "infinity"] for a VM that waits for exec()'
  })

const checkCommand = ({ cmd, image, rootDisk }: BootOptions): Effect.Effect<void, BootError> => {
  const isGiven = image !== undefined || typeof rootDisk === "string"
  if (isGiven === (cmd !== undefined)) return Effect.void
  // an image may have a command of its own, which is known when it is looked into; the bases have none
  if (image !== undefined && !(baseNames as ReadonlyArray<string>).includes(image)) return Effect.void
  return isGiven
    ? nothingToRun(image ?? String(rootDisk))
    : new BootError({
        code: "BOOT_CMD_WITHOUT_IMAGE",
        message: "there is a command, but no image to run it in",
        hint: 'give an image: "micro", "debian", a rootfs tarball or an ext4 image'
      })
}

const neitherOrBoth = () =>
  new RegistryError({
    code: "REGISTRY_VM_NOT_FOUND",
    message: "attach() finds a VM by its pid or by its name",
    hint: "give one of the two"
  })

const stillRunning = (vm: Vm, ms: number) => ({
  duration: ms,
  onTimeout: () =>
    new BootError({
      code: "BOOT_TIMEOUT",
      message: `VM "${vm.entry.label}" is still running after ${ms} ms`,
      hint: "it goes on: wait again, end it with kill(), or boot it with `timeoutMs: null`"
    })
})

/** How a launched guest can fail to become ready; what is refused before keeps its own code. */
const notReadyCodes: ReadonlySet<string> = new Set([
  "BOOT_READY_TIMEOUT",
  "BOOT_GUEST_FAILED",
  "BOOT_VMM_FAILED"
] satisfies ReadonlyArray<BootError["code"]>)

const asDetached = <E>(error: E) =>
  error instanceof BootError && notReadyCodes.has(error.code) ? notReadyDetached(error) : error

const notReady = (ms: number) => ({
  duration: ms,
  onTimeout: () =>
    new BootError({
      code: "BOOT_DETACHED_READINESS_FAILED",
      message: `the detached VM did not become ready within ${ms} ms`,
      hint: "raise timeoutMs on a slow or busy host; `machinen doctor` checks the host"
    })
})

/** The services cannot be built: a setting is at fault. */
const unusable = (cause: unknown) =>
  isOurs(cause) && cause instanceof BootError
    ? cause
    : new BootError({
        code: "BOOT_OPTION_INVALID",
        message: `a setting of the environment cannot be used: ${cause instanceof Error ? cause.message : String(cause)}`,
        hint: "README.md lists the MACHINEN_* variables and what they take",
        cause
      })

/**
 * Packers of initramfs archives (src/initramfs/InitramfsPackers.ts). Without `initPath`, `/init` is the guest program set-up builds.
 */
const pack =
  <O, A>(packer: (options: O) => Effect.Effect<A, MachinenError, InitramfsPackers.Services | Settings>) =>
  async (options: O): Promise<A> => {
    const exit = await Effect.runPromiseExit(Effect.provide(packer(options), layers.packing))
    if (Exit.isFailure(exit)) throw Cause.originalError(Cause.squash(exit.cause))
    return exit.value
  }
const resolveBase =
  (kind: baseAssets.BaseAsset) =>
  (explicit?: string, cwd?: string): Promise<string> =>
    pack((_: undefined) => baseAssets.resolve(kind, explicit, cwd))(undefined)
/** A path given, else the one of MACHINEN_ASSETS_DIR, else what set-up made. */
export const resolveBaseRootfs = resolveBase("rootfs")
export const resolveBaseKernel = resolveBase("kernel")
export const resolveBaseDtb = resolveBase("dtb")
export const mkinitramfsBundle = pack(InitramfsPackers.bundle)
export const mkinitramfsTinyBundle = pack(InitramfsPackers.tinyBundle)
export const mkinitramfsRootfs = pack(InitramfsPackers.rootfs)
export const mkinitramfsMinimal = pack(InitramfsPackers.minimal)
export const mkinitramfsWorkspace = pack(InitramfsPackers.workspace)
export const mkinitramfsCli = pack(InitramfsPackers.cli)
export type {
  BundleOptions as PackBundleOptions,
  MinimalOptions as PackMinimalOptions,
  RootfsOptions as PackRootfsOptions,
  TinyBundleOptions as PackTinyBundleOptions,
  WorkspaceOptions as PackWorkspaceOptions
} from "./initramfs/InitramfsPackers.ts"

/** On this host's real services. */
export const { attach, boot, list, provision, restore, runGc } = make(layers.layer)

export type EnsureMountDiskImageOptions = LowerOptions
export type EnsureMountDiskImageResult = Lower

export interface EnsureMountDiskUpperOptions {
  /** A multiple of 4096. Default 4 GiB, as a hole. */
  readonly sizeBytes?: number
}

export interface EnsureMountDiskUpperResult {
  readonly upperPath: string
  readonly sizeBytes: number
}

const withMountdisk = async <A, E>(use: (mountdisk: Mountdisk["Type"]) => Effect.Effect<A, E>): Promise<A> => {
  const exit = await Effect.runPromiseExit(
    Effect.provide(Effect.flatMap(Mountdisk, use), layers.layerWithoutReconcile).pipe(Effect.scoped)
  )
  if (Exit.isSuccess(exit)) return exit.value
  throw Cause.originalError(Cause.squash(exit.cause))
}

/** A host directory as a squashfs image, made unless there is one for what it holds. */
export const ensureMountDiskImage = (
  hostAbs: string,
  options?: EnsureMountDiskImageOptions
): Promise<EnsureMountDiskImageResult> => withMountdisk((mountdisk) => mountdisk.lower(hostAbs, options))

/** A new empty file system to write to above it, in the directory for temporary files; it is the caller's to remove. */
export const ensureMountDiskUpper = ({ sizeBytes = defaultMountUpperBytes }: EnsureMountDiskUpperOptions = {}) =>
  withMountdisk((mountdisk) =>
    Effect.map(mountdisk.upper(sizeBytes), (upperPath): EnsureMountDiskUpperResult => ({ upperPath, sizeBytes }))
  )

/** Says of an image that it is whole: one without a mark is made again. No guest can write one, so marks stay. */
export const markMountDiskImageClean = (imgPath: string): void => writeFileSync(`${imgPath}.ok`, "")

/** Where images of host directories are kept. */
export const mountdiskImgCacheDir = (): Promise<string> =>
  withMountdisk((mountdisk) => Effect.succeed(mountdisk.cacheDir))

/** This host's `mksquashfs`. */
export const resolveMksquashfs = (): Promise<string | undefined> =>
  withMountdisk((mountdisk) => Effect.map(mountdisk.tool, Option.getOrUndefined))

export interface VsockSecretsOptions {
  /** How long an agent that cannot be reached is tried. Default 10 000. */
  readonly timeoutMs?: number
  /** The pause between two tries. Default 250. */
  readonly retryMs?: number
}

export interface VsockFilesOptions {
  /** How long an agent that cannot be reached is tried. Default 5000. */
  readonly timeoutMs?: number
  /** The pause between two tries. Default 250. */
  readonly retryMs?: number
  /** fnmatch(3) patterns, for the path below the directory or for any name. */
  readonly excludes?: ReadonlyArray<string>
}

/** Runs an effect on the agent behind a VM's socket, and again as long as that may help. */
const onAgent = async <A, E extends FilesError | SecretsError>(
  udsPath: string,
  { retryMs = 250, timeoutMs }: { readonly retryMs?: number | undefined; readonly timeoutMs: number },
  use: (client: AgentClient) => Effect.Effect<A, E>
): Promise<A> => {
  const lastly = Effect.delay(Effect.succeed("late" as const), timeoutMs)
  const program = Effect.gen(function* () {
    const client = (yield* Agent).client(udsPath)
    const deadline = yield* Effect.fork(lastly)
    const isLate = Effect.map(Fiber.poll(deadline), Option.isSome)
    return yield* Effect.retry(use(client), {
      while: (error) => Effect.map(isLate, (late) => error.retryable && !late),
      schedule: Schedule.spaced(retryMs)
    })
  })
  const exit = await Effect.runPromiseExit(Effect.provide(program, layers.agent))
  if (Exit.isSuccess(exit)) return exit.value
  throw Cause.originalError(Cause.squash(exit.cause))
}

const isDirectory = (hostDir: string): Effect.Effect<void, FilesError> =>
  statSync(hostDir, { throwIfNoEntry: false })?.isDirectory() === true
    ? Effect.void
    : new FilesError({
        code: "FILES_HOST_DIR_NOT_FOUND",
        message: `${hostDir} is not a directory of this host`,
        hint: "name one that is there"
      })

const filesDefaults = ({ retryMs, timeoutMs = 5000 }: VsockFilesOptions) => ({ retryMs, timeoutMs })

/** Trees into and out of a guest, by the VM's socket (`vsock.sock` in its directory). */
export const VsockFiles = {
  /** A directory's contents into a guest directory, made if missing; existing files are replaced. */
  push: (udsPath: string, hostDir: string, guestPath: string, options: VsockFilesOptions = {}): Promise<void> =>
    onAgent(udsPath, filesDefaults(options), (client) =>
      Effect.suspend(() => isDirectory(hostDir)).pipe(
        Effect.zipRight(client.push(hostDir, guestPath, { excludes: options.excludes ?? [] }))
      )
    ),
  /** The other way round. */
  pull: (udsPath: string, guestPath: string, hostDir: string, options: VsockFilesOptions = {}): Promise<void> =>
    onAgent(udsPath, filesDefaults(options), (client) =>
      client.pull(guestPath, hostDir, { excludes: options.excludes ?? [] })
    )
}

export const VsockSecrets = {
  /** Gives a guest secrets, which commands get that name them. A value with a newline: SECRETS_VALUE_INVALID, and nothing is sent. */
  send: (
    udsPath: string,
    secrets: Readonly<Record<string, string>>,
    { retryMs, timeoutMs = 10_000 }: VsockSecretsOptions = {}
  ): Promise<void> => onAgent(udsPath, { retryMs, timeoutMs }, (client) => Effect.asVoid(client.secrets(secrets)))
}

/** Whether it is one of ours, of that code if one is given. */
export const isMachinenError = (error: unknown, code?: ErrorCode): error is MachinenError =>
  isOurs(error) && (code === undefined || error.code === code)
export type ErrorCode = MachinenError["code"]

export { autoSizeMemoryMib }

/** Half of the host's memory in MiB, from 512 to 16384. */
const autoSizeMemoryMib = (hostBytes: number = readHostTotalBytes()): number => autoMemoryMib(hostBytes)

/** What new processes can have without swapping, in bytes. */
export const readHostFreeBytes = (): Promise<number> => Effect.runPromise(memory.availableBytes)

export const readHostTotalBytes = (): number => Effect.runSync(memory.totalBytes)

/** Resident memory of a process in bytes; null when it is gone. `statsPath` is for hosts without /proc, of which we run on none. */
export const readHostRssBytes = (pid: number, _statsPath?: string): number | null =>
  Option.getOrNull(Effect.runSync(processes.residentBytes(pid)))

export interface RssTarget {
  readonly pid: number
  readonly statsPath?: string
}

/** Of many; who is gone is left out. */
export const readHostRssBytesMulti = (targets: ReadonlyArray<RssTarget | number>): Map<number, number> =>
  new Map(
    targets.flatMap((target) => {
      const pid = typeof target === "number" ? target : target.pid
      const rss = readHostRssBytes(pid)
      return rss === null ? [] : [[pid, rss] as const]
    })
  )

export const DEFAULT_FREE_MEMORY_THRESHOLD = defaultFreeMemoryThreshold

export interface CheckForkBackpressureOptions {
  /** The part of the memory that must be free, 0 to 1; 0 or less: no matter, and nothing is read. */
  readonly threshold: number
  readonly readFree?: () => Promise<number>
  readonly totalBytes?: number
}

/** Rejects with FORK_MEMORY_BACKPRESSURE when the host is too low on memory for a fork. */
export const checkForkBackpressure = async (options: CheckForkBackpressureOptions): Promise<void> => {
  const { readFree = readHostFreeBytes, threshold, totalBytes = readHostTotalBytes() } = options
  if (threshold <= 0) return
  const refused = refusal({ freeBytes: await readFree(), totalBytes, threshold })
  if (refused !== undefined) throw refused
}
