import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Layer } from "effect"
import { BootError, ExecError, SnapshotError } from "../../src/errors.ts"
import { Agent } from "../../src/guest/Agent.ts"
import { Assets } from "../../src/host/Assets.ts"
import { guestNetwork } from "../../src/machine/Network.ts"
import { guestMounts } from "../../src/mount/mounts.ts"
import { mountBusy, SnapshotEngine } from "../../src/snapshot/SnapshotEngine.ts"
import * as Launch from "../../src/vm/launch.ts"
import { clockAfterStandstill } from "../../src/vm/Vm.ts"

/** Milliseconds beyond the time limit in which the guest itself may report that the limit is over. */
const graceMs = 2000

/**
 * Saves the processes alone, by the `criu` of the guest's image. CRIU writes them to the guest's own disk, beside every file that they have open,
 * and that disk is copied: the bundle. A machine that boots from a copy of the disk restores them (docs/protocol.md §3, dump and revive).
 */
export const layer = Layer.effect(
  SnapshotEngine,
  Effect.gen(function* () {
    const agents = yield* Agent
    const assets = yield* Assets
    const fs = yield* FileSystem.FileSystem
    return SnapshotEngine.of({
      name: "criu",
      blobs: [],
      sameMachine: false,
      take: Effect.fn("Criu.take")(function* (
        { agent, entry, machine },
        { dir, lazyUmount, remove, tcpClose, timeoutMs }
      ) {
        const disks = (entry.disks ?? []).filter(({ readOnly }) => !readOnly)
        const saving = yield* Effect.mapError(
          machine.save({
            files: disks.map(({ id, path: from }) => ({ from, to: path.join(dir, `${id}.img`) })),
            remove
          }),
          failed
        )
        return {
          blobs: disks.map(({ id }) => `${id}.img`),
          hold: Effect.gen(function* () {
            const frozenMs = yield* agent.dump({ tcpClose, lazyUmount, timeout: timeoutMs }).pipe(
              Effect.timeoutFail({
                duration: timeoutMs + graceMs,
                onTimeout: () => new ExecError({ code: "EXEC_AGENT_TIMEOUT", message: "the guest does not answer" })
              }),
              Effect.mapError(refused)
            )
            const since = performance.now() - frozenMs
            // runs after the machine goes on and before the thaw, so that no process sees a late clock
            yield* Effect.addFinalizer(() => clockAfterStandstill(agent))
            yield* Effect.mapError(saving.whileStopped, failed)
            return since
          }),
          commit: Effect.mapError(saving.commit, failed)
        }
      }),
      revive: Effect.fn("Criu.revive")(function* (_, { dir, entry, lazy }) {
        const doorbell = yield* agents.doorbell(entry.vsockPath).pipe(Effect.mapError(notBack))
        const [kernel, initrd] = yield* Effect.all(
          [
            assets.kernel,
            Launch.writeInitramfs(dir, {
              config: { env: {} },
              boot: {
                version: 1,
                id: entry.id,
                hostname: Launch.hostname(entry),
                root: Launch.rootKind(entry.disks ?? []),
                revive: true,
                ...guestMounts(entry),
                ...(entry.network === "nat" ? { network: guestNetwork } : {})
              }
            })
          ],
          { concurrency: 2 }
        ).pipe(
          Effect.provideService(Assets, assets),
          Effect.provideService(FileSystem.FileSystem, fs),
          Effect.mapError((error) => (error._tag === "BootError" ? error : notBack(error)))
        )
        return {
          start: { _tag: "Kernel", kernel, initrd },
          ready: (agent, identity) =>
            doorbell.pipe(Effect.zipRight(agent.revive(identity, { lazy })), Effect.mapError(notBack))
        }
      })
    })
  })
)

/** The guest could not save its processes. */
const refused = (cause: ExecError) => {
  if (cause.code === "EXEC_AGENT_TIMEOUT") {
    return new SnapshotError({
      code: "SNAPSHOT_TIMEOUT",
      message: `the guest's processes were not saved in time: ${cause.message}`,
      hint: "allow more time, or use the engine vmstate, whose time does not grow with the processes",
      cause
    })
  }
  if (cause.code === "EXEC_MOUNT_BUSY") return mountBusy(cause)
  return new SnapshotError({
    code: "SNAPSHOT_DUMP_FAILED",
    message: `the guest's processes could not be saved: ${cause.message}`,
    hint:
      cause.code === "EXEC_COMMAND_NOT_FOUND"
        ? "boot an image that has it (`debian` does), or use the engine vmstate"
        : "the engine vmstate saves what CRIU cannot",
    cause
  })
}

/** The disks could not be copied. */
const failed = (cause: { readonly message: string; readonly code?: string }) =>
  new SnapshotError({
    code: "SNAPSHOT_DUMP_FAILED",
    message: `the VM's disks could not be saved: ${cause.message}`,
    ...(cause.code === "ENOSPC" ? { hint: "free some space, or choose another directory" } : {}),
    cause
  })

const notBack = (cause: Error) =>
  new BootError({
    code: "BOOT_REJUVENATION_FAILED",
    message: `the snapshot's processes could not be brought back, and the VM was ended: ${cause.message}`,
    hint: "what CRIU cannot restore, the engine vmstate can",
    cause
  })
