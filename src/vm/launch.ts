import * as path from "node:path"
import { FileSystem, type Error as PlatformErrors } from "@effect/platform"
import { Duration, Effect, ExecutionStrategy, Exit, Option, Scope } from "effect"
import { BootError } from "../errors.ts"
import type { AgentClient } from "../guest/Agent.ts"
import * as Initramfs from "../guest/Initramfs.ts"
import { Assets } from "../host/Assets.ts"
import type { Disk } from "../machine/MachineSpec.ts"
import { hostSocket, macOf, type NetworkMode, type PortForward } from "../machine/Network.ts"
import { Registry } from "../machine/Registry.ts"
import type { Secrets } from "../machine/Secrets.ts"
import { type ExitRecord, guestFailure } from "../machine/ShimPlan.ts"
import { HostSocketTaken } from "../machine/shimFailures.ts"
import type { VmEntry } from "../machine/VmEntry.ts"
import type { VmmHandle } from "../machine/Vmm.ts"
import { portHolder } from "../platform/portHolder.ts"
import { consoleTail, shownConsole } from "./consoleTail.ts"
import { Gvproxy } from "./Gvproxy.ts"

/**
 * Runs a start in a scope of its own within the caller's. When the start fails or is interrupted, that scope is closed at once: name, directory
 * and VM are released though the caller's scope goes on, so that the caller can try again.
 */
export const inOwnScope = <A, E, R>(
  start: Effect.Effect<A, E, R>,
  strategy: ExecutionStrategy.ExecutionStrategy = ExecutionStrategy.sequential
): Effect.Effect<A, E, Exclude<R, Scope.Scope> | Scope.Scope> =>
  Effect.uninterruptibleMask((restore) =>
    Effect.gen(function* () {
      const own = yield* Scope.fork(yield* Effect.scope, strategy)
      return yield* restore(Scope.extend(start, own)).pipe(
        Effect.onError((cause) => Scope.close(own, Exit.failCause(cause)))
      )
    })
  )

/** The network card of a machine, if its entry has a network. */
export const cardOf = ({ id, network }: VmEntry) => (network === "nat" ? { net: { mac: macOf(id) } } : {})

/** The program and the forwards of a machine's network. Acquires nothing. Fails with GVPROXY_NOT_FOUND. */
export const networkOf = Effect.fnUntraced(function* (mode: NetworkMode, forwards: ReadonlyArray<PortForward>) {
  if (mode === "none") return {}
  return { network: { gvproxy: yield* (yield* Gvproxy).command, forwards } }
})

/** Adds the holder (one of our VMs, or another process) to a port-in-use error. */
export const namingPortHolder = <A, E, R>(launched: Effect.Effect<A, E | BootError, R>) =>
  Effect.catchIf(
    launched,
    (error): error is BootError => error instanceof BootError && error.code === "BOOT_PORT_FORWARD_IN_USE",
    (error) =>
      Effect.gen(function* () {
        if (!(error.cause instanceof HostSocketTaken)) return yield* error
        const taken = error.cause.hostSocket
        const vms = yield* Effect.orElseSucceed((yield* Registry).list, () => [])
        const holder = vms.find(({ portForward = [] }) => portForward.some((forward) => hostSocket(forward) === taken))
        if (holder === undefined) {
          const port = Number(taken.slice(taken.lastIndexOf(":") + 1))
          return yield* Option.match(yield* portHolder(port), {
            onNone: () => error,
            onSome: ({ command, pid }) =>
              new BootError({ ...error, message: `${error.message}, by ${command} (pid ${pid})` })
          })
        }
        return yield* new BootError({
          ...error,
          message: `${error.message}, by VM "${holder.label}"`,
          hint: `choose another port, or \`machinen stop ${holder.label}\``
        })
      })
  )

/** How the guest makes its root from these disks. */
export const rootKind = (disks: ReadonlyArray<Disk>) => (disks.some(({ id }) => id === "upper") ? "overlay" : "disk")

/** Writes the initramfs, with init and its configuration, into the VM's directory. Returns its path. */
export const writeInitramfs = Effect.fnUntraced(function* (dir: string, guest: Initramfs.GuestConfig) {
  const fs = yield* FileSystem.FileSystem
  const init = yield* (yield* Assets).init
  const initrd = path.join(dir, "initrd.cpio")
  const program = yield* Effect.mapError(fs.readFile(init), packFailed)
  yield* Effect.mapError(fs.writeFile(initrd, Initramfs.forBoot(program, guest)), packFailed)
  return initrd
})

const packFailed = (cause: PlatformErrors.PlatformError) =>
  new BootError({
    code: "BOOT_PACK_FAILED",
    message: `the initramfs could not be written: ${cause.message}`,
    hint: "check the free space of the state directory (MACHINEN_HOME)",
    cause
  })

/** Sends a ready guest its secrets, if there are any. */
export const sendSecrets = (client: AgentClient, secrets: Secrets) =>
  Object.keys(secrets).length === 0 ? Effect.void : Effect.asVoid(client.secrets(secrets))

/** A valid host name (RFC 1123: letters, digits, hyphens, at most 63 characters), made from the VM's name or, without one, its id. */
export const hostname = (entry: VmEntry): string => {
  const name = (entry.name ?? "")
    .toLowerCase()
    .replaceAll(/[^a-z0-9-]/g, "-")
    .slice(0, 63)
    .replaceAll(/^-+|-+$/g, "")
  return name === "" ? `vm-${entry.id}` : name
}

/**
 * Waits until a launched guest is ready. Fails when the machine ends before (BOOT_VMM_FAILED, BOOT_GUEST_FAILED) and at the time limit
 * (BOOT_READY_TIMEOUT), and then kills the machine, detached or not.
 */
export const untilReady = <A, E>(ready: Effect.Effect<A, E>, machine: VmmHandle, limit: Duration.Duration) =>
  ready.pipe(
    Effect.raceFirst(Effect.flatMap(machine.exited, (exit) => exitedEarly(exit))),
    Effect.timeoutTo({
      duration: limit,
      onSuccess: (a) => Effect.succeed(a),
      onTimeout: () => Effect.flatMap(consoleTail(machine), notReady(limit))
    }),
    Effect.flatten,
    // the caller may be uninterruptible (Effect.acquireRelease): then neither the race nor the time limit could end the waiting
    Effect.interruptible,
    Effect.tapError(() => machine.kill)
  )

/** Delays a failure a moment: if the guest does not answer because its machine has ended, the machine's end is the better error. */
export const afterTheEnd = <A, E>(ready: Effect.Effect<A, E>, machine: VmmHandle) =>
  Effect.tapError(ready, () =>
    machine.exited.pipe(Effect.zipRight(Effect.never), Effect.timeout("5 seconds"), Effect.ignore)
  )

/** The error of a VMM that ended before the guest was ready. The logs tell whether VMM, guest kernel or our init failed. */
const exitedEarly = (exit: ExitRecord) => {
  const vmm = exit.vmm.signal === null ? `code ${exit.vmm.code}` : `signal ${exit.vmm.signal}`
  const printed = exit.vmmLogTail.trim()
  const guest = guestFailure(exit.consoleTail)
  return guest === undefined
    ? new BootError({
        code: "BOOT_VMM_FAILED",
        message: `the VMM ended (${vmm}) before the guest was ready${printed === "" ? "" : `: ${printed.split("\n").slice(-3).join("; ")}`}`,
        hint: "`machinen doctor` tells what is missing or broken on this host",
        ...shownConsole(exit.consoleTail)
      })
    : new BootError({
        code: "BOOT_GUEST_FAILED",
        message: `the guest did not come up: ${guest}`,
        hint: "is the image a root filesystem, and is there enough memory for it?",
        ...shownConsole(exit.consoleTail)
      })
}

const notReady = (limit: Duration.Duration) => (console: string) =>
  new BootError({
    code: "BOOT_READY_TIMEOUT",
    message: `the guest did not report ready within ${Duration.format(limit)}`,
    hint: "raise MACHINEN_BOOT_TIMEOUT on a slow or busy host; `machinen doctor` checks the host",
    ...shownConsole(console)
  })
