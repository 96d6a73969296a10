import * as path from "node:path"
import { Cause, Duration, Effect, Exit, Layer, RcRef, Scope, Stream } from "effect"
import { notReadyDetached } from "../boot/boot.ts"
import { BootError, isMachinenError as isOurs, type MachinenError, RegistryError } from "../errors.ts"
import type { ExecOptions } from "../guest/Exec.ts"
import { baseNames } from "../image/RootfsImage.ts"
import { Machinen } from "../Machinen.ts"
import type { Disk } from "../machine/MachineSpec.ts"
import type { VmEntry } from "../machine/VmEntry.ts"
import { given } from "../platform/given.ts"
import * as debug from "../runtime/debug.ts"
import type { Vm } from "../vm/Vm.ts"
import * as execPty from "./execPty.ts"
import {
  bootOptions,
  execOptions,
  forkOptions,
  gcOptions,
  provisionOptions,
  refuseOthers,
  restoreOptions,
  snapshotOptions
} from "./options.ts"
import type {
  BootOptions,
  Client,
  LogEvent,
  OnLog,
  PhaseLogEvent,
  RegistryEntry,
  StartOptions,
  VmHandle,
  VsockExecOptions
} from "./types.ts"
import * as VmControl from "./VmControl.ts"

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
