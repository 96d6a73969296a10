import { randomUUID } from "node:crypto"
import * as path from "node:path"
import { Duration, Effect, Option, Schema } from "effect"
import { BootError } from "../errors.ts"
import { Agent } from "../guest/Agent.ts"
import type { Rejuvenation } from "../guest/AgentProtocol.ts"
import { decodeName } from "../machine/BootOptions.ts"
import { type Disk, MachineSpec, VmName } from "../machine/MachineSpec.ts"
import { type LiveMount, type LiveMountOption, type Mount, overridden } from "../machine/mountOptions.ts"
import { macOf, type NetworkMode, type PortForwardOption, validateForwards } from "../machine/Network.ts"
import { Registry } from "../machine/Registry.ts"
import { type Secrets, validateSecrets } from "../machine/Secrets.ts"
import { VmEntry } from "../machine/VmEntry.ts"
import { Vmm } from "../machine/Vmm.ts"
import { checkLiveHosts, guestPathOf, linkedInto, sharesOf } from "../mount/mounts.ts"
import { given } from "../platform/given.ts"
import { Settings } from "../Settings.ts"
import * as Launch from "../vm/launch.ts"
import { newVm } from "../vm/newVm.ts"
import * as PhaseTimer from "../vm/PhaseTimer.ts"
import * as Vm from "../vm/Vm.ts"
import type { SnapshotEngine } from "./SnapshotEngine.ts"

/** Options of each machine that is started from a seed. */
export interface ReviveOptions {
  /** Default: `<source>/<pid>` of the VMM, else `<source>~<pid>`, when the source had a name. */
  readonly name?: string
  /**
   * Another host directory or mode for some of the source's live mounts, by their path in the guest. A bundle that is not this user's own needs an
   * entry for each of them.
   */
  readonly liveMounts?: ReadonlyArray<LiveMountOption>
  /** Overlays the environment that the source was booted with. */
  readonly env?: Readonly<Record<string, string>>
  /** Secrets of the copy, which has none of its source's. */
  readonly secrets?: Secrets
  /** True: the VM outlives the scope and the process that start it, once it is ready. Default false. */
  readonly detached?: boolean
  /** Forwarded ports of the copy, which has none of its source's. */
  readonly portForward?: ReadonlyArray<PortForwardOption>
  /** True: memory is read when it is touched. Default false; `vmstate` does so in any case. */
  readonly lazy?: boolean
}

/** A file of a live mount that a source had open and that its copy does not have. */
export interface LostFile {
  /** Where the guest had it; empty for a file that had no name any more. */
  readonly path: string
  /** Such as "No such file or directory". */
  readonly why: string
}

/** A restored VM that is ready. */
export interface Restored {
  readonly vm: Vm.Vm
  /** What the guest renewed before its processes went on, and what it kept. */
  readonly rejuvenation: Rejuvenation
  /** Files of live mounts that the source had open and that are gone, or others, by now: in this VM they give EIO. */
  readonly lost: ReadonlyArray<LostFile>
  readonly phases: ReadonlyMap<string, number>
}

/** What a machine is started from: a checked bundle, or the files that a fork has just made. */
export interface Seed {
  readonly engine: SnapshotEngine
  /** The directory of the engine's files. */
  readonly dir: string
  readonly disks: ReadonlyArray<Disk>
  readonly mount: Mount | undefined
  readonly liveMounts: ReadonlyArray<LiveMount>
  readonly image: string
  readonly command: ReadonlyArray<string> | undefined
  readonly kernel: string
  readonly memoryMib: number
  readonly vcpus: number
  readonly network: NetworkMode
  readonly sourceName: string | undefined
  readonly forkedFrom: string
}

/** Starts one machine from a seed, attached. Fails as a boot does, and with BOOT_REJUVENATION_FAILED. */
export const revive = Effect.fn("revive")(
  function* (seed: Seed, options: ReviveOptions) {
    const settings = yield* Settings
    const registry = yield* Registry
    const vmm = yield* Vmm
    const agent = yield* Agent
    const { phase, phases } = yield* PhaseTimer.make

    // 1. Validate.
    const portForward = yield* validateForwards(seed.network, options.portForward ?? [])
    const network = yield* Launch.networkOf(seed.network, portForward)
    const secrets = yield* validateSecrets(options.secrets ?? {})
    const name = options.name === undefined ? undefined : yield* decodeName(options.name)
    const liveMounts = yield* overridden(seed.liveMounts, options.liveMounts ?? [])
    yield* checkLiveHosts(liveMounts)
    const { dir, entry: fields, id } = yield* newVm
    const own = (disk: Disk): Disk => (disk.readOnly ? disk : { ...disk, path: path.join(dir, `${disk.id}.img`) })
    const entry = new VmEntry({
      ...fields,
      name,
      image: seed.image,
      command: seed.command,
      memoryMib: seed.memoryMib,
      vcpus: seed.vcpus,
      kernel: seed.kernel,
      disks: seed.disks.map(own),
      network: seed.network,
      portForward,
      mount: seed.mount,
      ...(liveMounts.length === 0 ? {} : { liveMounts }),
      forkedFrom: seed.forkedFrom,
      ...(options.lazy === true ? { lazy: true } : {})
    })

    // 2. Claim the VM's directory and name, and prepare its start.
    const cleanup = yield* registry.claim(entry).pipe(phase("claim"))
    const disks = yield* Effect.forEach(entry.disks ?? [], (disk) =>
      // a link of its own: the bundle may be removed, and the copy may be saved itself
      disk.id === "mountlower"
        ? Effect.map(linkedInto(disk.path, path.join(dir, `${disk.id}.img`)), (path) => ({ ...disk, path }))
        : Effect.succeed(disk)
    )
    const revival = yield* seed.engine.revive(seed.dir, { dir, entry, lazy: options.lazy ?? false })

    // 3. Launch shim and VMM, with copies of the disks.
    const files = seed.disks.flatMap((disk) => (disk.readOnly ? [] : [{ from: disk.path, to: own(disk).path }]))
    const machine = yield* vmm
      .launch(
        new MachineSpec({
          id,
          dir,
          start: revival.start,
          memoryMib: seed.memoryMib,
          vcpus: seed.vcpus,
          disks,
          shares: sharesOf(entry),
          ...Launch.cardOf(entry)
        }),
        {
          entry: new VmEntry({ ...entry, disks }),
          files,
          ...network,
          cleanup,
          graceMs: Duration.toMillis(settings.stopGrace)
        }
      )
      .pipe(Launch.namingPortHolder, phase("vmm-spawn"))

    // 4. Choose a name, if none was given: it holds the VMM's pid, which is known only now. Then give the guest its identity, before which it serves
    // nobody.
    const client = agent.client(entry.vsockPath, machine.exited)
    const giveIdentity = Effect.gen(function* () {
      const assigned =
        name === undefined && seed.sourceName !== undefined
          ? yield* registry.assign(id, childNames(seed.sourceName, machine.vmm.pid), machine.rename)
          : Option.none()
      const named = new VmEntry({
        ...entry,
        disks,
        name: name ?? Option.getOrUndefined(assigned),
        state: "running",
        shim: machine.shim,
        vmm: machine.vmm
      })
      const rejuvenation = yield* revival.ready(client, {
        hostname: Launch.hostname(named),
        generation: randomUUID(),
        ...(seed.network === "nat" ? { mac: macOf(id) } : {}),
        ...(liveMounts.length === 0
          ? {}
          : { shares: liveMounts.map(({ guest, mode }) => ({ guest, readOnly: mode === "ro" })) }),
        env: { ...given({ MACHINEN_VM_NAME: named.name }), ...options.env }
      })
      yield* Launch.sendSecrets(client, secrets)
      return { named, rejuvenation }
    })
    const { named, rejuvenation } = yield* Launch.untilReady(
      Launch.afterTheEnd(giveIdentity, machine),
      machine,
      settings.bootTimeout
    ).pipe(
      Effect.mapError((error) => (error._tag === "ExecError" ? notRejuvenated(error) : error)),
      phase("guest-ready")
    )
    const entryNow = new VmEntry({ ...named, detached: options.detached ?? false })
    yield* Effect.logDebug("restored", Object.fromEntries(phases()))
    const restored: Restored = {
      vm: Vm.make(entryNow, machine, client),
      rejuvenation,
      lost: (machine.shares?.lost ?? []).map(({ path, tag, why }) => ({ path: guestPathOf(entry, tag, path), why })),
      phases: phases()
    }
    return restored
  },
  (effect) => Launch.inOwnScope(effect),
  Effect.annotateLogs({ service: "restore" })
)

/** Names for a copy: `<source>/<pid>`, and another one in case that name is taken. */
const childNames = (source: string, pid: number) =>
  [`${source}/${pid}`, `${source}~${pid}`].flatMap((name) => Option.toArray(Schema.decodeOption(VmName)(name)))

/** Detaches VMs that are ready. If one cannot be detached, all are ended. */
export const detachAll = (restored: ReadonlyArray<Restored>) =>
  Effect.forEach(restored, ({ vm }) => vm.detach, { discard: true }).pipe(
    Effect.tapError(() => Effect.forEach(restored, ({ vm }) => Effect.ignore(vm.kill), { concurrency: "unbounded" })),
    Effect.uninterruptible
  )

const notRejuvenated = (cause: Error) =>
  new BootError({
    code: "BOOT_REJUVENATION_FAILED",
    message: `the restored guest could not be given an identity of its own, and was ended: ${cause.message}`,
    cause
  })
