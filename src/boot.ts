import * as path from "node:path"
import { Duration, Effect } from "effect"
import { Agent } from "./Agent.ts"
import { Assets } from "./Assets.ts"
import { type BootOptions, type BootPlan, validate } from "./domain/BootOptions.ts"
import { BootError, type ExecError, type SecretsError } from "./domain/errors.ts"
import { applied } from "./domain/ImageConfig.ts"
import { guestNetwork } from "./domain/Network.ts"
import { reveal } from "./domain/Secrets.ts"
import { type Disk, MachineSpec } from "./domain/Vm.ts"
import { VmEntry } from "./domain/VmEntry.ts"
import type * as Initramfs from "./Initramfs.ts"
import * as Launch from "./launch.ts"
import { checkHosts, guestMounts, mountDisks, sharesOf } from "./mounts.ts"
import * as PhaseTimer from "./PhaseTimer.ts"
import * as memory from "./platform/memory.ts"
import * as processes from "./platform/processes.ts"
import { Registry } from "./Registry.ts"
import { RootfsImage } from "./RootfsImage.ts"
import { Settings } from "./Settings.ts"
import * as Vm from "./Vm.ts"
import { Vmm } from "./Vmm.ts"

export interface Booted {
  readonly vm: Vm.Vm
  /** The main command's or the image's wish, still to be started by who wants its output. */
  readonly command: BootPlan["command"]
  /** Where the time went, milliseconds by phase. */
  readonly phases: ReadonlyMap<string, number>
}

/**
 * Boots a VM into the current scope; the steps are those of ARCHITECTURE.md. Closing the scope releases them last first, whether the boot
 * finished, failed half-way or was interrupted. A detached VM is left running once it is ready.
 */
export const boot = Effect.fn("boot")(
  function* (options: BootOptions) {
    const settings = yield* Settings
    const registry = yield* Registry
    const images = yield* RootfsImage
    const assets = yield* Assets
    const vmm = yield* Vmm
    const agent = yield* Agent
    const { phase, phases } = yield* PhaseTimer.make

    // 1. Check everything that can be refused. Nothing has been acquired yet.
    const capabilities = yield* vmm.capabilities
    const asked = yield* validate(options, {
      memoryBytes: yield* memory.totalBytes,
      maxVcpus: capabilities.maxVcpus
    }).pipe(
      Effect.tap(({ mounts }) => checkHosts(mounts)),
      phase("validate")
    )
    const network = yield* Launch.networkOf(asked.network, asked.portForward)
    const secrets = yield* reveal(options.secrets ?? {})
    const id = Launch.newId()
    const dir = path.join(settings.vmsDir, id)
    const vsockPath = path.join(dir, "vsock.sock")
    yield* Launch.checkSocketPath(`${vsockPath}_65535`, settings.home)
    const controlPath = vmm.controlPath(dir)
    const entry = new VmEntry({
      version: 1,
      id,
      name: asked.name,
      state: "booting",
      bootId: yield* processes.bootId,
      owner: yield* processes.self,
      detached: asked.detached,
      backend: capabilities.backend,
      accel: capabilities.accel,
      image: asked.rootDisk ?? asked.image,
      command: asked.command,
      memoryMib: asked.memoryMib,
      vcpus: asked.vcpus,
      network: asked.network,
      portForward: asked.portForward,
      mount: asked.mounts.mount,
      ...(asked.mounts.liveMounts.length === 0 ? {} : { liveMounts: asked.mounts.liveMounts }),
      createdAt: Date.now(),
      vsockPath,
      controlPath: path.join(dir, "shim.sock"),
      ...(controlPath === undefined ? {} : { vmmControlPath: controlPath })
    })

    // 2. The VM's directory and name.
    const cleanup = yield* registry.claim(entry).pipe(phase("claim"))

    // 3. What the machine is made of, and a place for the guest to ring.
    const [{ plan, ...root }, mounted] = yield* Effect.all(
      [
        rootDisks(asked, dir, images).pipe(phase("rootdisk-materialize")),
        asked.mounts.mount === undefined
          ? noDisks
          : mountDisks(asked.mounts.mount, asked.mounts.mountUpperBytes, dir).pipe(phase("mountdisk-materialize"))
      ],
      { concurrency: 2 }
    )
    const [kernel, initrd, doorbell] = yield* Effect.all(
      [
        assets.kernel,
        Launch.writeInitramfs(dir, guestOf(plan, entry)).pipe(phase("initramfs-pack")),
        agent.doorbell(vsockPath)
      ],
      { concurrency: "unbounded" }
    )

    // 4. Shim and VMM. From here on the shim answers for everything in the directory.
    const disks = [...root.disks, ...mounted.disks]
    const complete = new VmEntry({ ...entry, command: plan.command, kernel, disks })
    const machine = yield* vmm
      .launch(
        new MachineSpec({
          id,
          dir,
          start: { _tag: "Kernel", kernel, initrd },
          memoryMib: plan.memoryMib,
          vcpus: plan.vcpus,
          disks,
          shares: sharesOf(entry),
          ...Launch.cardOf(entry)
        }),
        {
          entry: complete,
          files: [...root.files, ...mounted.files],
          ...network,
          cleanup,
          graceMs: Duration.toMillis(settings.stopGrace)
        }
      )
      .pipe(Launch.namingPortHolder, phase("vmm-spawn"))

    // 5. The doorbell, raced against the machine's end and the deadline; what only the guest may know follows at once.
    const client = agent.client(vsockPath)
    const ready = Effect.zipRight(doorbell, Launch.entrust(client, secrets))
    yield* Launch.untilReady(ready, machine, settings.bootTimeout).pipe(
      Effect.mapError((error) => (plan.detached ? notReadyDetached(error) : error)),
      phase("guest-ready")
    )

    const vm = Vm.make(
      new VmEntry({ ...complete, state: "running", shim: machine.shim, vmm: machine.vmm }),
      machine,
      client
    )
    yield* Effect.logDebug("booted", Object.fromEntries(phases()))
    const booted: Booted = { vm, command: plan.command, phases: phases() }
    return booted
  },
  Effect.annotateLogs({ service: "boot" })
)

const noDisks = Effect.succeed({ disks: [], files: [] })

/** The disks of the guest's root, what has to be copied into the VM's directory for them, and the plan with what the image says. */
const rootDisks = Effect.fnUntraced(function* (plan: BootPlan, dir: string, images: RootfsImage["Type"]) {
  if (plan.rootDisk !== undefined) {
    const disk: Disk = { id: "root", path: yield* images.checkDisk(plan.rootDisk), readOnly: false }
    return { plan, disks: [disk], files: [] }
  }
  const [base, template] = yield* Effect.all(
    [images.resolve(plan.image), images.upperTemplate(plan.rootDiskSizeBytes)],
    {
      concurrency: 2
    }
  )
  const upper = path.join(dir, "upper.img")
  const disks: ReadonlyArray<Disk> = [
    { id: "root", path: base, readOnly: true },
    { id: "upper", path: upper, readOnly: false }
  ]
  return { plan: yield* applied(plan, yield* images.config(base)), disks, files: [{ from: template, to: upper }] }
})

/** What the guest is told. */
const guestOf = (plan: BootPlan, entry: VmEntry): Initramfs.GuestConfig => ({
  config: {
    ...(plan.command === undefined ? {} : { cmd: plan.command }),
    env: { ...(entry.name === undefined ? {} : { MACHINEN_VM_NAME: entry.name }), ...plan.env },
    ...(plan.cwd === undefined ? {} : { cwd: plan.cwd }),
    ...(plan.user === undefined ? {} : { user: plan.user })
  },
  boot: {
    version: 1,
    id: entry.id,
    hostname: Launch.hostname(entry),
    root: plan.rootDisk === undefined ? "overlay" : "disk",
    ...(plan.network === "nat" ? { network: guestNetwork } : {}),
    ...guestMounts(entry)
  }
})

const notReadyDetached = (error: BootError | ExecError | SecretsError) =>
  new BootError({
    code: "BOOT_DETACHED_READINESS_FAILED",
    message: `the detached VM did not become ready: ${error.message}`,
    ...(error.hint === undefined ? {} : { hint: error.hint }),
    ...(error.console === undefined ? {} : { console: error.console }),
    cause: error
  })
