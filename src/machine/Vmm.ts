import { Context, type Effect, type Scope } from "effect"
import { type BootError, VmmControlFailed } from "../errors.ts"
import type { Accelerator, DeviceSet, MachineFingerprint, MachineSpec } from "./MachineSpec.ts"
import type { PortForward } from "./Network.ts"
import type { CaptureFailed, ShimHandle } from "./Shim.ts"
import type { VmEntry } from "./VmEntry.ts"

/** What a backend can do beyond booting; callers ask before they promise. */
export interface Capabilities {
  readonly backend: string
  readonly accel: Accelerator
  readonly maxVcpus: number
}

export { VmmControlFailed }

/** A live hypervisor, as the rest of the program sees it. */
export interface VmmHandle<E = never> extends ShimHandle<E> {
  /** Stops the vCPUs; memory and devices stay as they are. */
  readonly pause: Effect.Effect<void, VmmControlFailed>
  readonly resume: Effect.Effect<void, VmmControlFailed>
  /** Prepares to take the machine's state out. Closing the scope before `commit` leaves the machine running and no file. */
  readonly save: (target: SaveTarget) => Effect.Effect<Saving, VmmControlFailed | CaptureFailed, Scope.Scope>
}

/** Absolute paths of files that are to be made. */
export interface SaveTarget {
  /** Device state and memory; left out when only disks are wanted. */
  readonly machine?: { readonly state: string; readonly memory: string }
  readonly files: ReadonlyArray<{ readonly from: string; readonly to: string }>
  /** Removed, with everything below, if the saving is not committed. */
  readonly remove: ReadonlyArray<string>
}

export interface Saving {
  /** Stops the machine and saves it. Closing the scope lets it go on. */
  readonly whileStopped: Effect.Effect<void, VmmControlFailed | CaptureFailed, Scope.Scope>
  /** What was made stays. Fails, and leaves it to be undone, when the machine did not go on. */
  readonly commit: Effect.Effect<void, VmmControlFailed | CaptureFailed>
}

/** What the shim needs beside the machine itself. */
export interface ShimOptions {
  /** The registry entry; the shim completes and maintains it. */
  readonly entry: VmEntry
  /** Copied sparsely into the VM's directory before the VMM starts. */
  readonly files: ReadonlyArray<{ readonly from: string; readonly to: string; readonly size?: number }>
  /** Who serves the machine's network card, and the host's ports that lead to it. */
  readonly network?: {
    readonly gvproxy: readonly [string, ...ReadonlyArray<string>]
    readonly forwards: ReadonlyArray<PortForward>
  }
  /** Removed when the VM is gone, before its entry. */
  readonly cleanup: ReadonlyArray<string>
  readonly graceMs: number
}

/** Turns a machine into a running process. What differs between QEMU, Firecracker and a fake lives behind this tag. */
export class Vmm extends Context.Tag("machinen/Vmm")<
  Vmm,
  {
    readonly capabilities: Effect.Effect<Capabilities, BootError>
    /** Where the VMM of the VM in `dir` will listen for control, if it does. */
    readonly controlPath: (dir: string) => string | undefined
    /** Starts the machine under a shim. Released as `Shim.start` says. */
    readonly launch: (spec: MachineSpec, supervision: ShimOptions) => Effect.Effect<VmmHandle, BootError, Scope.Scope>
    /** What a machine made of this would be here and now. */
    readonly fingerprint: (plugged: DeviceSet) => Effect.Effect<MachineFingerprint, BootError>
    /** What a kernel it loads is told, but for what is measured on this host. */
    readonly kernelArguments: Effect.Effect<string, BootError>
    /** The hypervisor of a VM that runs already. */
    readonly attach: <E>(entry: VmEntry, shim: ShimHandle<E>) => VmmHandle<E>
  }
>() {}
