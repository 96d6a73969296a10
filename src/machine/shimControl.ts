import { existsSync } from "node:fs"
import * as path from "node:path"
import { type Duration, Effect, Option, Schedule, Schema, Stream } from "effect"
import { RegistryError } from "../errors.ts"
import { firstLine, lineByLine } from "../platform/connectionLines.ts"
import { given } from "../platform/given.ts"
import type { ProcessIdentity } from "../platform/ProcessIdentity.ts"
import * as processes from "../platform/processes.ts"
import * as UnixSocket from "../platform/UnixSocket.ts"
import type { VmName } from "./MachineSpec.ts"
import { ExitRecord, ShimEvent } from "./ShimPlan.ts"
import type { VmEntry } from "./VmEntry.ts"

/** `console`: the output of kernel and init. `output`: the output of a detached main command. */
export type LogSource = "console" | "output"

/** Which part of a log is read. */
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
  /** Path of the state of the shares' server; `undefined`: it is not saved. */
  readonly shares: string | undefined
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

export const stopRequest = (graceMs: number | undefined) => ({ op: "stop", ...given({ graceMs }) })

/** The part of a handle that goes by the control socket (docs/protocol.md §5.4), for the starter and for other processes alike. */
export const control = (controlPath: string) => ({
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
const undoTimeout = "7 seconds"

const startCapture = Effect.fn("Shim.capture")(function* (controlPath: string, capture: CaptureRequest) {
  const connection = yield* Effect.mapError(UnixSocket.connect(controlPath), captureLost)
  const nextLine = yield* lineByLine(connection)
  // When we close the connection, the shim undoes what was not committed; it closes its side when that is done.
  yield* Effect.addFinalizer(() =>
    connection.end.pipe(
      Effect.zipRight(Effect.ignore(Effect.forever(nextLine))),
      Effect.interruptible,
      Effect.timeout(undoTimeout),
      Effect.ignore
    )
  )
  const ask = (body: object) =>
    Effect.gen(function* () {
      yield* Effect.mapError(connection.write(Buffer.from(`${JSON.stringify(body)}\n`)), captureLost)
      const line = yield* Effect.mapError(nextLine, (end) => captureLost(Option.getOrElse(end, () => connectionClosed)))
      const answer = yield* Effect.mapError(decodeAnswer(line), captureLost)
      if (answer.ok) return answer
      return yield* new CaptureFailed({ code: answer.code ?? "EIO", message: answer.message ?? "the shim refused" })
    })
  const { files, memory, shares, undo } = capture
  yield* ask({ op: "capture", memory: memory ?? null, shares: shares ?? null, files, undo })
  return {
    copy: Effect.map(ask({ step: "copy" }), ({ bytes }) => bytes ?? 0),
    commit: Effect.asVoid(ask({ step: "commit" }))
  }
})

const captureLost = (cause: unknown) =>
  new CaptureFailed({ code: "ECONNRESET", message: "the VM's shim is gone", cause })

/** Sends a request and reads the first line of the answer; `rest` is what follows. */
export const request = (controlPath: string, body: object) =>
  Effect.gen(function* () {
    const connection = yield* UnixSocket.connect(controlPath)
    yield* connection.write(Buffer.from(`${JSON.stringify(body)}\n`))
    const { after, line } = yield* firstLine(connection, { ended: () => connectionClosed })
    return { answer: line, rest: after.bytes }
  })

const connectionClosed: NodeJS.ErrnoException = Object.assign(new Error("the shim closed the connection"), {
  code: "ECONNRESET"
})

/** Sends a request and discards the answer. */
export const ask = (controlPath: string, body: object) => Effect.scoped(request(controlPath, body))

/** Sends a request that the shim answers with the VM's end. Without an answer, the VM counts as ended only when its shim is dead. */
export const endOf = (
  { controlPath, label }: VmEntry,
  shim: ProcessIdentity,
  body: object
): Effect.Effect<ExitRecord, RegistryError> =>
  Effect.gen(function* () {
    const { answer, rest } = yield* request(controlPath, body)
    const { message = "it refused", ok } = yield* decodeAnswer(answer)
    if (!ok) return yield* Effect.fail(new Error(message))
    const line = yield* rest.pipe(Stream.decodeText(), Stream.splitLines, Stream.runHead)
    if (Option.isNone(line)) return yield* Effect.fail(connectionClosed)
    const event = yield* Schema.decodeUnknown(Schema.parseJson(ShimEvent))(line.value)
    return event.event === "exited" ? event.exit : shimLost
  }).pipe(
    Effect.scoped,
    Effect.catchAll((cause) =>
      Effect.flatMap(endsWithin(shim, isEnding(controlPath, cause) ? "30 seconds" : "1 second"), (ended) =>
        ended
          ? Effect.succeed(existsSync(path.dirname(controlPath)) ? shimLost : endUnseen)
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
const endsWithin = (identity: ProcessIdentity, limit: Duration.DurationInput) =>
  processes.isAlive(identity).pipe(
    Effect.filterOrFail((alive) => !alive),
    Effect.retry(Schedule.upTo(Schedule.spaced("20 millis"), limit)),
    Effect.isSuccess
  )

/** The record of a VM whose shim was killed: the VMM died with the shim (PDEATHSIG), and no process recorded how. */
export const shimLost = new ExitRecord({
  vmm: { code: null, signal: null },
  main: null,
  orderly: false,
  reason: "shim-lost",
  consoleTail: "",
  vmmLogTail: ""
})

/** The record of a VM whose shim cleaned up and ended before it could be asked. */
const endUnseen = new ExitRecord({ ...shimLost, reason: "unseen" })
