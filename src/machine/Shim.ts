import { Context, Deferred, Effect, Layer, Ref, Schema, type Scope, Stream } from "effect"
import { BootError, RegistryError } from "../errors.ts"
import { given } from "../platform/given.ts"
import * as OwnedProcess from "../platform/OwnedProcess.ts"
import type { ProcessIdentity } from "../platform/ProcessIdentity.ts"
import type { VmName } from "./MachineSpec.ts"
import { type ExitRecord, type ShareReport, ShimEvent, ShimPlan } from "./ShimPlan.ts"
import {
  ask,
  type Capture,
  type CaptureFailed,
  type CaptureRequest,
  control,
  endOf,
  type LogOptions,
  type LogSource,
  request,
  shimLost,
  stopRequest
} from "./shimControl.ts"
import { shimMissing, startFailed } from "./shimFailures.ts"
import type { VmEntry } from "./VmEntry.ts"

/**
 * A VM's supervisor. Its starter learns of the VM's end by a pipe, so `E` is `never`. Any other process has found the VM in the registry and
 * may fail to reach the shim: `E` is RegistryError.
 */
export interface ShimHandle<E = never> {
  readonly shim: ProcessIdentity
  readonly vmm: ProcessIdentity
  /** What the server of shared directories said when the VM was started, if this process has started it and it has any. */
  readonly shares?: ShareReport
  /** Completes when the VM has ended and nothing of it is left on the host. */
  readonly exited: Effect.Effect<ExitRecord, E>
  /**
   * Asks the guest to power off; after the grace (default: the plan's `graceMs`) the shim kills the VMM. Completes as `exited`, also when the VM
   * had ended before.
   */
  readonly stop: (graceMs?: number) => Effect.Effect<ExitRecord, E>
  readonly kill: Effect.Effect<ExitRecord, E>
  /** Lets the VM outlive its starter from now on. If the shim does not confirm it, this fails and the VM ends with its starter. */
  readonly detach: Effect.Effect<void, BootError>
  readonly logs: (source: LogSource, options?: LogOptions) => Stream.Stream<Uint8Array, RegistryError>
  /** Prepares a capture: copies memory while the VM runs, so that less is left when it is stopped. One at a time (CaptureFailed EBUSY). */
  readonly capture: (request: CaptureRequest) => Effect.Effect<Capture, CaptureFailed, Scope.Scope>
  /** Gives a VM without a name a name, or takes that back (`null`). The shim removes `pin` with the VM. */
  readonly rename: (name: VmName | null, pin: string | null) => Effect.Effect<void, RegistryError>
}

/**
 * Starts shims and talks to them. A shim owns everything of its VM on the host: VMM, sockets, files, registry entry. Images and options are
 * resolved before the shim starts.
 */
export class Shim extends Context.Tag("machinen/Shim")<
  Shim,
  {
    /**
     * Starts a VM under a shim. Closing the scope stops the VM as `stop` does and waits until nothing of it is left, unless it was detached.
     */
    readonly start: (binary: string, plan: ShimPlan) => Effect.Effect<ShimHandle, BootError, Scope.Scope>
    /** Connects to the shim of a running VM. Fails with REGISTRY_VM_NOT_FOUND while the VM is still being started. */
    readonly attach: (entry: VmEntry) => Effect.Effect<ShimHandle<RegistryError>, RegistryError>
  }
>() {
  static readonly layer = Layer.succeed(Shim, {
    start: Effect.fn("Shim.start")(function* (binary, plan) {
      const detached = yield* Ref.make(plan.detached)
      const exited = yield* Deferred.make<ExitRecord>()
      const line = yield* Effect.orDie(Schema.encode(Schema.parseJson(ShimPlan))(plan))

      const started = yield* Effect.acquireRelease(
        Effect.gen(function* () {
          const process = yield* OwnedProcess.start([binary], { PATH: globalThis.process.env["PATH"] }).pipe(
            Effect.mapError((cause) => shimMissing(binary, cause))
          )
          const first = yield* Deferred.make<ShimEvent, void>()
          // a daemon, because it must outlive the acquire: it ends with the shim's stdout
          yield* Effect.forkDaemon(follow(process, first, exited))
          yield* process.writeLine(line)
          return { process, first }
        }),
        ({ process }) =>
          Effect.flatMap(Ref.get(detached), (free) =>
            free ? process.release : Effect.zipRight(process.disown, process.ended)
          )
      )

      const event = yield* Deferred.await(started.first).pipe(
        Effect.mapError(
          () => new BootError({ code: "BOOT_VMM_FAILED", message: "the shim ended before it had started the VM" })
        )
      )
      if (event.event === "failed") return yield* startFailed(event, plan)
      if (event.event === "exited") return yield* Effect.dieMessage("the shim reported an exit before a start")
      // if the control socket fails, closing our pipe asks the shim for an orderly stop
      const end = (body: object) =>
        Effect.zipRight(
          Effect.orElse(ask(plan.controlPath, body), () => started.process.disown),
          Deferred.await(exited)
        )
      return {
        ...control(plan.controlPath),
        exited: Deferred.await(exited),
        stop: (graceMs?: number) => end(stopRequest(graceMs)),
        kill: end({ op: "kill" }),
        shim: event.shim,
        vmm: event.vmm,
        ...given({ shares: event.shares }),
        detach: request(plan.controlPath, { op: "detach" }).pipe(
          Effect.zipRight(Ref.set(detached, true)),
          Effect.scoped,
          Effect.mapError(
            (cause) =>
              new BootError({
                code: "BOOT_DETACHED_READINESS_FAILED",
                message: `the VM could not be let go: its supervisor (pid ${event.shim.pid}) does not answer: ${cause.message}`,
                hint: "it has ended, or ends with this process; start another",
                cause
              })
          ),
          // an interruption after the shim's answer would leave a scope that waits for the end of a detached VM
          Effect.uninterruptible
        )
      }
    }),

    attach: Effect.fn("Shim.attach")(function* (entry) {
      const { shim, vmm } = entry
      if (shim === undefined || vmm === undefined) {
        return yield* new RegistryError({
          code: "REGISTRY_VM_NOT_FOUND",
          message: `VM "${entry.label}" is still being started`,
          hint: "try again in a moment"
        })
      }
      const answered = (body: object) => endOf(entry, shim, body)
      return {
        ...control(entry.controlPath),
        shim,
        vmm,
        exited: answered({ op: "wait" }),
        stop: (graceMs?: number) => answered(stopRequest(graceMs)),
        kill: answered({ op: "kill" }),
        detach: Effect.void
      }
    })
  })
}

/** Reads the shim's events to the end. Completes `first` with the first event, and `exited` once the shim itself has ended. */
const follow = (
  process: OwnedProcess.OwnedProcess,
  first: Deferred.Deferred<ShimEvent, void>,
  exited: Deferred.Deferred<ExitRecord>
) =>
  Effect.gen(function* () {
    let record = shimLost
    yield* Stream.runForEach(process.lines, (line) =>
      Effect.gen(function* () {
        const event = yield* Schema.decodeUnknown(Schema.parseJson(ShimEvent))(line)
        yield* Deferred.succeed(first, event)
        if (event.event === "exited") record = event.exit
      }).pipe(Effect.catchAll((error) => Effect.logWarning("unreadable event from the shim", error)))
    )
    yield* process.ended
    if (record.vmmLogTail !== "") {
      yield* Effect.logDebug(record.vmmLogTail).pipe(Effect.annotateLogs({ service: "vmm" }))
    }
    yield* Deferred.fail(first, undefined)
    yield* Deferred.succeed(exited, record)
  })
