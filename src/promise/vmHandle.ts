import * as path from "node:path"
import { Duration, Effect, type Scope, Stream } from "effect"
import { BootError, type MachinenError } from "../errors.ts"
import type { ExecOptions } from "../guest/Exec.ts"
import { Machinen } from "../Machinen.ts"
import { given } from "../platform/given.ts"
import type { Vm } from "../vm/Vm.ts"
import * as execPty from "./execPty.ts"
import { both, type Log, logger, phaseEvent } from "./logEvents.ts"
import { execOptions, forkOptions, refuseOthers, snapshotOptions } from "./options.ts"
import type { Services } from "./services.ts"
import type { StartOptions, VmHandle, VsockExecOptions } from "./types.ts"
import * as VmControl from "./VmControl.ts"

/** Makes handles of VMs whose methods return promises, on these services. */
export const make = ({ run, within }: Services) => {
  /** Starts a VM and returns its handle. `waitMs` is the time limit of `wait()` in milliseconds; null: no limit. */
  const begin = async <F>(
    begun: Effect.Effect<VmControl.Started, F, Machinen | Scope.Scope>,
    options: StartOptions,
    waitMs: number | null
  ): Promise<VmHandle> => {
    const { detached, onLog, signal } = options
    const log = logger(onLog)
    // the signal ends the start only: a VM that is ready when the signal comes keeps running
    const start = signal === undefined ? begun : Effect.raceFirst(begun, aborted(signal))
    const onConsole = (bytes: Uint8Array) => log({ source: "guest-console", chunk: toBuffer(bytes) })
    const control: Effect.Effect<VmControl.VmControl, F | MachinenError, Machinen> =
      detached === true
        ? VmControl.startDetached(start)
        : VmControl.startOwned(start, within, onLog === undefined ? undefined : onConsole)
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
      ended: () => run(wait),
      kill: () => run(Effect.suspend(() => vm().kill).pipe(Effect.zipRight(wait), Effect.asVoid)),
      stop: (graceMs) => run(Effect.suspend(() => vm().stop(graceMs)).pipe(Effect.zipRight(wait), Effect.asVoid)),
      detach: () => run(detach),
      output: async () => tail("stdout"),
      errorOutput: async () => tail("stderr"),
      exec: execute("exec"),
      execRaw: execute("execRaw"),
      execPty: (cmd, options) => {
        const { cancel, release, resize, result } = execPty.openSession(vm, cmd, options)
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
            // the VM ends with its snapshot: nothing of it is left when the promise resolves
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

  return { begin, toHandle }
}

/** Dies with the signal's reason when the signal is aborted. */
const aborted = (signal: AbortSignal): Effect.Effect<never> =>
  Effect.async((resume) => {
    const end = () => resume(Effect.die(signal.reason))
    if (signal.aborted) return end()
    signal.addEventListener("abort", end, { once: true })
    return Effect.sync(() => signal.removeEventListener("abort", end))
  })

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

/** A Buffer on the same memory. */
const toBuffer = (bytes: Uint8Array): Buffer => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
const text = (bytes: Uint8Array): string => toBuffer(bytes).toString()

const stillRunning = (vm: Vm, ms: number) => ({
  duration: ms,
  onTimeout: () =>
    new BootError({
      code: "BOOT_TIMEOUT",
      message: `VM "${vm.entry.label}" is still running after ${ms} ms`,
      hint: "it goes on: wait again, end it with kill(), or boot it with `timeoutMs: null`"
    })
})
