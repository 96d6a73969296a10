import { Context, type Effect } from "effect"
import type { BootError } from "../errors.ts"
import type { Accelerator } from "./MachineSpec.ts"

/** The accelerator of guests on this host, and why it was chosen. */
export interface AcceleratorChoice {
  readonly accel: Accelerator
  readonly reason: string
}

/**
 * What this host can do for a VM. A host may have `/dev/kvm` and guests still hang there, so KVM counts only when our kernel has booted on it
 * once. Answers are kept until the host reboots.
 */
export class HostProbe extends Context.Tag("machinen/HostProbe")<
  HostProbe,
  {
    readonly accelerator: Effect.Effect<AcceleratorChoice, BootError>
    /** Rate of the host's time stamp counter in kHz. Under TCG the guest reads the same counter. */
    readonly tscKhz: Effect.Effect<number, BootError>
    /** The version that the VMM binary reports. */
    readonly vmmVersion: Effect.Effect<string, BootError>
  }
>() {}
