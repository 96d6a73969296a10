import { Context, type Effect, type Scope } from "effect"
import { type BootError, type ExecError, type RegistryError, SnapshotError } from "../errors.ts"
import type { AgentClient } from "../guest/Agent.ts"
import type { Rejuvenation } from "../guest/AgentProtocol.ts"
import type { Identity } from "../guest/Standstill.ts"
import type { Start } from "../machine/MachineSpec.ts"
import type { VmEntry } from "../machine/VmEntry.ts"
import type { VmmHandle } from "../machine/Vmm.ts"
import type { EngineName } from "./BundleManifest.ts"

/** A running VM that is to be saved. */
export interface Source {
  readonly entry: VmEntry
  readonly machine: VmmHandle<RegistryError>
  readonly agent: AgentClient
}

/** Where and how a VM is saved. */
export interface Target {
  /** An existing directory for the files that are made. */
  readonly dir: string
  /** Paths that the VM's shim removes if this process dies before the commit. */
  readonly remove: ReadonlyArray<string>
  /** True: the guest writes its filesystems out first, so that the disks are complete without the memory. */
  readonly sync: boolean
  /** True: established TCP connections need not be kept. */
  readonly tcpClose: boolean
  /** True: locks on files of shared directories may be lost in a copy. */
  readonly lazyUmount: boolean
  /** Time limit for freezing or dumping the guest's processes, in milliseconds. */
  readonly timeoutMs: number
}

/** The machine in which a snapshot is restored. */
export interface Place {
  /** The machine's directory, which exists. */
  readonly dir: string
  readonly entry: VmEntry
  /** True: memory is read when it is touched. An engine may do so in any case. */
  readonly lazy: boolean
}

/** A prepared capture. Closing its scope before the commit undoes it. */
export interface PendingCapture {
  /** Stops the guest's processes and makes the blobs; closing the scope lets the processes go on. Returns when they stopped (performance.now). */
  readonly hold: Effect.Effect<number, SnapshotError, Scope.Scope>
  /** Names of the files that `hold` makes. */
  readonly blobs: ReadonlyArray<string>
  /** Keeps the blobs: from now on nothing is undone when this process dies. */
  readonly commit: Effect.Effect<void, SnapshotError>
}

/** How a machine starts from a snapshot, and when it is ready. */
export interface RestorePlan {
  readonly start: Start
  /** Run after the launch. Gives the guest its own identity, and completes when its processes go on. */
  readonly ready: (agent: AgentClient, identity: Identity) => Effect.Effect<Rejuvenation, BootError | ExecError>
}

/** Saves running VMs as files, and starts VMs from such files. Hides whether whole machines or processes are saved. */
export interface SnapshotEngine {
  readonly name: EngineName
  /** Files that every bundle of this engine has, beside the disks. */
  readonly blobs: ReadonlyArray<string>
  /** True: a bundle needs the same VMM, devices and memory size. False: the same kernel and CPU are enough. */
  readonly sameMachine: boolean
  /** Prepares to save a VM. Closing the scope before the commit undoes everything. */
  readonly take: (source: Source, target: Target) => Effect.Effect<PendingCapture, SnapshotError, Scope.Scope>
  /** Prepares the start of a machine from a bundle's files. */
  readonly revive: (bundleDir: string, place: Place) => Effect.Effect<RestorePlan, BootError, Scope.Scope>
}
export const SnapshotEngine = Context.GenericTag<SnapshotEngine>("machinen/SnapshotEngine")

/** The engines by name, the default one first. A snapshot chooses one; a restore uses the bundle's. */
export class SnapshotEngines extends Context.Tag("machinen/SnapshotEngines")<
  SnapshotEngines,
  ReadonlyMap<EngineName, SnapshotEngine>
>() {}

/** The guest's processes hold locks on files of shared directories. */
export const mountBusy = (cause: { readonly message: string }) =>
  new SnapshotError({
    code: "SNAPSHOT_MOUNT_BUSY",
    message: `the VM was not saved: ${cause.message}`,
    hint: "let them release these locks, or give --lazy-umount: a copy has the files without the locks",
    cause
  })
