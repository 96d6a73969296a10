import { Context, type Effect, type Scope } from "effect"
import { type BootError, VmmControlFailed } from "../errors.ts"
import type { Accelerator, DeviceSet, MachineFingerprint, MachineSpec } from "./MachineSpec.ts"
import type { PortForward } from "./Network.ts"
import type { ShimHandle } from "./Shim.ts"
import type { CaptureFailed } from "./shimControl.ts"
import type { VmEntry } from "./VmEntry.ts"

/** What a backend is and offers. */
export interface Capabilities {
  readonly backend: string
  readonly accel: Accelerator
  readonly maxVcpus: number
}

export { VmmControlFailed }

/** A running VM: its supervisor, and what the hypervisor can do with the machine. */
export interface VmmHandle<E = never> extends ShimHandle<E> {
  /** Stops the vCPUs; memory and devices stay as they are. The guest does not notice, but its clock falls behind. */
  readonly pause: Effect.Effect<void, VmmControlFailed>
  readonly resume: Effect.Effect<void, VmmControlFailed>
  /** Prepares to save the machine. Closing the scope before `commit` leaves the machine running and removes what was made. */
  readonly save: (target: SaveTarget) => Effect.Effect<Saving, VmmControlFailed | CaptureFailed, Scope.Scope>
}

/** The files that a save makes. All paths are absolute. */
export interface SaveTarget {
  /** Where device state, memory and the state of the shares' server go; absent: only disks are copied. */
  readonly machine?: { readonly state: string; readonly memory: string; readonly shares?: string }
  readonly files: ReadonlyArray<{ readonly from: string; readonly to: string }>
  /** Paths that are removed, with everything below, if the save is not committed. */
  readonly remove: ReadonlyArray<string>
}

/** A prepared save. */
export interface Saving {
  /** Stops the machine and saves it. Closing the scope lets the machine go on. */
  readonly whileStopped: Effect.Effect<void, VmmControlFailed | CaptureFailed, Scope.Scope>
  /** Keeps what was made. Fails when the machine did not go on; closing the scope of `save` then undoes everything. */
  readonly commit: Effect.Effect<void, VmmControlFailed | CaptureFailed>
}

/** What the shim needs to know beside the machine itself. */
export interface ShimOptions {
  /** The registry entry; the shim completes and maintains it. */
  readonly entry: VmEntry
  /** Copied sparsely into the VM's directory before the VMM starts. */
  readonly files: ReadonlyArray<{ readonly from: string; readonly to: string; readonly size?: number }>
  /** The program that serves the network card, and the forwarded ports of the host. */
  readonly network?: {
    readonly gvproxy: readonly [string, ...ReadonlyArray<string>]
    readonly forwards: ReadonlyArray<PortForward>
  }
  /** Paths that are removed when the VM has ended, before its entry. */
  readonly cleanup: ReadonlyArray<string>
  readonly graceMs: number
}

/** Turns a machine into a running process. Everything that differs between hypervisors is behind this tag. */
export class Vmm extends Context.Tag("machinen/Vmm")<
  Vmm,
  {
    readonly capabilities: Effect.Effect<Capabilities, BootError>
    /** The VMM's control socket for the VM in `dir`; `undefined` when the VMM has none. */
    readonly controlPath: (dir: string) => string | undefined
    /** Starts the machine under a shim. Closing the scope ends it, as for `Shim.start`. */
    readonly launch: (spec: MachineSpec, supervision: ShimOptions) => Effect.Effect<VmmHandle, BootError, Scope.Scope>
    /** The fingerprint that a machine with these devices would have on this host. */
    readonly fingerprint: (plugged: DeviceSet) => Effect.Effect<MachineFingerprint, BootError>
    /** The kernel's command line, without values that are measured on this host. */
    readonly kernelArguments: Effect.Effect<string, BootError>
    /** A handle on a VM that is already running. */
    readonly attach: <E>(entry: VmEntry, shim: ShimHandle<E>) => VmmHandle<E>
  }
>() {}
