import { Cause, Effect, Exit, Layer, RcRef, Scope } from "effect"
import { BootError, isMachinenError } from "../errors.ts"
import type { Machinen } from "../Machinen.ts"
import { given } from "../platform/given.ts"
import * as debug from "../runtime/debug.ts"

/** Runs effects on the services behind the Promise API. */
export interface Services {
  /** Provides an effect with the services, which are kept until the scope closes. */
  readonly within: (
    scope: Scope.Scope
  ) => <A, F, R>(effect: Effect.Effect<A, F, R>) => Effect.Effect<A, F | BootError, Exclude<R, Machinen>>
  /** Runs an effect as a promise. An abort of the signal interrupts it, and rejects with the signal's reason. */
  readonly run: <A, F>(effect: Effect.Effect<A, F, Machinen>, signal?: AbortSignal) => Promise<A>
}

/** Shares services: they are built on first use, and released when no call and no VM of this process needs them. */
export const share = <E>(services: Layer.Layer<Machinen, E>): Services => {
  const shared = Effect.runSync(
    Effect.flatMap(Scope.make(), (forever) =>
      RcRef.make({
        acquire: Layer.toRuntime(Layer.provideMerge(services, debug.layer)).pipe(Effect.mapError(unusable))
      }).pipe(Scope.extend(forever))
    )
  )

  const within =
    (scope: Scope.Scope) =>
    <A, F, R>(effect: Effect.Effect<A, F, R>) =>
      Effect.flatMap(Scope.extend(RcRef.get(shared), scope), (runtime) => Effect.provide(effect, runtime))

  const run = async <A, F>(effect: Effect.Effect<A, F, Machinen>, signal?: AbortSignal): Promise<A> => {
    const program = Effect.scopedWith((scope) => within(scope)(effect))
    const exit = await Effect.runPromiseExit(program, given({ signal }))
    if (Exit.isSuccess(exit)) return exit.value
    if (Cause.isInterruptedOnly(exit.cause) && signal?.aborted === true) throw signal.reason
    throw Cause.originalError(Cause.squash(exit.cause))
  }

  return { run, within }
}

/** The error of services that cannot be built, because a setting is wrong. */
const unusable = (cause: unknown) =>
  isMachinenError(cause) && cause instanceof BootError
    ? cause
    : new BootError({
        code: "BOOT_OPTION_INVALID",
        message: `a setting of the environment cannot be used: ${cause instanceof Error ? cause.message : String(cause)}`,
        hint: "README.md lists the MACHINEN_* variables and what they take",
        cause
      })
