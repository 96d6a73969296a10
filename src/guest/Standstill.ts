import { randomBytes } from "node:crypto"
import { Duration, Effect, Schema, type Scope } from "effect"
import type { ExecError } from "../errors.ts"
import { given } from "../platform/given.ts"
import { type AgentRequest, encodeFrame, FrameType, Rejuvenation } from "./AgentProtocol.ts"
import { toAnswerError, toExecError } from "./agentErrors.ts"
import { askWithTime, sendTime } from "./GuestSystem.ts"
import type { GuestConfig } from "./Initramfs.ts"
import { forEachOf, type Operations } from "./operation.ts"

/** Values that a restored guest must not share with its original. */
export interface Identity {
  readonly hostname: string
  /** A UUID, different for every machine that is restored from the same snapshot. */
  readonly generation: string
  /** Hardware address of the network card; absent: the machine has none. */
  readonly mac?: string
  /** Overlays the environment that the original was booted with. */
  readonly env: Readonly<Record<string, string>>
  /** The live mounts, whose modes may be others than the original's. */
  readonly shares?: ReadonlyArray<{ readonly guest: string; readonly readOnly: boolean }>
  /** Replaces the original's whole configuration, when the original is a template that has run nothing. */
  readonly config?: GuestConfig["config"]
}

/** Operations of snapshots and copies: holding a guest still, and giving a copy its identity. */
export interface Standstill {
  /**
   * Freezes the guest's commands until the scope closes; with `sync` the guest writes its filesystems out first. Operations that are asked for
   * meanwhile wait. Fails with EXEC_AGENT_TIMEOUT after `timeout`.
   */
  readonly freeze: (options: {
    readonly sync: boolean
    /** False: fails with EXEC_MOUNT_BUSY when a process holds locks on files of a shared directory, which a copy cannot have as well. */
    readonly lazyUmount: boolean
    readonly timeout: Duration.DurationInput
  }) => Effect.Effect<void, ExecError, Scope.Scope>
  /**
   * Writes the guest's processes to the guest's disk and holds both still until the scope closes. Returns for how many milliseconds the processes
   * have stood still by then. The guest measures `timeout`, and reports it only after the step that it has begun.
   */
  readonly dump: (options: {
    readonly tcpClose: boolean
    /** As of `freeze`. */
    readonly lazyUmount: boolean
    readonly timeout: Duration.DurationInput
  }) => Effect.Effect<number, ExecError, Scope.Scope>
  /** Gives a guest that was booted from a copy of that disk an identity of its own, and restores the processes in it. */
  readonly revive: (identity: Identity, options: { readonly lazy: boolean }) => Effect.Effect<Rejuvenation, ExecError>
  /** Gives a restored guest an identity of its own, and only then lets its commands go on. */
  readonly rejuvenate: (identity: Identity) => Effect.Effect<Rejuvenation, ExecError>
}

export const make = (operations: Operations): Standstill => {
  const { ask, operate } = operations

  /** Runs an operation that holds the guest still from `started` on. Closing the scope sends `eof`, which lets the guest go on. */
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
    dump: Effect.fn("Agent.dump")(function* ({ lazyUmount, tcpClose, timeout }) {
      const timeoutMs = Duration.toMillis(timeout)
      const { frozenMs = 0 } = yield* held({ op: "dump", tcpClose, lazyUmount, timeoutMs })
      return frozenMs
    }),
    rejuvenate: Effect.fn("Agent.rejuvenate")(function* (identity) {
      const { json, lateMs } = yield* askWithTime(operations, () => ({ op: "rejuvenate", ...renewed(identity) }))
      // on a busy host the copy's clock may be far behind: set it again, which takes less time than the first answer
      if (lateMs > maxLateMs) {
        yield* Effect.repeat(sendTime(operations), { until: (lateMs) => lateMs <= maxLateMs, times: 2 })
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
    )
  }
}

/** Milliseconds. A copy's first answer takes less on an idle host (about 45 ms, TCG). */
const maxLateMs = 80

/** The fields of `rejuvenate`: random values and the time are made when the request is sent. */
const renewed = ({ config, env, generation, hostname, mac, shares }: Identity) => ({
  seed: randomBytes(32).toString("hex"),
  nowMs: Date.now(),
  hostname,
  machineId: randomBytes(16).toString("hex"),
  generation,
  ...given({ mac, shares }),
  env,
  ...given({ config })
})

const decodeRejuvenation = Schema.decodeUnknown(Rejuvenation)
