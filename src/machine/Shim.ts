import { existsSync } from "node:fs"
import * as path from "node:path"
import {
  Context,
  Data,
  Deferred,
  type Duration,
  Effect,
  Layer,
  Option,
  Ref,
  Schedule,
  Schema,
  type Scope,
  Stream
} from "effect"
import { BootError, RegistryError } from "../errors.ts"
import { given } from "../platform/given.ts"
import * as OwnedProcess from "../platform/OwnedProcess.ts"
import type { ProcessIdentity } from "../platform/ProcessIdentity.ts"
import * as processes from "../platform/processes.ts"
import * as UnixSocket from "../platform/UnixSocket.ts"
import type { VmName } from "./MachineSpec.ts"
import { ExitRecord, ShimEvent, ShimPlan } from "./ShimPlan.ts"
import type { VmEntry } from "./VmEntry.ts"

export type LogSource = "console" | "output"

export interface LogOptions {
  /** Follow the log until the VM ends. Default false. */
  readonly follow?: boolean
  /** Start this many bytes before the end. Default: at the beginning. */
  readonly tailBytes?: number
}

/** What is copied while a VM is stopped, and how the shim undoes a snapshot whose maker has died (docs/protocol.md §5.5). */
export interface CaptureRequest {
  /** Path of the copy of the guest's memory; `undefined`: no copy. */
  readonly memory: string | undefined
  readonly files: ReadonlyArray<{ readonly from: string; readonly to: string }>
  readonly undo: {
    readonly remove: ReadonlyArray<string>
    /** The VMM's control socket, and the lines by which the VM goes on. */
    readonly socket: string
    readonly lines: ReadonlyArray<string>
  }
}

/** A prepared capture. Closing the scope before `commit`, or the end of this process, undoes it. */
export interface Capture {
  /** Copies memory and files. The caller has stopped the VM before. Returns the bytes written. */
  readonly copy: Effect.Effect<number, CaptureFailed>
  /** Keeps the copies: nothing is undone from now on. */
  readonly commit: Effect.Effect<void, CaptureFailed>
}

/** The shim could not copy, or is gone; `code` is an errno's name (ENOSPC, EBUSY, ECONNRESET, ...). */
export class CaptureFailed extends Schema.TaggedError<CaptureFailed>()("CaptureFailed", {
  code: Schema.String,
  message: Schema.String,
  cause: Schema.optional(Schema.Defect)
}) {}

/**
 * A VM's supervisor. Its starter learns of the VM's end by a pipe, so `E` is `never`. Any other process has found the VM in the registry and
 * may fail to reach the shim: `E` is RegistryError.
 */
export interface ShimHandle<E = never> {
  readonly shim: ProcessIdentity
  readonly vmm: ProcessIdentity
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
    let record = lost
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

/** The record of a VM whose shim was killed: the VMM died with the shim (PDEATHSIG), and no process recorded how. */
const lost = new ExitRecord({
  vmm: { code: null, signal: null },
  main: null,
  orderly: false,
  reason: "shim-lost",
  consoleTail: "",
  vmmLogTail: ""
})

/** The record of a VM whose shim cleaned up and ended before it could be asked. */
const unseen = new ExitRecord({ ...lost, reason: "unseen" })

const shimMissing = (binary: string, cause: unknown) =>
  new BootError({
    code: "BOOT_VMM_MISSING",
    message: `the shim cannot be run: ${binary}`,
    hint: "run `machinen install` (in a checkout: `npm run setup`)",
    cause
  })

const startFailed = (event: Extract<ShimEvent, { event: "failed" }>, plan: ShimPlan) => {
  const [vmm] = plan.vmm.argv
  if (event.code === "ENOSPC") {
    return new BootError({
      code: "BOOT_NO_SPACE",
      message: `no space left on the host for the VM's files: ${event.message}`,
      hint: `free some space on the disk that holds ${plan.dir}, or set MACHINEN_HOME to a larger one`
    })
  }
  if (event.step === "network") return forwardFailed(event)
  if (event.step === "shares") {
    return new BootError({
      code: event.code === "ENOENT" ? "BOOT_MOUNT_HOST_NOT_FOUND" : "BOOT_MOUNT_INVALID",
      message: `a live mount's directory cannot be used: ${event.message}`,
      hint: "give an existing directory of the host"
    })
  }
  if (event.step === "vmm" && event.code === "EPERM" && plan.shares !== undefined) {
    return new BootError({
      code: "BOOT_MOUNT_INVALID",
      message: `live mounts need root on the host: ${event.message}`,
      hint: "run as root, or mount a copy of the directory (`mount`, --volume)"
    })
  }
  if (event.step === "vmm" && (event.code === "ENOENT" || event.code === "EACCES")) {
    return new BootError({
      code: "BOOT_VMM_MISSING",
      message: `the VMM cannot be run: ${vmm}: ${event.message}`,
      hint: "run `machinen doctor` to see what is missing"
    })
  }
  return new BootError({
    code: "BOOT_VMM_FAILED",
    message: `the VM could not be started (${event.step}): ${event.message}`
  })
}

/** The cause of BOOT_PORT_FORWARD_IN_USE: the host's socket (`ip:port`) that another process holds. */
export class HostSocketTaken extends Data.TaggedError("HostSocketTaken")<{
  readonly message: string
  readonly hostSocket: string
}> {}

const forwardFailed = ({ code, message, subject }: Extract<ShimEvent, { event: "failed" }>) => {
  if (code === "EADDRINUSE") {
    return new BootError({
      code: "BOOT_PORT_FORWARD_IN_USE",
      message: `the host's port ${subject} is taken`,
      hint: "choose another port; `ss -ltnp` tells who listens there",
      cause: new HostSocketTaken({ message, hostSocket: subject })
    })
  }
  return new BootError({
    code: "BOOT_PORT_FORWARD_INVALID",
    message: `nothing can listen on ${message}`,
    hint:
      code === "EACCES"
        ? "ports below 1024 are for root; choose a higher one"
        : "give an address of this host: `ip address` lists them"
  })
}

const stopRequest = (graceMs: number | undefined) => ({ op: "stop", ...given({ graceMs }) })

/** The part of a handle that goes by the control socket (docs/protocol.md §5.4), for the starter and for other processes alike. */
const control = (controlPath: string) => ({
  logs: (source: LogSource, options: LogOptions = {}) =>
    Stream.unwrapScoped(
      Effect.map(request(controlPath, { op: "logs", source, follow: false, ...options }), ({ rest }) => rest)
    ).pipe(
      Stream.mapError(
        (cause) =>
          new RegistryError({ code: "REGISTRY_VM_NOT_FOUND", message: "the VM is gone, and its logs with it", cause })
      )
    ),
  capture: (capture: CaptureRequest) => startCapture(controlPath, capture),
  rename: (name: VmName | null, pin: string | null) =>
    Effect.scoped(request(controlPath, { op: "name", name, pin })).pipe(
      Effect.flatMap(({ answer }) => decodeAnswer(answer)),
      Effect.filterOrFail((answer) => answer.ok),
      Effect.mapError(
        (cause) =>
          new RegistryError({ code: "REGISTRY_VM_NOT_FOUND", message: "the VM is gone before it had its name", cause })
      ),
      Effect.asVoid
    )
})

const Answer = Schema.parseJson(
  Schema.Struct({
    ok: Schema.Boolean,
    bytes: Schema.optional(Schema.Number),
    code: Schema.optional(Schema.String),
    message: Schema.optional(Schema.String)
  })
)
const decodeAnswer = Schema.decode(Answer)

/** How long to wait for an undo: the shim gives the VMM 2 s to go on and the guest 2 s to set its clock, then it removes files. */
const undoneWithin = "7 seconds"

const startCapture = Effect.fn("Shim.capture")(function* (controlPath: string, capture: CaptureRequest) {
  const connection = yield* Effect.mapError(UnixSocket.connect(controlPath), captureLost)
  const lines = yield* Stream.toPull(
    connection.bytes.pipe(Stream.decodeText(), Stream.splitLines, Stream.rechunk(1), Stream.mapError(captureLost))
  )
  // When we close the connection, the shim undoes what was not committed; it closes its side when that is done.
  yield* Effect.addFinalizer(() =>
    connection.end.pipe(
      Effect.zipRight(Effect.ignore(Effect.forever(lines))),
      Effect.interruptible,
      Effect.timeout(undoneWithin),
      Effect.ignore
    )
  )
  const ask = (body: object) =>
    Effect.gen(function* () {
      yield* Effect.mapError(connection.write(Buffer.from(`${JSON.stringify(body)}\n`)), captureLost)
      const [line = ""] = yield* Effect.mapError(
        lines,
        Option.getOrElse(() => captureLost(gone))
      )
      const answer = yield* Effect.mapError(decodeAnswer(line), captureLost)
      if (answer.ok) return answer
      return yield* new CaptureFailed({ code: answer.code ?? "EIO", message: answer.message ?? "the shim refused" })
    })
  const { files, memory, undo } = capture
  yield* ask({ op: "capture", memory: memory ?? null, files, undo })
  return {
    copy: Effect.map(ask({ step: "copy" }), ({ bytes }) => bytes ?? 0),
    commit: Effect.asVoid(ask({ step: "commit" }))
  }
})

const captureLost = (cause: unknown) =>
  new CaptureFailed({ code: "ECONNRESET", message: "the VM's shim is gone", cause })

/** Sends a request and reads the first line of the answer; `rest` is what follows. */
const request = (controlPath: string, body: object) =>
  Effect.gen(function* () {
    const connection = yield* UnixSocket.connect(controlPath)
    yield* connection.write(Buffer.from(`${JSON.stringify(body)}\n`))
    const pull = yield* Stream.toPull(connection.bytes)
    let head = Buffer.alloc(0)
    while (!head.includes("\n")) {
      head = Buffer.concat([
        head,
        ...(yield* Effect.mapError(
          pull,
          Option.getOrElse(() => gone)
        ))
      ])
    }
    const at = head.indexOf("\n")
    const more = Stream.fromPull(Effect.succeed(pull))
    const rest: Stream.Stream<Uint8Array, NodeJS.ErrnoException> =
      head.length === at + 1 ? more : Stream.concat(Stream.make(head.subarray(at + 1)), more)
    return { answer: head.subarray(0, at).toString(), rest }
  })

const gone: NodeJS.ErrnoException = Object.assign(new Error("the shim closed the connection"), { code: "ECONNRESET" })

/** Sends a request and discards the answer. */
const ask = (controlPath: string, body: object) => Effect.scoped(request(controlPath, body))

/** Sends a request that the shim answers with the VM's end. Without an answer, the VM counts as ended only when its shim is dead. */
const endOf = (
  { controlPath, label }: VmEntry,
  shim: ProcessIdentity,
  body: object
): Effect.Effect<ExitRecord, RegistryError> =>
  Effect.gen(function* () {
    const { answer, rest } = yield* request(controlPath, body)
    const { message = "it refused", ok } = yield* decodeAnswer(answer)
    if (!ok) return yield* Effect.fail(new Error(message))
    const line = yield* rest.pipe(Stream.decodeText(), Stream.splitLines, Stream.runHead)
    if (Option.isNone(line)) return yield* Effect.fail(gone)
    const event = yield* Schema.decodeUnknown(Schema.parseJson(ShimEvent))(line.value)
    return event.event === "exited" ? event.exit : lost
  }).pipe(
    Effect.scoped,
    Effect.catchAll((cause) =>
      Effect.flatMap(endsWithin(shim, isEnding(controlPath, cause) ? "30 seconds" : "1 second"), (ended) =>
        ended
          ? Effect.succeed(existsSync(path.dirname(controlPath)) ? lost : unseen)
          : new RegistryError({
              code: "REGISTRY_VM_UNREACHABLE",
              message: `the supervisor of VM "${label}" (pid ${shim.pid}) does not answer: ${cause.message}`,
              hint: `try again; \`kill ${shim.pid}\` ends the VM in order, whatever the state of its socket`,
              cause
            })
      )
    )
  )

/** Whether a shim is about to end: its control socket refuses or breaks, or it has removed the VM's directory. */
const isEnding = (controlPath: string, { code }: NodeJS.ErrnoException) =>
  ["ECONNREFUSED", "ECONNRESET", "EPIPE"].includes(code ?? "") || !existsSync(path.dirname(controlPath))

/** Whether a process ends within the limit. Polls, because the kernel reports the end of a process to its parent only. */
const endsWithin = (who: ProcessIdentity, limit: Duration.DurationInput) =>
  processes.isAlive(who).pipe(
    Effect.filterOrFail((alive) => !alive),
    Effect.retry(Schedule.upTo(Schedule.spaced("20 millis"), limit)),
    Effect.isSuccess
  )
