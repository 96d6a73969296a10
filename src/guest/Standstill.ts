import { randomBytes } from "node:crypto"
import { Duration, Effect, Schema, type Scope } from "effect"
import type { ExecError } from "../errors.ts"
import { given } from "../platform/given.ts"
import { type AgentRequest, encodeFrame, FrameType, GuestStats, Rejuvenation } from "./AgentProtocol.ts"
import { toAnswerError, toExecError } from "./agentErrors.ts"
import type { GuestConfig } from "./Initramfs.ts"
import { forEachOf, type Operations } from "./operation.ts"

/** What is a restored guest's own. */
export interface Identity {
  readonly hostname: string
  /** A UUID; no other machine that was restored from the same snapshot has it. */
  readonly generation: string
  /** Of its network card, if it has one. */
  readonly mac?: string
  /** Over the environment the original was booted with. */
  readonly env: Readonly<Record<string, string>>
  /** In place of everything the original was configured with: it has run nothing, and begins here. */
  readonly config?: GuestConfig["config"]
}

/** What a snapshot asks of a guest, what a copy is told, and what the guest says of itself. */
export interface Standstill {
  /**
   * Freezes the guest's commands until the scope closes; with `sync` its filesystems are written out first. Operations asked for meanwhile
   * wait.
   */
  readonly freeze: (options: {
    readonly sync: boolean
    /** Fail EXEC_MOUNT_BUSY otherwise when a process holds files on a shared directory: a copy's host does not know them. */
    readonly lazyUmount: boolean
    readonly timeout: Duration.DurationInput
  }) => Effect.Effect<void, ExecError, Scope.Scope>
  /**
   * Writes the guest's processes to its disk and keeps both still until the scope closes; returns for how many milliseconds they have stood
   * still by then. `timeout` is the guest's: what it has begun it ends before it says so.
   */
  readonly dump: (options: {
    readonly tcpClose: boolean
    readonly timeout: Duration.DurationInput
  }) => Effect.Effect<number, ExecError, Scope.Scope>
  /** Brings such processes back in a guest that was booted from a copy of that disk, once it is one of its own. */
  readonly revive: (identity: Identity, options: { readonly lazy: boolean }) => Effect.Effect<Rejuvenation, ExecError>
  /** Makes a restored guest one of its own, and only then lets its commands go on. */
  readonly rejuvenate: (identity: Identity) => Effect.Effect<Rejuvenation, ExecError>
  /** Sets the guest's wall clock to the host's: it has stood still for as long as the machine did. Answered while commands are frozen, too. */
  readonly setClock: Effect.Effect<void, ExecError>
  readonly stats: Effect.Effect<GuestStats, ExecError>
}

export const make = ({ ask, operate }: Operations): Standstill => {
  /** Asks what tells the guest the time, which is late there by as long as it was under way: the answer's delay bounds that. */
  const tell = Effect.fnUntraced(function* (request: () => AgentRequest) {
    let sentMs = 0
    const json = yield* ask(() => {
      sentMs = Date.now()
      return request()
    })
    return { json, lateMs: Date.now() - sentMs }
  })

  const tellTime = tell(() => ({ op: "clock", nowMs: Date.now() }))

  /** For operations that keep the guest still from their first answer on; the stream is the scope's: whatever ends it lets go. */
  const held = Effect.fnUntraced(function* (request: AgentRequest) {
    const { frame, send, started } = yield* Effect.mapError(operate(request), toExecError)
    yield* Effect.addFinalizer(() =>
      send(encodeFrame(FrameType.eof, new Uint8Array(0))).pipe(
        Effect.zipRight(forEachOf(frame, () => Effect.void)),
        Effect.interruptible,
        Effect.timeout("2 seconds"),
        Effect.ignore
      )
    )
    return started
  })

  return {
    freeze: Effect.fn("Agent.freeze")(function* ({ lazyUmount, sync, timeout }) {
      yield* held({ op: "freeze", sync, lazyUmount, timeoutMs: Duration.toMillis(timeout) })
    }),
    dump: Effect.fn("Agent.dump")(function* ({ tcpClose, timeout }) {
      const { frozenMs = 0 } = yield* held({ op: "dump", tcpClose, timeoutMs: Duration.toMillis(timeout) })
      return frozenMs
    }),
    rejuvenate: Effect.fn("Agent.rejuvenate")(function* (identity) {
      const { json, lateMs } = yield* tell(() => ({ op: "rejuvenate", ...renewed(identity) }))
      // on a host so busy that the copy's clock may be far behind, it is told again, which takes less
      if (lateMs > maxLateMs) {
        yield* Effect.repeat(tellTime, { until: ({ lateMs }) => lateMs <= maxLateMs, times: 2 })
      }
      return yield* decodeRejuvenation(json)
    }, Effect.mapError(toAnswerError)),
    revive: Effect.fn("Agent.revive")(
      (identity, { lazy }) =>
        Effect.flatMap(
          ask(() => ({ op: "revive", lazy, ...renewed(identity) })),
          decodeRejuvenation
        ),
      Effect.mapError(toAnswerError)
    ),
    setClock: Effect.asVoid(Effect.mapError(tellTime, toAnswerError)),
    stats: ask({ op: "stats" }).pipe(Effect.flatMap(decodeStats), Effect.mapError(toAnswerError))
  }
}

/** More than a copy's first answer takes on a host that has time for it (about 45 ms, TCG). */
const maxLateMs = 80

/** What must not be the same twice, made at the last moment. */
const renewed = ({ config, env, generation, hostname, mac }: Identity) => ({
  seed: randomBytes(32).toString("hex"),
  nowMs: Date.now(),
  hostname,
  machineId: randomBytes(16).toString("hex"),
  generation,
  ...given({ mac }),
  env,
  ...given({ config })
})

const decodeRejuvenation = Schema.decodeUnknown(Rejuvenation)
const decodeStats = Schema.decodeUnknown(GuestStats)
