import { randomUUID } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Duration, Effect, Option, Schema } from "effect"
import { BootError } from "../errors.ts"
import { Agent } from "../guest/Agent.ts"
import type { Rejuvenation } from "../guest/AgentProtocol.ts"
import { Assets } from "../host/Assets.ts"
import { RootfsImage } from "../image/RootfsImage.ts"
import { decodeName, refuseUnknown, validateMemory, validateVcpus } from "../machine/BootOptions.ts"
import { type Disk, MachineSpec, VmName } from "../machine/MachineSpec.ts"
import { type LiveMount, type LiveMountOption, type Mount, overridden } from "../machine/mountOptions.ts"
import { macOf, type NetworkMode, type PortForwardOption, validateForwards } from "../machine/Network.ts"
import { Registry } from "../machine/Registry.ts"
import { type Secrets, validateSecrets } from "../machine/Secrets.ts"
import { VmEntry } from "../machine/VmEntry.ts"
import { Vmm } from "../machine/Vmm.ts"
import { checkLiveHosts, linkedInto, sharesOf } from "../mount/mounts.ts"
import { given } from "../platform/given.ts"
import type { OptionNames } from "../platform/knownOptions.ts"
import * as memory from "../platform/memory.ts"
import * as processes from "../platform/processes.ts"
import { Settings } from "../Settings.ts"
import * as Launch from "../vm/launch.ts"
import * as PhaseTimer from "../vm/PhaseTimer.ts"
import * as Vm from "../vm/Vm.ts"
import * as Bundle from "./Bundle.ts"
import { type BundleManifest, channelVersion } from "./BundleManifest.ts"
import { FileHasher } from "./FileHasher.ts"
import { type SnapshotEngine, SnapshotEngines } from "./SnapshotEngine.ts"

export interface RestoreOptions {
  readonly snapDir: string
  /** Default: `<source>/<pid>`, else `<source>~<pid>`, when the source had a name. */
  readonly name?: string
  /** Where the read-only image lies, if it is not where it was; it must be the same. */
  readonly image?: string
  /**
   * Of the source's live mounts, by their place in the guest: another directory, or another mode. Every one of them, where the bundle is not
   * this user's own.
   */
  readonly liveMounts?: ReadonlyArray<LiveMountOption>
  /** Over the environment the source was booted with. */
  readonly env?: Readonly<Record<string, string>>
  /** A copy has none of its source's. */
  readonly secrets?: Secrets
  readonly detached?: boolean
  /** Ports of the host that lead to this VM; it has none of its source's. */
  readonly portForward?: ReadonlyArray<PortForwardOption>
  /** Memory is read when it is touched. An engine that maps the whole machine does so in any case. Default false. */
  readonly lazy?: boolean
  /**
   * As the source had it, which is the default for a bundle of this user's own; the network of another's bundle is only connected when this
   * says `nat`. An engine that saves only the processes can leave the network out (`none`).
   */
  readonly network?: NetworkMode
  /** As of a boot, in place of what the source had, where the engine saves only the processes. */
  readonly memoryMib?: number | "auto"
}

const optionNames: OptionNames<RestoreOptions> = {
  snapDir: true,
  name: true,
  image: true,
  liveMounts: true,
  env: true,
  secrets: true,
  detached: true,
  portForward: true,
  lazy: true,
  network: true,
  memoryMib: true
}

export interface Restored {
  readonly vm: Vm.Vm
  /** What the guest made new before its processes went on, and what it kept. */
  readonly rejuvenation: Rejuvenation
  readonly phases: ReadonlyMap<string, number>
}

/** What a machine is started from: a bundle that was checked, or what a fork has just made. */
export interface Seed {
  readonly engine: SnapshotEngine
  /** Holds the engine's files. */
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

/**
 * Restores a bundle into the current scope: everything about it that can be refused is refused before anything is acquired. A restore that
 * fails or is interrupted leaves nothing, though the scope goes on.
 */
export const restore = Effect.fn("restore")(function* (options: RestoreOptions) {
  const restored = yield* restoreAttached(options)
  if (options.detached === true) yield* detachAll([restored])
  return restored
})

/** A restore without its last step: the caller detaches the VM, if it is to be, when all that it starts are ready. */
export const restoreAttached = Effect.fn("restoreAttached")(function* (options: RestoreOptions) {
  yield* refuseUnknown("restore", options, optionNames)
  if (typeof options.snapDir !== "string" || options.snapDir === "") {
    return yield* invalid("no bundle was given to restore", "give `snapDir`: the directory that a snapshot made")
  }
  const bundle = yield* Bundle.read(options.snapDir)
  const engine = yield* engineOf(bundle.manifest)
  const machine = yield* machineOf(bundle.manifest, engine, options)
  yield* refuseUnasked(bundle, options)
  const [reasons, sound] = yield* Effect.all(
    [misfits(bundle, options), Effect.exit(Bundle.check(bundle, engine.blobs))],
    { concurrency: 2 }
  )
  if (reasons.length > 0) {
    return yield* new BootError({
      code: "BOOT_SNAPSHOT_MISMATCH",
      message: `this host cannot go on with the snapshot ${bundle.dir}: ${reasons.join("; ")}`,
      hint: "restore it where it was taken, or take the snapshot again here"
    })
  }
  yield* sound
  const { manifest } = bundle
  return yield* revive(
    {
      engine,
      dir: bundle.dir,
      disks: yield* disksOf(bundle, options.image),
      mount: manifest.mount,
      liveMounts: manifest.liveMounts ?? [],
      image: manifest.sourceImage,
      command: manifest.command,
      kernel: yield* (yield* Assets).kernel,
      ...machine,
      // a name after the source's is the bundle's choice, too
      sourceName: bundle.isOwn ? manifest.sourceName : undefined,
      forkedFrom: bundle.dir
    },
    options
  )
})

const invalid = (message: string, hint: string) => new BootError({ code: "BOOT_OPTION_INVALID", message, hint })

/** The machine it is restored into: a whole machine's is as it was saved, processes may get another. */
const machineOf = Effect.fnUntraced(function* (
  manifest: BundleManifest,
  { name, sameMachine }: SnapshotEngine,
  options: RestoreOptions
) {
  const { vcpus } = manifest
  const { memoryMib = manifest.memoryMib, network = manifest.network } = options
  if (!sameMachine) {
    const limits = { memoryBytes: yield* memory.totalBytes, maxVcpus: (yield* (yield* Vmm).capabilities).maxVcpus }
    return { memoryMib: yield* validateMemory(memoryMib, limits), vcpus: yield* validateVcpus(vcpus, limits), network }
  }
  if (memoryMib !== manifest.memoryMib) {
    return yield* new BootError({
      code: "BOOT_MEMORY_INVALID",
      message: `the engine ${name} saved the whole machine, which has ${manifest.memoryMib} MiB of memory and cannot be given ${memoryMib}`,
      hint: "leave the memory out; bundles of the engine criu go on in a machine of another size"
    })
  }
  if (network !== manifest.network) {
    return yield* invalid(
      `the engine ${name} saved the whole machine, whose network is "${manifest.network}" and cannot be "${network}"`,
      "restore it with the network it had, or take a snapshot of a VM that was booted otherwise"
    )
  }
  return { memoryMib: manifest.memoryMib, vcpus, network }
})

/** What the manifest records that a restore would do to this host, and by which option it is asked for. */
export interface Recorded {
  readonly effect: string
  readonly option: string
}

/** What another's bundle records and the options do not ask for. Of a bundle of this user's own everything is asked for. */
export const unasked = (
  { isOwn, manifest }: Bundle.Bundle,
  { liveMounts = [], network }: Pick<RestoreOptions, "liveMounts" | "network">
): ReadonlyArray<Recorded> => {
  if (isOwn) return []
  const asked = new Set(liveMounts.map(({ guest }) => path.posix.normalize(guest).replace(/\/+$/, "")))
  const shares = (manifest.liveMounts ?? []).filter(({ guest }) => !asked.has(guest))
  return [
    ...(manifest.network === "nat" && network === undefined
      ? [{ effect: "connect its guest to this host's network", option: "--network nat (`network`)" }]
      : []),
    ...shares.map(({ guest, host, mode }) => ({
      effect: `share this host's ${host} with its guest at ${guest} (${mode})`,
      option: `--mount-live HOST:${guest}:ro (\`liveMounts\`)`
    }))
  ]
}

const refuseUnasked = (bundle: Bundle.Bundle, options: RestoreOptions): Effect.Effect<void, BootError> => {
  const wanted = unasked(bundle, options)
  return wanted.length === 0
    ? Effect.void
    : new BootError({
        code: "BOOT_SNAPSHOT_FOREIGN",
        message: `the bundle ${bundle.dir} is not one that this user's machinen made, and its manifest would ${wanted.map(({ effect }) => effect).join("; ")}`,
        hint: `if you want that and trust its maker, ask for it: ${wanted.map(({ option }) => option).join(", ")}`
      })
}

/** Lets go of VMs that are ready: from here on they belong to nobody. All, or none that goes on. */
export const detachAll = (restored: ReadonlyArray<Restored>) =>
  Effect.forEach(restored, ({ vm }) => vm.detach, { discard: true }).pipe(
    Effect.tapError(() => Effect.forEach(restored, ({ vm }) => Effect.ignore(vm.kill), { concurrency: "unbounded" })),
    Effect.uninterruptible
  )

/** What is chosen for each machine; the rest is the seed's. */
export type ReviveOptions = Omit<RestoreOptions, "snapDir" | "image" | "network" | "memoryMib">

/** Starts one machine from a seed, attached as well. */
export const revive = Effect.fn("revive")(
  function* (seed: Seed, options: ReviveOptions) {
    const settings = yield* Settings
    const registry = yield* Registry
    const vmm = yield* Vmm
    const agent = yield* Agent
    const { phase, phases } = yield* PhaseTimer.make

    // 1. Who it will be.
    const portForward = yield* validateForwards(seed.network, options.portForward ?? [])
    const network = yield* Launch.networkOf(seed.network, portForward)
    const capabilities = yield* vmm.capabilities
    const secrets = yield* validateSecrets(options.secrets ?? {})
    const name = options.name === undefined ? undefined : yield* decodeName(options.name)
    const liveMounts = yield* overridden(seed.liveMounts, options.liveMounts ?? [])
    yield* checkLiveHosts(liveMounts)
    const id = Launch.newId()
    const dir = path.join(settings.vmsDir, id)
    const vsockPath = path.join(dir, "vsock.sock")
    yield* Launch.checkSocketPath(`${vsockPath}_65535`, settings.home)
    const controlPath = vmm.controlPath(dir)
    const own = (disk: Disk): Disk => (disk.readOnly ? disk : { ...disk, path: path.join(dir, `${disk.id}.img`) })
    const entry = new VmEntry({
      version: 1,
      id,
      name,
      state: "booting",
      bootId: yield* processes.bootId,
      owner: yield* processes.self,
      // until the guest is one of its own: a copy whose maker dies before would stand frozen for good
      detached: false,
      backend: capabilities.backend,
      accel: capabilities.accel,
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
      ...(options.lazy === true ? { lazy: true } : {}),
      createdAt: Date.now(),
      vsockPath,
      controlPath: path.join(dir, "shim.sock"),
      ...given({ vmmControlPath: controlPath })
    })

    // 2. The VM's directory and name, and how it begins.
    const cleanup = yield* registry.claim(entry).pipe(phase("claim"))
    const disks = yield* Effect.forEach(entry.disks ?? [], (disk) =>
      // the bundle may be removed, and the copy be captured itself
      disk.id === "mountlower"
        ? Effect.map(linkedInto(disk.path, path.join(dir, `${disk.id}.img`)), (path) => ({ ...disk, path }))
        : Effect.succeed(disk)
    )
    const revival = yield* seed.engine.revive(seed.dir, { dir, entry, lazy: options.lazy ?? false })

    // 3. Shim and VMM, with disks of its own.
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

    // 4. The name it gets if it was given none: its pid is known only now. Then the guest becomes one of its own; it serves nobody before.
    const client = agent.client(vsockPath, machine.exited)
    const becoming = Effect.gen(function* () {
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
        env: { ...given({ MACHINEN_VM_NAME: named.name }), ...options.env }
      })
      yield* Launch.sendSecrets(client, secrets)
      return { named, rejuvenation }
    })
    const { named, rejuvenation } = yield* Launch.untilReady(
      Launch.afterTheEnd(becoming, machine),
      machine,
      settings.bootTimeout
    ).pipe(
      Effect.mapError((error) => (error._tag === "ExecError" ? notRejuvenated(error) : error)),
      phase("guest-ready")
    )
    const entryNow = new VmEntry({ ...named, detached: options.detached ?? false })
    yield* Effect.logDebug("restored", Object.fromEntries(phases()))
    const restored: Restored = { vm: Vm.make(entryNow, machine, client), rejuvenation, phases: phases() }
    return restored
  },
  (effect) => Launch.inOwnScope(effect),
  Effect.annotateLogs({ service: "restore" })
)

/** `<source>/<pid>`, and another for the case that it is taken. */
const childNames = (source: string, pid: number) =>
  [`${source}/${pid}`, `${source}~${pid}`].flatMap((name) => Option.toArray(Schema.decodeOption(VmName)(name)))

const engineOf = Effect.fnUntraced(function* ({ engine: name }: BundleManifest) {
  const engines = yield* SnapshotEngines
  const engine = engines.get(name)
  if (engine !== undefined) return engine
  return yield* new BootError({
    code: "BOOT_SNAPSHOT_ENGINE_INVALID",
    message: `the snapshot was taken with the engine "${name}", which is not part of this build`,
    hint: `there is: ${[...engines.keys()].join(", ")}`
  })
})

/** The machine's disks as they lie in the bundle and on this host. */
const disksOf = Effect.fnUntraced(function* ({ dir, manifest }: Bundle.Bundle, image: string | undefined) {
  const images = yield* RootfsImage
  return yield* Effect.forEach(manifest.disks, ({ id, source }) =>
    Effect.gen(function* () {
      if (source._tag === "Blob") {
        return { id, path: path.join(dir, source.name), readOnly: source.readOnly ?? false }
      }
      return { id, path: image === undefined ? source.path : yield* images.resolve(image), readOnly: true }
    })
  )
})

/** Everything about this host that a snapshot cannot go on with; empty when it can. */
export const misfits = Effect.fn("restore.misfits")(function* (
  bundle: Bundle.Bundle,
  options: { readonly image?: string }
) {
  const { manifest } = bundle
  const { sameMachine } = yield* engineOf(manifest)
  const digests = yield* FileHasher
  const fs = yield* FileSystem.FileSystem
  const vmm = yield* Vmm
  const assets = yield* Assets
  const disks = yield* disksOf(bundle, options.image)
  const here = yield* vmm.fingerprint({
    disks,
    network: manifest.network === "nat",
    shares: (manifest.liveMounts ?? []).length > 0
  })
  const there = manifest.machine
  const reasons: Array<string> = []
  const differ = (what: string, made: string | number, have: string | number) => {
    if (made !== have) reasons.push(`${what} was ${made}, here it is ${have}`)
  }
  differ("the accelerator", there.accel, here.accel)
  differ("the CPU model", there.cpu, here.cpu)
  if (sameMachine) {
    differ("the backend", there.backend, here.backend)
    differ("the VMM's version", there.vmmVersion, here.vmmVersion)
    differ("the machine type", there.machine, here.machine)
    differ("the list of devices", there.devices.join(" "), here.devices.join(" "))
    differ("the version of the guest's channel", manifest.channel, channelVersion)
  }
  // measured, not stated: two measurements of one host differ by a little
  if (sameMachine && Math.abs(there.tscKhz - here.tscKhz) > here.tscKhz / 100)
    differ("the TSC rate in kHz", there.tscKhz, here.tscKhz)
  const kernel = yield* Effect.orElseSucceed(digests.remembered(yield* assets.kernel), () => "")
  if (kernel !== manifest.kernelSha256) reasons.push("it was taken with another guest kernel")
  const { maxVcpus } = yield* vmm.capabilities
  if (manifest.vcpus > maxVcpus) reasons.push(`it has ${manifest.vcpus} vCPUs, here a VM has at most ${maxVcpus}`)
  const saved = manifest.blobs.find(({ name }) => name === "memory")
  if (saved !== undefined && saved.sizeBytes !== manifest.memoryMib * 2 ** 20) {
    reasons.push(`its memory has ${saved.sizeBytes} bytes, the machine ${manifest.memoryMib} MiB`)
  }
  for (const [i, { id, source }] of manifest.disks.entries()) {
    const file = disks[i]?.path ?? ""
    if (source._tag === "Blob") continue
    const isFile = Effect.filterOrFail(fs.stat(file), ({ type }) => type === "File")
    const found = yield* Effect.option(Effect.zipRight(isFile, digests.remembered(file)))
    if (Option.isNone(found)) reasons.push(`the image of its disk "${id}" is gone: ${file}`)
    else if (found.value !== source.sha256) reasons.push(`the image of its disk "${id}" is another one: ${file}`)
  }
  return reasons
})

const notRejuvenated = (cause: Error) =>
  new BootError({
    code: "BOOT_REJUVENATION_FAILED",
    message: `the restored guest could not be given an identity of its own, and was ended: ${cause.message}`,
    cause
  })
