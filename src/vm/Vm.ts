import { Effect, Option, type Stream } from "effect"
import type { BootError, RegistryError } from "../errors.ts"
import type { AgentClient } from "../guest/Agent.ts"
import type { ExitRecord } from "../machine/ShimPlan.ts"
import type { LogOptions, LogSource } from "../machine/shimControl.ts"
import type { VmEntry } from "../machine/VmEntry.ts"
import type { VmmControlFailed, VmmHandle } from "../machine/Vmm.ts"
import * as processes from "../platform/processes.ts"

/** Memory use of a VM. */
export interface MemoryStats {
  readonly ceilingMib: number
  /** Resident bytes of the VMM; null when it has ended. */
  readonly hostRssBytes: number | null
  /** Pages (of 4 KiB) of lazily restored processes that have not been read yet; 0 when the guest does not answer. */
  readonly lazyPagesPending: number
}

/**
 * A handle on a running VM. The scope that booted it ends the VM, unless it is detached. Closing a scope never ends a VM whose handle comes from
 * `Machinen.attach`.
 */
export interface Vm extends AgentClient {
  /** The registry entry, as it was when the handle was made. */
  readonly entry: VmEntry
  readonly id: string
  readonly name: string | undefined
  /** The VMM's pid. */
  readonly pid: number
  /**
   * Completes when the VM has ended and nothing of it is left on the host. Of a handle from `Machinen.attach` it fails with
   * REGISTRY_VM_UNREACHABLE when the shim does not answer but lives on; `stop` and `kill` do so too.
   */
  readonly wait: Effect.Effect<ExitRecord, RegistryError>
  /** Asks the guest to power off, and kills the VMM after the grace (default: MACHINEN_STOP_GRACE). Succeeds when the VM has ended already. */
  readonly stop: (graceMs?: number) => Effect.Effect<ExitRecord, RegistryError>
  /** Kills the VMM. Completes as `wait`, also when the VM had ended before. */
  readonly kill: Effect.Effect<ExitRecord, RegistryError>
  /**
   * Lets the VM outlive the scope and the process that booted it, from now on. Fails with BOOT_DETACHED_READINESS_FAILED when the shim does not
   * answer.
   */
  readonly detach: Effect.Effect<void, BootError>
  /** Stops the vCPUs until `resume`. Both fail with VMM_CONTROL_FAILED when the VM has ended. */
  readonly pause: Effect.Effect<void, VmmControlFailed>
  /** Lets a paused VM go on and sets the guest's clock to the host's, if the guest answers. */
  readonly resume: Effect.Effect<void, VmmControlFailed>
  /** `console`: the output of kernel and init. `output`: the output of a detached main command. Fails with REGISTRY_VM_NOT_FOUND at an ended VM. */
  readonly logs: (source: LogSource, options?: LogOptions) => Stream.Stream<Uint8Array, RegistryError>
  /** Memory use of the VM. Never fails: values that are not known are null or 0. */
  readonly memoryStats: Effect.Effect<MemoryStats>
  /** The hypervisor, which snapshots need. */
  readonly machine: VmmHandle<RegistryError>
}

export const make = (entry: VmEntry, vmm: VmmHandle<RegistryError>, agent: AgentClient): Vm => ({
  ...agent,
  entry,
  id: entry.id,
  name: entry.name,
  pid: vmm.vmm.pid,
  wait: vmm.exited,
  stop: vmm.stop,
  kill: vmm.kill,
  detach: vmm.detach,
  pause: vmm.pause,
  resume: Effect.zipLeft(vmm.resume, clockAfterStandstill(agent)),
  logs: vmm.logs,
  machine: vmm,
  memoryStats: Effect.map(
    Effect.all([
      processes.residentBytes(vmm.vmm.pid),
      entry.lazy === true ? lazyPagesPending(agent) : Effect.succeed(0)
    ]),
    ([rss, lazyPagesPending]) => ({
      ceilingMib: entry.memoryMib,
      hostRssBytes: Option.getOrNull(rss),
      lazyPagesPending
    })
  )
})

/**
 * Sets a guest's clock to the host's after a standstill, in which the guest's clock stood still too. Never fails: a guest that does not answer
 * within 2 s keeps its late time.
 */
export const clockAfterStandstill = (agent: AgentClient) =>
  agent.setClock.pipe(Effect.interruptible, Effect.timeout("2 seconds"), Effect.ignore)

/** 0 when the guest does not answer, as while it is paused. */
const lazyPagesPending = (agent: AgentClient) =>
  agent.stats.pipe(
    Effect.map((stats) => stats.lazyPagesPending),
    Effect.timeout("1 second"),
    Effect.orElseSucceed(() => 0)
  )
