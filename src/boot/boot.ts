import { randomUUID } from "node:crypto"
import * as path from "node:path"
import { Data, Duration, Effect, Option } from "effect"
import { BootError, type ExecError, type SecretsError } from "../errors.ts"
import { Agent, type AgentClient } from "../guest/Agent.ts"
import type * as Initramfs from "../guest/Initramfs.ts"
import { Assets } from "../host/Assets.ts"
import { withImageDefaults } from "../image/ImageConfig.ts"
import { RootfsImage } from "../image/RootfsImage.ts"
import { type BootOptions, type BootPlan, validate } from "../machine/BootOptions.ts"
import { type Disk, MachineSpec, type Start } from "../machine/MachineSpec.ts"
import { guestNetwork, macOf } from "../machine/Network.ts"
import { Registry } from "../machine/Registry.ts"
import { type Secrets, validateSecrets } from "../machine/Secrets.ts"
import { VmEntry } from "../machine/VmEntry.ts"
import { Vmm, type VmmHandle } from "../machine/Vmm.ts"
import { checkHosts, guestMounts, mountDisks, sharesOf } from "../mount/mounts.ts"
import { given } from "../platform/given.ts"
import * as memory from "../platform/memory.ts"
import { Settings } from "../Settings.ts"
import * as Launch from "../vm/launch.ts"
import { newVm } from "../vm/newVm.ts"
import * as PhaseTimer from "../vm/PhaseTimer.ts"
import * as Vm from "../vm/Vm.ts"
import * as templates from "./templates.ts"

/** A VM that is ready. */
export interface Booted {
  readonly vm: Vm.Vm
  /** The command to run: the caller's, else the image's. `vm.startMain` starts it, so that no output is lost. */
  readonly command: BootPlan["command"]
  /** Milliseconds by phase. */
  readonly phases: ReadonlyMap<string, number>
}

/** Validates every option. Acquires nothing. */
export const check = Effect.fn("boot.check")(function* (options: BootOptions) {
  const vmm = yield* Vmm
  const plan = yield* validate(options, {
    memoryBytes: yield* memory.totalBytes,
    maxVcpus: (yield* vmm.capabilities).maxVcpus
  })
  yield* checkHosts(plan.mounts)
  return plan
})

/**
 * Boots a VM into the current scope; the steps are those of ARCHITECTURE.md. Closing the scope ends the VM and releases everything, the last
 * step first. A boot that fails or is interrupted releases everything at once. Every VM is launched attached; a VM that is to be detached is
 * detached when it is ready.
 */
export const boot = Effect.fn("boot")(
  function* (options: BootOptions) {
    const settings = yield* Settings
    const timer = yield* PhaseTimer.make

    // 1. Validate. Nothing has been acquired yet.
    const plan = yield* check(options).pipe(timer.phase("validate"))
    const secrets = yield* validateSecrets(options.secrets ?? {})
    if (!plan.prepared || settings.prepared === "off" || !templates.canBePrepared(plan)) {
      return yield* withKernel(plan, secrets, timer)
    }
    // the scope releases what a failed start from a template has acquired, before a kernel is booted
    return yield* Launch.inOwnScope(start(plan, secrets, timer, true)).pipe(
      Effect.catchTag("TemplateFailed", ({ cause }) =>
        Effect.zipRight(
          Effect.logDebug("the template cannot be used, a kernel is booted", cause),
          Effect.flatMap(PhaseTimer.make, (again) => withKernel(plan, secrets, again))
        )
      )
    )
  },
  Effect.annotateLogs({ service: "boot" })
)

/** A machine that was started from a template did not become ready. */
class TemplateFailed extends Data.TaggedError("TemplateFailed")<{ readonly cause: Error }> {}

const withKernel = (plan: BootPlan, secrets: Secrets, timer: PhaseTimer.PhaseTimer) =>
  Effect.catchTag(Launch.inOwnScope(start(plan, secrets, timer, false)), "TemplateFailed", ({ cause }) =>
    Effect.die(cause)
  )

const start = Effect.fnUntraced(function* (
  asked: BootPlan,
  secrets: Secrets,
  { phase, phases }: PhaseTimer.PhaseTimer,
  prepared: boolean
) {
  const settings = yield* Settings
  const registry = yield* Registry
  const images = yield* RootfsImage
  const assets = yield* Assets
  const vmm = yield* Vmm
  const agent = yield* Agent
  const network = yield* Launch.networkOf(asked.network, asked.portForward)
  const { dir, entry: fields, id } = yield* newVm
  const entry = new VmEntry({
    ...fields,
    name: asked.name,
    image: asked.rootDisk ?? asked.image,
    command: asked.command,
    memoryMib: asked.memoryMib,
    vcpus: asked.vcpus,
    network: asked.network,
    portForward: asked.portForward,
    mount: asked.mounts.mount,
    ...(asked.mounts.liveMounts.length === 0 ? {} : { liveMounts: asked.mounts.liveMounts })
  })

  // 2. Claim the VM's directory and name.
  const cleanup = yield* registry.claim(entry).pipe(phase("claim"))

  // 3. Prepare the disks, and the start by a kernel or from a template.
  const [{ plan, template, ...root }, mounted] = yield* Effect.all(
    [
      rootDisks(asked, dir, images, prepared).pipe(phase("rootdisk-materialize")),
      asked.mounts.mount === undefined
        ? noDisks
        : mountDisks(asked.mounts.mount, asked.mounts.mountUpperBytes, dir).pipe(phase("mountdisk-materialize"))
    ],
    { concurrency: 2 }
  )
  const kernel = yield* assets.kernel
  const disks = [...root.disks, ...mounted.disks]
  const complete = new VmEntry({
    ...entry,
    command: plan.command,
    kernel,
    disks,
    ...(template === undefined ? {} : { prepared: true })
  })
  const guest = guestOf(plan, complete)
  const startMethod =
    template === undefined
      ? yield* fromKernel(kernel, entry.vsockPath, Launch.writeInitramfs(dir, guest).pipe(phase("initramfs-pack")))
      : yield* fromTemplate(template, dir, complete, guest)

  // 4. Launch shim and VMM. From here on the shim owns everything in the directory.
  const machine = yield* vmm
    .launch(
      new MachineSpec({
        id,
        dir,
        start: startMethod.start,
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
    .pipe(
      Launch.namingPortHolder,
      phase("vmm-spawn"),
      Effect.mapError((error) =>
        template === undefined || hostFaults.has(error.code) ? error : asTemplateFailure(error)
      )
    )

  // 5. Wait until the guest is ready, raced against the machine's end and the deadline. Then send the secrets, which no file may hold.
  const client = agent.client(entry.vsockPath, machine.exited)
  const ready = Effect.zipRight(startMethod.ready(client), Launch.sendSecrets(client, secrets))
  yield* Launch.untilReady(
    template === undefined ? ready : Launch.afterTheEnd(ready, machine),
    machine,
    template === undefined ? settings.bootTimeout : Duration.times(settings.bootTimeout, templateShare)
  ).pipe(
    Effect.catchAll((error) =>
      Effect.gen(function* () {
        if (template !== undefined && (yield* isTemplateFault(error, machine))) return yield* asTemplateFailure(error)
        return yield* plan.detached ? notReadyDetached(error) : error
      })
    ),
    phase("guest-ready")
  )
  if (plan.detached) yield* Effect.uninterruptible(machine.detach)

  const vm = Vm.make(
    new VmEntry({ ...complete, detached: plan.detached, state: "running", shim: machine.shim, vmm: machine.vmm }),
    machine,
    client
  )
  yield* Effect.logDebug(template === undefined ? "booted" : "booted from a template", Object.fromEntries(phases()))
  const booted: Booted = { vm, command: plan.command, phases: phases() }
  return booted
})

const asTemplateFailure = (cause: Error) => new TemplateFailed({ cause })

/** Errors that are not the template's fault: a kernel boot would fail the same way. */
const hostFaults: ReadonlySet<string> = new Set([
  "BOOT_NO_SPACE",
  "BOOT_VMM_MISSING",
  "BOOT_PORT_FORWARD_IN_USE",
  "BOOT_PORT_FORWARD_INVALID"
] satisfies ReadonlyArray<BootError["code"]>)

/**
 * The part of the boot's time limit that a start from a template gets. Such a guest answers in a fraction of a kernel's time. If it is silent for
 * so long, it hangs; then a kernel is booted with the whole time limit.
 */
const templateShare = 0.5

/** Whether a failed start is the template's fault: the guest refused or hung, or the machine ended though nothing outside ended it. */
const isTemplateFault = (error: BootError | ExecError | SecretsError, machine: VmmHandle) =>
  error._tag === "ExecError" || error.code === "BOOT_READY_TIMEOUT"
    ? Effect.succeed(true)
    : Effect.map(machine.exited, ({ reason, vmm }) => reason === "vmm" && !externalKillSignals.has(vmm.signal))

/** SIGKILL and SIGTERM come from outside: the template is not to blame. */
const externalKillSignals: ReadonlySet<number | null> = new Set([9, 15])

/** How a machine starts, and when its guest is ready. */
interface StartMethod {
  readonly start: Start
  readonly ready: (client: AgentClient) => Effect.Effect<unknown, BootError | ExecError>
}

/** Starts with a kernel, and listens for the guest's doorbell. */
const fromKernel = Effect.fnUntraced(function* (
  kernel: string,
  vsockPath: string,
  initramfs: ReturnType<typeof Launch.writeInitramfs>
) {
  const [initrd, doorbell] = yield* Effect.all([initramfs, (yield* Agent).doorbell(vsockPath)], { concurrency: 2 })
  const startMethod: StartMethod = { start: { _tag: "Kernel", kernel, initrd }, ready: () => doorbell }
  return startMethod
})

/** Starts from a template, then sends the guest the configuration that the initramfs carries in a kernel boot. */
const fromTemplate = Effect.fnUntraced(function* (
  { bundle, engine }: templates.Template,
  dir: string,
  entry: VmEntry,
  { boot, config }: Initramfs.GuestConfig
) {
  const revival = yield* engine.revive(bundle.dir, { dir, entry, lazy: false })
  const startMethod: StartMethod = {
    start: revival.start,
    ready: (client) =>
      revival.ready(client, {
        hostname: boot.hostname,
        generation: randomUUID(),
        ...(entry.network === "nat" ? { mac: macOf(entry.id) } : {}),
        env: {},
        config
      })
  }
  return startMethod
})

const noDisks = Effect.succeed({ disks: [], files: [] })

/**
 * The disks of the guest's root, the files that the shim copies into the VM's directory for them, the plan with the image's defaults, and the
 * template that fits, if there is one.
 */
const rootDisks = Effect.fnUntraced(function* (
  plan: BootPlan,
  dir: string,
  images: RootfsImage["Type"],
  prepared: boolean
) {
  if (plan.rootDisk !== undefined) {
    const disk: Disk = { id: "root", path: yield* images.checkDisk(plan.rootDisk), readOnly: false }
    return { plan, disks: [disk], files: [], template: undefined }
  }
  const [base, empty] = yield* Effect.all([images.resolve(plan.image), images.upperTemplate(plan.rootDiskSizeBytes)], {
    concurrency: 2
  })
  const [found, config] = yield* Effect.all(
    [prepared ? templates.find(plan, base) : Effect.succeedNone, images.config(base)],
    { concurrency: 2 }
  )
  const template = Option.getOrUndefined(found)
  const upper = path.join(dir, "upper.img")
  const disks: ReadonlyArray<Disk> = [
    { id: "root", path: base, readOnly: true },
    { id: "upper", path: upper, readOnly: false }
  ]
  return {
    plan: yield* withImageDefaults(plan, config),
    disks,
    files: [{ from: template?.upper ?? empty, to: upper }],
    template
  }
})

/** The guest's configuration. */
const guestOf = (plan: BootPlan, entry: VmEntry): Initramfs.GuestConfig => ({
  config: {
    ...given({ cmd: plan.command }),
    env: { ...given({ MACHINEN_VM_NAME: entry.name }), ...plan.env },
    ...(plan.cwd === undefined ? {} : { cwd: plan.cwd, makeCwd: plan.makeCwd }),
    ...given({ user: plan.user })
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

/** The error of a VM that was to be detached and did not become ready. It is retryable when its cause is. */
export const notReadyDetached = (error: BootError | ExecError | SecretsError) =>
  new BootError({
    code: "BOOT_DETACHED_READINESS_FAILED",
    message: `the detached VM did not become ready: ${error.message}`,
    ...given({ hint: error.hint, console: error.console }),
    cause: error
  })
