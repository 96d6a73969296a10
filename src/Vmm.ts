import { Context, type Effect, Schema, type Scope } from "effect"
import type { BootError } from "./domain/errors.ts"
import type { Accelerator, MachineSpec } from "./domain/Vm.ts"
import type { VmEntry } from "./domain/VmEntry.ts"
import type { ShimHandle } from "./Shim.ts"

/** What a backend can do beyond booting; callers ask before they promise. */
export interface Capabilities {
  readonly backend: string
  readonly accel: Accelerator
  readonly maxVcpus: number
}

/** The hypervisor refused, or cannot be reached, on its own control socket. */
export class VmmControlFailed extends Schema.TaggedError<VmmControlFailed>()("VmmControlFailed", {
  message: Schema.String,
  cause: Schema.optional(Schema.Defect)
}) {}

/** A live hypervisor, as the rest of the program sees it. */
export interface VmmHandle extends ShimHandle {
  /** Stops the vCPUs; memory and devices stay as they are. */
  readonly pause: Effect.Effect<void, VmmControlFailed>
  readonly resume: Effect.Effect<void, VmmControlFailed>
}

/** What the shim needs beside the machine itself. */
export interface Supervision {
  /** The registry entry; the shim completes and maintains it. */
  readonly entry: VmEntry
  /** Copied sparsely into the VM's directory before the VMM starts. */
  readonly files: ReadonlyArray<{ readonly from: string; readonly to: string; readonly size?: number }>
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
    readonly launch: (spec: MachineSpec, supervision: Supervision) => Effect.Effect<VmmHandle, BootError, Scope.Scope>
    /** The hypervisor of a VM that runs already. */
    readonly attach: (entry: VmEntry, shim: ShimHandle) => VmmHandle
  }
>() {}
