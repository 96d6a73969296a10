import * as os from "node:os"
import { PassThrough, Readable, Writable } from "node:stream"
import * as NodeStream from "@effect/platform-node/NodeStream"
import { Deferred, Effect, Exit, Fiber, identity, Option, Scope, Stream } from "effect"
import { type BootError, ExecError, type RegistryError } from "../errors.ts"
import type { CommandOutput } from "../guest/Exec.ts"
import { Machinen } from "../Machinen.ts"
import type { ExitRecord } from "../machine/ShimPlan.ts"
import { TailReadable } from "../platform/TailReadable.ts"
import type { Vm } from "../vm/Vm.ts"

/**
 * How a VM ended: as its main command did, else as the VMM did; nulls when that is not known. `code` is 128 + signal for a main command that a
 * signal ended.
 */
export interface VmExit {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
}

/** A VM that is ready. `main`: it has a main command, which has not been started yet. */
export interface Started {
  readonly vm: Vm
  readonly main: boolean
}

/** A VM for callers that do not use Effect scopes: its end releases it, and its main command has Node streams. */
export interface VmControl {
  /** The VM's handle, which is another one after `detach`. */
  readonly vm: () => Vm
  readonly stdin: Writable
  readonly stdout: Readable
  readonly stderr: Readable
  /** The last MiB of the main command's output on a channel. */
  readonly tail: (channel: CommandOutput["channel"]) => string
  /** Completes when nothing of the VM is left and all its output has been passed on. */
  readonly wait: Effect.Effect<VmExit, RegistryError>
  readonly detach: Effect.Effect<void, BootError | ExecError | RegistryError, Machinen>
}

/** Bytes of the main command's output that are kept of each channel. */
export const tailBytes = 1024 * 1024

/**
 * Starts a VM that ends with this process, unless it is detached. At the VM's end or detaching, its scope is closed. `within` adds to the scope
 * what the VM is started with.
 */
export const startOwned = <E, E2, R>(
  start: Effect.Effect<Started, E, R | Scope.Scope>,
  within: (
    scope: Scope.Scope
  ) => <A, F, Q>(effect: Effect.Effect<A, F, Q>) => Effect.Effect<A, F | E2, Exclude<Q, Machinen>>,
  onConsole: ((bytes: Uint8Array) => Effect.Effect<void>) | undefined
) =>
  Effect.uninterruptibleMask((restore) =>
    Effect.gen(function* () {
      const scope = yield* Scope.make()
      return yield* Effect.flatMap(start, (started) => controlOf(started, scope, onConsole)).pipe(
        Scope.extend(scope),
        within(scope),
        restore,
        Effect.onError((cause) => Scope.close(scope, Exit.failCause(cause)))
      )
    })
  )

/**
 * Starts a VM that is to outlive this process. It is started attached, and detached once its main command runs: a failure or an interruption
 * before that ends it.
 */
export const startDetached = <E, R>(start: Effect.Effect<Started, E, R | Scope.Scope>) =>
  Effect.uninterruptibleMask((restore) =>
    Effect.gen(function* () {
      const { main, vm } = yield* restore(start)
      if (main) yield* restore(vm.startMainDetached)
      const later = yield* restore((yield* Machinen).attach(vm.id))
      yield* vm.detach
      return attachedControl(later)
    })
  ).pipe(Effect.scoped)

/** A VM that this process does not own. */
export const attachedControl = (vm: Vm): VmControl => ({
  vm: () => vm,
  stdin: discardingStream(),
  stdout: Readable.from([]),
  stderr: Readable.from([]),
  tail: () => "",
  wait: Effect.map(vm.wait, toExit),
  detach: Effect.void
})

/** Starts the main command and copies the output of command and console, until the VM ends. */
const controlOf = (
  { main, vm }: Started,
  scope: Scope.CloseableScope,
  onConsole: ((bytes: Uint8Array) => Effect.Effect<void>) | undefined
) =>
  Effect.gen(function* () {
    const input = new PassThrough()
    const outputs = { stdout: new TailReadable(tailBytes), stderr: new TailReadable(tailBytes) }
    const all = (use: (outlet: TailReadable) => Effect.Effect<void>) => Effect.forEach(Object.values(outputs), use)
    let detachMain: Effect.Effect<void, ExecError> = Effect.void
    const forwarders: Array<Fiber.Fiber<void>> = []
    const forward = <A, E>(from: Stream.Stream<A, E>, to: (a: A) => Effect.Effect<void>) =>
      // a stream that breaks has ended with the VM, which `wait` reports
      Effect.map(Effect.forkIn(Effect.ignore(Stream.runForEach(from, to)), scope), (it) => void forwarders.push(it))

    if (onConsole !== undefined) yield* forward(vm.logs("console", { follow: true }), onConsole)
    if (main) {
      const stdin = NodeStream.fromReadable<unknown, Uint8Array>(() => input, identity)
      // a stream that the caller destroys counts as ended
      const command = yield* vm.startMain(Stream.orElse(stdin, () => Stream.empty))
      detachMain = command.detach
      const ending = Stream.ensuring(
        command.output,
        all(({ end }) => end)
      )
      yield* forward(ending, ({ bytes, channel }) => outputs[channel].write(bytes))
    } else yield* all(({ end }) => end)

    const ended = yield* vm.wait.pipe(
      Effect.zipLeft(all(({ unlimit }) => unlimit)),
      Effect.zipLeft(Effect.suspend(() => Fiber.awaitAll(forwarders))),
      Effect.zipLeft(Scope.close(scope, Exit.void)),
      Effect.map(toExit),
      Effect.forkDaemon
    )
    const detached = yield* Deferred.make<VmExit>()
    let current = vm
    const control: VmControl = {
      vm: () => current,
      stdin: main ? input : discardingStream(),
      ...outputs,
      tail: (channel) => outputs[channel].tail.toString(),
      wait: Effect.suspend(() =>
        current === vm
          ? Effect.raceFirst(Fiber.join(ended), Deferred.await(detached))
          : Effect.map(current.wait, toExit)
      ),
      detach: Effect.uninterruptibleMask((restore) =>
        Effect.gen(function* () {
          if (current !== vm || Option.isSome(yield* Fiber.poll(ended))) return
          const machinen = yield* Machinen
          // the interruptible steps come first: before they succeed nothing has changed
          const later = yield* restore(machinen.attach(vm.id))
          yield* restore(Effect.timeoutFail(detachMain, detachTimeout(vm)))
          yield* vm.detach
          current = later
          yield* Deferred.succeed(detached, { code: null, signal: null })
          yield* Fiber.interrupt(ended)
          yield* Scope.close(scope, Exit.void)
        })
      )
    }
    return control
  })

/** The error of a guest that does not answer, as while it is paused: the guest itself must redirect the main command's output. */
const detachTimeout = ({ entry }: Vm) =>
  ({
    duration: "5 seconds",
    onTimeout: () =>
      new ExecError({
        code: "EXEC_AGENT_TIMEOUT",
        message: `the VM "${entry.label}" was not detached: its guest does not answer`,
        hint: "is it paused? Resume it, then detach it"
      })
  }) as const

const discardingStream = () => new Writable({ write: (_chunk, _encoding, done) => done() })

const signalNames = new Map(Object.entries(os.constants.signals).map(([name, number]) => [number, name]))

const toExit = ({ main, vmm }: ExitRecord): VmExit => {
  const { code, signal } = main ?? vmm
  const name = signal === null ? undefined : signalNames.get(signal)
  return { code, signal: (name as NodeJS.Signals | undefined) ?? null }
}
