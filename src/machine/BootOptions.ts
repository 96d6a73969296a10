import * as path from "node:path"
import { Effect, Schema } from "effect"
import { BootError, RegistryError } from "../errors.ts"
import { type OptionNames, unknownOption, unknownOptionText } from "../platform/knownOptions.ts"
import { VmName } from "./MachineSpec.ts"
import { type MountOptions, type MountPlan, validateMounts } from "./mountOptions.ts"
import {
  defaultNetwork,
  type NetworkMode,
  type PortForward,
  type PortForwardOption,
  validateForwards
} from "./Network.ts"
import type { Secrets } from "./Secrets.ts"

/** Options of a boot. Every option has a default. All are checked before anything is acquired. */
export interface BootOptions extends MountOptions {
  /**
   * `micro`, `debian`, the name of an image, or the path of a rootfs tarball or of an ext4 image that is used as a read-only base. Default
   * `debian`. The image's `machinen-config.json` gives defaults for command, environment, directory and user; `command` replaces the image's.
   */
  readonly image?: string
  /** An ext4 image that is attached read-write as the whole root. It belongs to the caller and is not removed. Excludes `image`. */
  readonly rootDisk?: string
  /** The main command; the VM powers off when it ends. Default: the image's; without either the VM idles until it is stopped. */
  readonly command?: ReadonlyArray<string>
  /** Environment of the main command and of every later command, over the image's. */
  readonly env?: Readonly<Record<string, string>>
  /**
   * Values that the main command gets as variables, and later commands when they name them. They are sent over the channel: no file and no copy of
   * the VM has them.
   */
  readonly secrets?: Secrets
  /** Working directory of commands in the guest; absolute. Default: the image's, else `/`. */
  readonly cwd?: string
  /** The user of commands: `user[:group]`, names or numbers in the guest. Default: the image's user, else root. */
  readonly user?: string
  readonly name?: string
  /** Guest memory in MiB; the host allocates it as the guest touches it. Default 512. `"auto"`: half of the host's, from 512 MiB to 16 GiB. */
  readonly memoryMib?: number | "auto"
  /** Number of virtual CPUs. Default 1. */
  readonly vcpus?: number
  /** Size of the writable layer in bytes, a multiple of 4096. Default 2 GiB; the file is sparse and grows as the guest writes. */
  readonly rootDiskSizeBytes?: number
  /** `nat` (default): the guest reaches what this host reaches. `none`: the guest has no network card. */
  readonly network?: NetworkMode
  /** Ports of this host that are forwarded to the guest until the VM has ended. */
  readonly portForward?: ReadonlyArray<PortForwardOption>
  /**
   * True: from the moment it is ready, the VM outlives the scope and the process that start it. Default false. With a command, boot the VM attached
   * and call `vm.detach` once `vm.startMainDetached` has succeeded: a command that cannot be started then leaves no VM.
   */
  readonly detached?: boolean
  /** False: boots a kernel even when a template of this shape exists (`Machinen.prepare`). Default: as MACHINEN_PREPARED says. */
  readonly prepared?: boolean
}

const optionNames: OptionNames<BootOptions> = {
  image: true,
  rootDisk: true,
  command: true,
  env: true,
  secrets: true,
  cwd: true,
  user: true,
  name: true,
  memoryMib: true,
  vcpus: true,
  rootDiskSizeBytes: true,
  network: true,
  portForward: true,
  mount: true,
  mountDiskUpperSizeBytes: true,
  liveMounts: true,
  detached: true,
  prepared: true
}

/** Fails with BOOT_OPTION_INVALID for an option that the operation does not know. */
export const refuseUnknown = <Options extends object>(
  operation: string,
  options: Options,
  known: OptionNames<Options>
): Effect.Effect<void, BootError> => {
  const unknown = unknownOption(options, known)
  return unknown === undefined
    ? Effect.void
    : new BootError({ code: "BOOT_OPTION_INVALID", ...unknownOptionText(operation, unknown, known) })
}

/** Boot options after all checks, with all defaults. */
export interface BootPlan {
  readonly image: string
  readonly rootDisk: string | undefined
  readonly command: readonly [string, ...ReadonlyArray<string>] | undefined
  readonly env: Readonly<Record<string, string>>
  readonly cwd: string | undefined
  /** `cwd` comes from the image: the guest makes the directory if it is missing. */
  readonly makeCwd: boolean
  readonly user: string | undefined
  readonly name: VmName | undefined
  readonly memoryMib: number
  readonly vcpus: number
  readonly rootDiskSizeBytes: number
  readonly network: NetworkMode
  readonly portForward: ReadonlyArray<PortForward>
  readonly mounts: MountPlan
  readonly detached: boolean
  readonly prepared: boolean
}

export const defaultImage = "debian"
export const defaultMemoryMib = 512
export const defaultRootDiskBytes = 2 * 1024 ** 3
/** Our kernel does not reach user space with less. Measured: `micro` needs about 40 MiB. */
const minMemoryMib = 64

/** Half of the host's memory, from 512 MiB to 16 GiB. */
export const autoMemoryMib = (hostBytes: number): number =>
  Math.max(512, Math.min(Math.floor(hostBytes / 2 ** 20 / 2), 16384))

/** What a VM can have on this host: bytes of memory, number of vCPUs. */
export interface HostLimits {
  readonly memoryBytes: number
  readonly maxVcpus: number
}

/** Checks the options, without touching the host, and fills in the defaults. Fails with the first BootError or RegistryError. */
export const validate = Effect.fnUntraced(function* (options: BootOptions, host: HostLimits) {
  yield* refuseUnknown("boot", options, optionNames)
  const { command, cwd, env = {}, image, name, network = defaultNetwork, rootDisk, vcpus = 1 } = options

  if (image !== undefined && rootDisk !== undefined) {
    return yield* new BootError({
      code: "BOOT_OPTION_INVALID",
      message: "an image and a root disk were given",
      hint: "give `image` for a base that stays unchanged, or `rootDisk` for a disk that is written"
    })
  }
  if (command?.length === 0 || command?.[0] === "") {
    return yield* new BootError({
      code: "BOOT_CMD_MISSING",
      message: "the main command is empty",
      hint: "leave it out for a VM that idles"
    })
  }
  if (cwd !== undefined && (!path.posix.isAbsolute(cwd) || cwd.includes("\0"))) {
    return yield* new BootError({
      code: "BOOT_CWD_INVALID",
      message: `the working directory ${JSON.stringify(cwd)} is not an absolute path in the guest`,
      hint: "begin it with `/`"
    })
  }
  yield* validateEnv(env)
  if (options.user !== undefined && !/^[^:\0]+(:[^:\0]+)?$/.test(options.user)) {
    return yield* new BootError({
      code: "BOOT_OPTION_INVALID",
      message: `${JSON.stringify(options.user)} is not a user`,
      hint: "give a name or a number, and a group after a colon if need be: 1000, www-data, app:staff"
    })
  }
  for (const part of command ?? []) {
    if (part.includes("\0")) {
      return yield* new BootError({
        code: "BOOT_OPTION_INVALID",
        message: "an argument of the main command holds a NUL byte",
        hint: "no Linux process can be given one"
      })
    }
  }
  const [first, ...rest] = command ?? []
  const plan: BootPlan = {
    image: image ?? defaultImage,
    rootDisk,
    command: first === undefined ? undefined : [first, ...rest],
    env,
    cwd,
    makeCwd: false,
    user: options.user,
    name: name === undefined ? undefined : yield* decodeName(name),
    memoryMib: yield* validateMemory(options.memoryMib ?? defaultMemoryMib, host),
    vcpus: yield* validateVcpus(vcpus, host),
    rootDiskSizeBytes: yield* validateDiskSize(options.rootDiskSizeBytes ?? defaultRootDiskBytes),
    network,
    portForward: yield* validateForwards(network, options.portForward ?? []),
    mounts: yield* validateMounts(options),
    detached: options.detached ?? false,
    prepared: options.prepared ?? true
  }
  return plan
})

export const validateEnv = Effect.fnUntraced(function* (env: Readonly<Record<string, string>>) {
  let total = 0
  for (const [key, value] of Object.entries(env)) {
    if (key === "" || key.includes("=") || `${key}${value}`.includes("\0")) {
      return yield* new BootError({
        code: "BOOT_ENV_INVALID",
        message: `the environment variable ${JSON.stringify(key.slice(0, 64))} cannot be set`,
        hint: "a name is not empty and has no `=`; neither name nor value has a NUL byte"
      })
    }
    const size = Buffer.byteLength(key) + Buffer.byteLength(value) + 2
    total += size
    if (size > maxEnvString || total > maxEnv) {
      return yield* new BootError({
        code: "BOOT_ENV_INVALID",
        message: `the environment is too large: ${total} bytes, ${size} of them in ${key.slice(0, 64)}`,
        hint: "Linux takes 128 KiB in one variable; machinen takes 1 MiB in all, which leaves room for arguments. Put more in a file"
      })
    }
  }
})

/** MAX_ARG_STRLEN of execve(2). `maxEnv`: half of the 2 MiB that arguments and environment share under the default stack limit. */
const maxEnvString = 128 * 1024
const maxEnv = 1024 * 1024

export const decodeName = (name: string) =>
  Effect.mapError(
    Schema.decode(VmName)(name),
    () =>
      new RegistryError({
        code: "REGISTRY_NAME_INVALID",
        message: `${JSON.stringify(name.slice(0, 140))} cannot be a VM's name`,
        hint: "1 to 128 letters, digits and _ . ~ - /; it starts with a letter, digit or _, is not digits only, and has no empty, `.` or `..` part"
      })
  )

export const validateMemory = (memory: number | "auto", host: HostLimits) => {
  const hostMib = Math.floor(host.memoryBytes / 2 ** 20)
  const mib = memory === "auto" ? autoMemoryMib(host.memoryBytes) : memory
  return Number.isSafeInteger(mib) && mib >= minMemoryMib && mib <= hostMib
    ? Effect.succeed(mib)
    : new BootError({
        code: "BOOT_MEMORY_INVALID",
        message: `a VM cannot have ${String(memory)} MiB of memory`,
        hint: `give a whole number of MiB from ${minMemoryMib} to ${hostMib}, what this host has`
      })
}

export const validateVcpus = (vcpus: number, host: HostLimits) =>
  Number.isSafeInteger(vcpus) && vcpus >= 1 && vcpus <= host.maxVcpus
    ? Effect.succeed(vcpus)
    : new BootError({
        code: "BOOT_VCPUS_INVALID",
        message: `a VM cannot have ${vcpus} vCPUs`,
        hint: `give a whole number from 1 to ${host.maxVcpus}`
      })

const validateDiskSize = (bytes: number) =>
  Number.isSafeInteger(bytes) && bytes >= 16 * 2 ** 20 && bytes <= 16 * 2 ** 40 && bytes % 4096 === 0
    ? Effect.succeed(bytes)
    : new BootError({
        code: "BOOT_DISK_SIZE_INVALID",
        message: `a writable layer cannot have ${bytes} bytes`,
        hint: "give a multiple of 4096 from 16 MiB to 16 TiB"
      })
