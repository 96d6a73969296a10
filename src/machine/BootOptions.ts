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

/** What a caller may ask of a boot. Everything has a default; nothing is acquired before all of it is checked. */
export interface BootOptions extends MountOptions {
  /**
   * `micro`, `debian`, the path of a rootfs tarball or of an ext4 image used as a read-only base. Default `debian`. What it says about its
   * commands (`machinen-config.json`) holds where these options say nothing; a command of these options replaces its own.
   */
  readonly image?: string
  /** An ext4 image attached read-write as the whole root, as is; it is the caller's and stays. Excludes `image`. */
  readonly rootDisk?: string
  /** The main command; the VM powers off when it ends. Without one, nor one of the image, the VM idles until it is stopped. */
  readonly command?: ReadonlyArray<string>
  /** Environment of the main command and of every command run later. */
  readonly env?: Readonly<Record<string, string>>
  /**
   * The main command gets them as variables, later commands those that they name. They go over the channel and are in no file, and in no copy
   * of the VM.
   */
  readonly secrets?: Secrets
  /** Working directory of commands in the guest; absolute. Default `/`. */
  readonly cwd?: string
  /** Whom commands run as: `user[:group]`, names or numbers of the image's. Default: the image's user, else root. */
  readonly user?: string
  readonly name?: string
  /** Ceiling of guest memory in MiB; the host gives it as the guest touches it. Default 512; `"auto"`: half of the host's, at most 16 GiB. */
  readonly memoryMib?: number | "auto"
  /** Default 1. */
  readonly vcpus?: number
  /** Size of the writable layer in bytes, a multiple of 4096. Default 2 GiB, as a hole that fills as it is written. */
  readonly rootDiskSizeBytes?: number
  /** `nat` (the default): the guest reaches what this host reaches. `none`: it has no network card. */
  readonly network?: NetworkMode
  /** Ports of this host that lead to the guest's; there until the VM is gone. */
  readonly portForward?: ReadonlyArray<PortForwardOption>
  /**
   * The VM outlives the scope and the process that starts it, from the moment it is ready. With a command, rather boot it attached and
   * `vm.detach` once `vm.startMainDetached` has succeeded: a command that cannot be started leaves no VM then.
   */
  readonly detached?: boolean
  /** False: with a kernel, even where a machine of its shape has been prepared (`Machinen.prepare`). Default: as MACHINEN_PREPARED says. */
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

/** Fails for an option that the operation does not know. */
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

/** Options after every check and default. */
export interface BootPlan {
  readonly image: string
  readonly rootDisk: string | undefined
  readonly command: readonly [string, ...ReadonlyArray<string>] | undefined
  readonly env: Readonly<Record<string, string>>
  readonly cwd: string | undefined
  /** It is the image's own: made in the guest if it is missing. */
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
/** Less does not reach user space with our kernel; measured, `micro` needs about 40 MiB. */
export const minMemoryMib = 64

/** Half of the host's memory, from 512 MiB to 16 GiB. */
export const autoMemoryMib = (hostBytes: number): number =>
  Math.max(512, Math.min(Math.floor(hostBytes / 2 ** 20 / 2), 16384))

export interface HostLimits {
  readonly memoryBytes: number
  readonly maxVcpus: number
}

/** Checks everything that can be known without touching the host, and fills in the defaults. First failure wins. */
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

/** MAX_ARG_STRLEN of execve(2); and half of the 2 MiB that arguments and environment share under the default stack limit. */
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
