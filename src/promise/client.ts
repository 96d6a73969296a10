import { Duration, Effect, type Layer } from "effect"
import { notReadyDetached } from "../boot/boot.ts"
import { BootError, RegistryError } from "../errors.ts"
import { baseNames } from "../image/RootfsImage.ts"
import { Machinen } from "../Machinen.ts"
import type { Disk } from "../machine/MachineSpec.ts"
import type { VmEntry } from "../machine/VmEntry.ts"
import { given } from "../platform/given.ts"
import { logger, phaseEvent } from "./logEvents.ts"
import { bootOptions, gcOptions, provisionOptions, refuseOthers, restoreOptions } from "./options.ts"
import * as Services from "./services.ts"
import type { BootOptions, Client, RegistryEntry } from "./types.ts"
import * as VmControl from "./VmControl.ts"
import * as vmHandle from "./vmHandle.ts"

const defaultWaitMs = 60_000

/** Makes the API on these services. */
export const make = <E>(layer: Layer.Layer<Machinen, E>): Client => {
  const services = Services.share(layer)
  const { run } = services
  const { begin, toHandle } = vmHandle.make(services)

  return {
    boot: (options = {}) =>
      begin(
        Effect.gen(function* () {
          yield* refuseOthers("boot", options, bootOptions)
          yield* checkCommand(options)
          const { liveMounts, mount, mountDiskUpperSizeBytes } = options
          const { cmd, detached, env, guestCwd, image, name, network, portForward, rootDisk } = options
          const { rootDiskSizeBytes, timeoutMs, vcpus } = options
          const machinen = yield* Machinen
          const boot = machinen.boot(
            given({
              image,
              rootDisk: rootDisk === true ? undefined : rootDisk,
              command: cmd,
              env,
              cwd: guestCwd,
              name,
              memoryMib: options.memory,
              vcpus,
              rootDiskSizeBytes,
              network,
              portForward,
              mount,
              mountDiskUpperSizeBytes,
              liveMounts
            })
          )
          const named = detached === true ? Effect.mapError(boot, asDetached) : boot
          const limited =
            detached === true && timeoutMs != null ? Effect.timeoutFail(named, notReady(timeoutMs)) : named
          const [elapsed, { command, phases, vm }] = yield* Effect.timed(limited)
          yield* logger(options.onLog)(phaseEvent("boot", phases, Duration.toMillis(elapsed)))
          if (command === undefined && image !== undefined) return yield* nothingToRun(image)
          return { vm, main: command !== undefined }
        }),
        options,
        options.timeoutMs === undefined ? defaultWaitMs : options.timeoutMs
      ),
    provision: (options) =>
      run(
        Effect.gen(function* () {
          yield* refuseOthers("provision", options, provisionOptions)
          const { base, cmd, env, onLog, out, scratchDiskSizeBytes, timeoutMs } = options
          const [first, ...rest] = cmd ?? []
          const log = logger(onLog)
          const machinen = yield* Machinen
          const { elapsedMs, imagePath, phases, sizeBytes } = yield* machinen.provision({
            ...given({ base, timeoutMs, maxImageBytes: scratchDiskSizeBytes }),
            out,
            config: given({ cmd: first === undefined ? undefined : ([first, ...rest] as const), env }),
            install: (vm) =>
              Effect.tryPromise({
                try: () => options.install(toHandle(VmControl.attachedControl(vm), log, null)),
                catch: (cause) => cause
              })
          })
          yield* log(phaseEvent("provision", phases, elapsedMs))
          return { imagePath, sizeBytes, elapsedMs }
        }),
        options.signal
      ),
    attach: async ({ name, onLog, pid, ...others }) => {
      const vm = await run(
        Effect.gen(function* () {
          yield* refuseOthers("attach", others, {})
          if ((name === undefined) === (pid === undefined)) return yield* attachTargetInvalid()
          return yield* (yield* Machinen).attach(name ?? String(pid))
        })
      )
      return toHandle(VmControl.attachedControl(vm), logger(onLog), null)
    },
    list: () =>
      run(Effect.flatMap(Machinen, ({ list }) => Effect.map(list, (entries) => entries.flatMap(toRegistryEntries)))),
    runGc: (options = {}) =>
      run(
        Effect.gen(function* () {
          yield* refuseOthers("runGc", options, gcOptions)
          return yield* (yield* Machinen).gc(options)
        })
      ),
    restore: (options) =>
      begin(
        Effect.gen(function* () {
          yield* refuseOthers("restore", options, restoreOptions)
          const { detached: _, memory, onLog, signal: __, timeoutMs: ___, ...rest } = options
          const machinen = yield* Machinen
          const [elapsed, { phases, vm }] = yield* Effect.timed(
            machinen.restore({ ...rest, ...given({ memoryMib: memory }) })
          )
          yield* logger(onLog)(phaseEvent("restore", phases, Duration.toMillis(elapsed)))
          return { vm, main: false }
        }),
        options,
        options.timeoutMs === undefined ? defaultWaitMs : options.timeoutMs
      )
  }
}

const toRegistryEntries = (entry: VmEntry): ReadonlyArray<RegistryEntry> => {
  const { createdAt, detached, forkedFrom, id, image, liveMounts, liveMountsLost, memoryMib, name, vmm, vsockPath } =
    entry
  // a VM that is still being started cannot be attached to
  if (vmm === undefined) return []
  return [
    given({
      id,
      pid: vmm.pid,
      name,
      socketPath: vsockPath,
      imagePath: image,
      mountDisk: mountDiskOf(entry),
      liveMounts,
      liveMountsLost,
      forkedFrom,
      memoryCeilingMib: memoryMib,
      detached,
      startedAt: createdAt
    })
  ]
}

const mountDiskOf = ({ disks = [], mount }: VmEntry) => {
  const pathOf = (id: Disk["id"]) => disks.find((disk) => disk.id === id)?.path ?? ""
  return mount && { guest: mount.guest, lowerPath: pathOf("mountlower"), upperPath: pathOf("mountupper") }
}

const nothingToRun = (image: string) =>
  new BootError({
    code: "BOOT_CMD_MISSING",
    message: `there is nothing to run in ${image}`,
    hint: 'give a command: cmd: ["sleep", "infinity"] for a VM that waits for exec()'
  })

const checkCommand = ({ cmd, image, rootDisk }: BootOptions): Effect.Effect<void, BootError> => {
  const isGiven = image !== undefined || typeof rootDisk === "string"
  if (isGiven === (cmd !== undefined)) return Effect.void
  // an image may have a command of its own, which is known only once the image is read; the bases have none
  if (image !== undefined && !(baseNames as ReadonlyArray<string>).includes(image)) return Effect.void
  return isGiven
    ? nothingToRun(image ?? String(rootDisk))
    : new BootError({
        code: "BOOT_CMD_WITHOUT_IMAGE",
        message: "there is a command, but no image to run it in",
        hint: 'give an image: "micro", "debian", a rootfs tarball or an ext4 image'
      })
}

const attachTargetInvalid = () =>
  new RegistryError({
    code: "REGISTRY_VM_NOT_FOUND",
    message: "attach() finds a VM by its pid or by its name",
    hint: "give one of the two"
  })

/** Codes of a launched guest that does not become ready. Errors before the launch keep their own codes. */
const notReadyCodes: ReadonlySet<string> = new Set([
  "BOOT_READY_TIMEOUT",
  "BOOT_GUEST_FAILED",
  "BOOT_VMM_FAILED"
] satisfies ReadonlyArray<BootError["code"]>)

const asDetached = <E>(error: E) =>
  error instanceof BootError && notReadyCodes.has(error.code) ? notReadyDetached(error) : error

const notReady = (ms: number) => ({
  duration: ms,
  onTimeout: () =>
    new BootError({
      code: "BOOT_DETACHED_READINESS_FAILED",
      message: `the detached VM did not become ready within ${ms} ms`,
      hint: "raise timeoutMs on a slow or busy host; `machinen doctor` checks the host"
    })
})
