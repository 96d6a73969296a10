import { Context, type Effect } from "effect"
import type { BootError } from "../errors.ts"
import type { Accelerator } from "./MachineSpec.ts"

/** Which accelerator guests get here, and why that one. */
export interface AcceleratorChoice {
  readonly accel: Accelerator
  readonly reason: string
}

/**
 * What this host can do for a VM. `/dev/kvm` alone proves nothing: there are hosts where it exists and a guest hangs, so KVM counts only
 * when our kernel booted on it once. Answers are kept for the host's boot.
 */
export class HostProbe extends Context.Tag("machinen/HostProbe")<
  HostProbe,
  {
    readonly accelerator: Effect.Effect<AcceleratorChoice, BootError>
    /** Rate of the time stamp counter in kHz; under TCG it is the guest's as well. */
    readonly tscKhz: Effect.Effect<number, BootError>
    /** What the VMM says its version is. */
    readonly vmmVersion: Effect.Effect<string, BootError>
  }
>() {}
