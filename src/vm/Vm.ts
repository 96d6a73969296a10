import { Effect, Option, type Stream } from "effect"
import type { BootError, RegistryError } from "../errors.ts"
import type { AgentClient } from "../guest/Agent.ts"
import type { ExitRecord } from "../machine/ShimPlan.ts"
import type { LogOptions, LogSource } from "../machine/shimControl.ts"
import type { VmEntry } from "../machine/VmEntry.ts"
import type { VmmControlFailed, VmmHandle } from "../machine/Vmm.ts"
import * as processes from "../platform/processes.ts"

/** What a VM costs. */
export interface MemoryStats {
  readonly ceilingMib: number
  /** The VMM's resident memory, or null when it is gone. */
  readonly hostRssBytes: number | null
  /** Pages (of 4 KiB) of restored processes that are to be read when they are touched; 0 for a guest that does not answer. */
  readonly lazyPagesPending: number
}

/** A running VM. Whoever booted it owns it through their scope; whoever attached to it does not. */
export interface Vm extends AgentClient {
  readonly entry: VmEntry
  readonly id: string
  readonly name: string | undefined
  /** The VMM's pid. */
  readonly pid: number
  /** Completes when the VM is gone and nothing of it is left on the host. */
  readonly wait: Effect.Effect<ExitRecord, RegistryError>
  /** Powers off in order, or by force after the grace; a VM that is gone already is fine. */
  readonly stop: (graceMs?: number) => Effect.Effect<ExitRecord, RegistryError>
  readonly kill: Effect.Effect<ExitRecord, RegistryError>
  /** Lets the VM outlive the scope and the process that booted it. */
  readonly detach: Effect.Effect<void, BootError>
  readonly pause: Effect.Effect<void, VmmControlFailed>
  /** The guest's clock is set to the host's, if the guest answers. */
  readonly resume: Effect.Effect<void, VmmControlFailed>
  /** `console`: what the kernel and init printed. `output`: what a detached main command printed. */
  readonly logs: (source: LogSource, options?: LogOptions) => Stream.Stream<Uint8Array, RegistryError>
  readonly memoryStats: Effect.Effect<MemoryStats>
  /** The hypervisor, for those who save the machine. */
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
 * Gives a guest that goes on after a standstill the host's time. Its machine's clock stood still too. A guest that does not answer keeps the
 * time it has: it goes on all the same.
 */
export const clockAfterStandstill = (agent: AgentClient) =>
  agent.setClock.pipe(Effect.interruptible, Effect.timeout("2 seconds"), Effect.ignore)

/** A guest that is paused says nothing. */
const lazyPagesPending = (agent: AgentClient) =>
  agent.stats.pipe(
    Effect.map((stats) => stats.lazyPagesPending),
    Effect.timeout("1 second"),
    Effect.orElseSucceed(() => 0)
  )
