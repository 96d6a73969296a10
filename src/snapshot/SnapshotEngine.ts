import { Context, type Effect, type Scope } from "effect"
import type { BootError, ExecError, RegistryError, SnapshotError } from "../errors.ts"
import type { AgentClient } from "../guest/Agent.ts"
import type { Rejuvenation } from "../guest/AgentProtocol.ts"
import type { Identity } from "../guest/Standstill.ts"
import type { Start } from "../machine/MachineSpec.ts"
import type { VmEntry } from "../machine/VmEntry.ts"
import type { VmmHandle } from "../machine/Vmm.ts"
import type { EngineName } from "./BundleManifest.ts"

/** A running VM that is to be captured. */
export interface Source {
  readonly entry: VmEntry
  readonly machine: VmmHandle<RegistryError>
  readonly agent: AgentClient
}

export interface Target {
  /** Exists; what is made goes there. */
  readonly dir: string
  /** Removed by the VM's shim if this process dies before the commit. */
  readonly remove: ReadonlyArray<string>
  /** Write the guest's filesystems out first, so that the disks are complete without the memory. */
  readonly sync: boolean
  /** Established TCP connections need not survive. */
  readonly tcpClose: boolean
  /** Files that are open on shared directories may be lost, where the engine cannot keep them. */
  readonly lazyUmount: boolean
  readonly timeoutMs: number
}

/** The machine a snapshot is to go on in. */
export interface Place {
  /** Its directory, which exists. */
  readonly dir: string
  readonly entry: VmEntry
  /** Memory is to be read when it is touched, where the engine has it otherwise. */
  readonly lazy: boolean
}

/** A capture, prepared. */
export interface PendingCapture {
  /** Holds the guest's processes and makes the blobs; closing the scope lets them go on. Returns when they stopped (performance.now). */
  readonly hold: Effect.Effect<number, SnapshotError, Scope.Scope>
  /** Names of the files `hold` makes. */
  readonly blobs: ReadonlyArray<string>
  /** From here on nothing is undone when this process dies. */
  readonly commit: Effect.Effect<void, SnapshotError>
}

/** How a machine begins as a snapshot, and when it has. */
export interface RestorePlan {
  readonly start: Start
  /** After the launch: completes once the guest is one of its own and its processes go on. */
  readonly ready: (agent: AgentClient, identity: Identity) => Effect.Effect<Rejuvenation, BootError | ExecError>
}

/** Turns a running VM into files and files into running VMs. What differs between saving a machine and dumping processes lives here. */
export interface SnapshotEngine {
  readonly name: EngineName
  /** Files that every bundle of this engine has, disks aside. */
  readonly blobs: ReadonlyArray<string>
  /** A bundle goes on only in the machine it was taken from: the same VMM, devices and memory. Otherwise the same kernel and CPU do. */
  readonly sameMachine: boolean
  readonly take: (source: Source, target: Target) => Effect.Effect<PendingCapture, SnapshotError, Scope.Scope>
  readonly revive: (bundleDir: string, place: Place) => Effect.Effect<RestorePlan, BootError, Scope.Scope>
}
export const SnapshotEngine = Context.GenericTag<SnapshotEngine>("machinen/SnapshotEngine")

/** The engines there are; which one is chosen for each snapshot, and by the bundle for a restore. */
export class SnapshotEngines extends Context.Tag("machinen/SnapshotEngines")<
  SnapshotEngines,
  ReadonlyMap<EngineName, SnapshotEngine>
>() {}
