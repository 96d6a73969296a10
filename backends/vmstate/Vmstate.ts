import * as path from "node:path"
import { Effect, Layer } from "effect"
import { ExecError, SnapshotError } from "../../src/errors.ts"
import type { VmEntry } from "../../src/machine/VmEntry.ts"
import { mountBusy, SnapshotEngine } from "../../src/snapshot/SnapshotEngine.ts"
import { clockAfterStandstill } from "../../src/vm/Vm.ts"

const stateFile = "state"
const memoryFile = "memory"
/** Which files of shared directories the guest knows and has open; in bundles of machines that have some. */
const sharesFile = "shares"
/** Milliseconds beyond the time limit in which the guest itself may report that the limit is over. */
const graceMs = 2000

/**
 * Saves the whole machine while it is stopped: the VMM saves device state, the shim copies memory and disks. The guest's processes are frozen
 * before, so that in a copy none of them runs before the copy has randomness and a clock of its own.
 */
export const layer = Layer.succeed(
  SnapshotEngine,
  SnapshotEngine.of({
    name: "vmstate",
    blobs: [stateFile, memoryFile],
    sameMachine: true,
    take: Effect.fn("Vmstate.take")(function* (
      { agent, entry, machine },
      { dir, lazyUmount, remove, sync, timeoutMs }
    ) {
      const shares = hasShares(entry) ? [sharesFile] : []
      const disks = (entry.disks ?? []).filter(({ readOnly }) => !readOnly)
      const saving = yield* Effect.mapError(
        machine.save({
          machine: {
            state: path.join(dir, stateFile),
            memory: path.join(dir, memoryFile),
            ...(hasShares(entry) ? { shares: path.join(dir, sharesFile) } : {})
          },
          files: disks.map(({ id, path: from }) => ({ from, to: path.join(dir, `${id}.img`) })),
          remove
        }),
        failed
      )
      return {
        blobs: [stateFile, memoryFile, ...shares, ...disks.map(({ id }) => `${id}.img`)],
        hold: Effect.gen(function* () {
          yield* Effect.timeoutFail(agent.freeze({ sync, lazyUmount, timeout: timeoutMs }), {
            duration: timeoutMs + graceMs,
            onTimeout: () => new ExecError({ code: "EXEC_AGENT_TIMEOUT", message: "the guest does not answer" })
          })
          const since = performance.now()
          // runs after the machine goes on and before the thaw, so that no process sees a late clock
          yield* Effect.addFinalizer(() => clockAfterStandstill(agent))
          yield* saving.whileStopped
          return since
        }).pipe(Effect.mapError(failed)),
        commit: Effect.mapError(saving.commit, failed)
      }
    }),
    revive: (bundleDir, { entry }) =>
      Effect.succeed({
        start: {
          _tag: "Saved",
          state: path.join(bundleDir, stateFile),
          memory: path.join(bundleDir, memoryFile),
          ...(hasShares(entry) ? { shares: path.join(bundleDir, sharesFile) } : {})
        },
        ready: (agent, identity) => agent.rejuvenate(identity)
      })
  })
)

const hasShares = ({ liveMounts = [] }: VmEntry) => liveMounts.length > 0

const failed = (cause: { readonly message: string; readonly code?: string }) => {
  if (cause.code === "EXEC_AGENT_TIMEOUT") {
    return new SnapshotError({
      code: "SNAPSHOT_TIMEOUT",
      message: `the guest's processes could not be frozen in time: ${cause.message}`,
      hint: "one may be waiting for a slow disk; try again, or allow more time",
      cause
    })
  }
  if (cause.code === "EXEC_MOUNT_BUSY") return mountBusy(cause)
  return new SnapshotError({
    code: "SNAPSHOT_DUMP_FAILED",
    message: `the VM could not be saved: ${cause.message}`,
    ...hint(cause),
    cause
  })
}

const hint = ({ code }: { readonly code?: string }) =>
  code === "ENOSPC"
    ? { hint: "free some space, or choose another directory" }
    : code === "EBUSY"
      ? { hint: "another snapshot of this VM is being taken; wait for it" }
      : code === "VMM_PAUSED"
        ? { hint: "let it go on first: `machinen resume`" }
        : {}
