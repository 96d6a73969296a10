import * as path from "node:path"
import { Effect, Layer } from "effect"
import { ExecError, SnapshotError } from "../../src/errors.ts"
import { SnapshotEngine } from "../../src/snapshot/SnapshotEngine.ts"
import { clockAfterStandstill } from "../../src/vm/Vm.ts"

const stateFile = "state"
const memoryFile = "memory"
/** What the guest's own answer to a time limit may take. */
const graceMs = 2000

/**
 * The whole machine: device state and memory by the VMM, disks by copying, all while it is stopped and its processes are frozen, so that in
 * a copy none of them runs before it has randomness and a clock of its own.
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
      const disks = (entry.disks ?? []).filter(({ readOnly }) => !readOnly)
      const saving = yield* Effect.mapError(
        machine.save({
          machine: { state: path.join(dir, stateFile), memory: path.join(dir, memoryFile) },
          files: disks.map(({ id, path: from }) => ({ from, to: path.join(dir, `${id}.img`) })),
          remove
        }),
        failed
      )
      return {
        blobs: [stateFile, memoryFile, ...disks.map(({ id }) => `${id}.img`)],
        hold: Effect.gen(function* () {
          yield* Effect.timeoutFail(agent.freeze({ sync, lazyUmount, timeout: timeoutMs }), {
            duration: timeoutMs + graceMs,
            onTimeout: () => new ExecError({ code: "EXEC_AGENT_TIMEOUT", message: "the guest does not answer" })
          })
          const since = performance.now()
          // runs between the machine's going on and the thaw: no process sees a clock that is late
          yield* Effect.addFinalizer(() => clockAfterStandstill(agent))
          yield* saving.whileStopped
          return since
        }).pipe(Effect.mapError(failed)),
        commit: Effect.mapError(saving.commit, failed)
      }
    }),
    revive: (bundleDir) =>
      Effect.succeed({
        start: { _tag: "Saved", state: path.join(bundleDir, stateFile), memory: path.join(bundleDir, memoryFile) },
        ready: (agent, identity) => agent.rejuvenate(identity)
      })
  })
)

const failed = (cause: { readonly message: string; readonly code?: string }) => {
  if (cause.code === "EXEC_AGENT_TIMEOUT") {
    return new SnapshotError({
      code: "SNAPSHOT_TIMEOUT",
      message: `the guest's processes could not be frozen in time: ${cause.message}`,
      hint: "one may be waiting for a slow disk; try again, or allow more time",
      cause
    })
  }
  if (cause.code === "EXEC_MOUNT_BUSY") {
    return new SnapshotError({
      code: "SNAPSHOT_MOUNT_BUSY",
      message: `the VM was not saved: ${cause.message}`,
      hint: "let them close these files or leave the directory, or give --lazy-umount: in a copy they get EIO",
      cause
    })
  }
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
