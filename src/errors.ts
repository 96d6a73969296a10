import { Schema } from "effect"
import { printable } from "./platform/printable.ts"

/** Codes of errors after which the same call may succeed later, though nobody has changed anything. */
const retryableCodes: ReadonlySet<string> = new Set([
  "BOOT_PORT_FORWARD_IN_USE",
  "BOOT_DETACHED_READINESS_FAILED",
  "BOOT_READY_TIMEOUT",
  "FORK_MEMORY_BACKPRESSURE",
  "EXEC_AGENT_UNAVAILABLE",
  "EXEC_GUEST_BUSY",
  "REGISTRY_VM_UNREACHABLE",
  "SNAPSHOT_TIMEOUT",
  "FILES_AGENT_UNAVAILABLE",
  "FILES_GUEST_BUSY",
  "SECRETS_AGENT_UNAVAILABLE",
  "TUNNEL_PORT_IN_USE",
  "TUNNEL_AGENT_UNAVAILABLE"
])

/**
 * The fields of every error: a stable `code` to program against, a `message` that says what happened, a `hint` that says what to do, and the
 * underlying `cause`. `console` holds the guest's last console lines when they explain the failure.
 */
const fields = <const Codes extends ReadonlyArray<string>>(...codes: Codes) => ({
  code: Schema.Literal(...codes),
  message: Schema.String,
  hint: Schema.optional(Schema.String),
  console: Schema.optional(Schema.String),
  cause: Schema.optional(Schema.Defect)
})

// biome-ignore lint/suspicious/noExplicitAny: TypeScript takes no other class to be extended by a mixin
type WithCode = new (...args: Array<any>) => { readonly code: string }

/** Adds to a class of errors whether the same call may succeed when it is made again. */
const withRetryable = <C extends WithCode>(Base: C) =>
  class extends Base {
    get retryable(): boolean {
      return retryableCodes.has(this.code)
    }
  }

/** A VM could not be started. Everything that earlier steps of the start acquired has been released. */
export class BootError extends withRetryable(
  Schema.TaggedError<BootError>()(
    "BootError",
    fields(
      "BOOT_VMM_MISSING",
      "BOOT_VMM_FAILED",
      "BOOT_IMAGE_NOT_FOUND",
      "BOOT_IMAGE_INVALID",
      "BOOT_KERNEL_NOT_FOUND",
      "BOOT_CMD_MISSING",
      "BOOT_CMD_WITHOUT_IMAGE",
      "BOOT_CWD_INVALID",
      "BOOT_ENV_INVALID",
      "BOOT_MEMORY_INVALID",
      "BOOT_VCPUS_INVALID",
      "BOOT_DISK_SIZE_INVALID",
      "BOOT_OPTION_INVALID",
      "BOOT_PORT_FORWARD_INVALID",
      "BOOT_PORT_FORWARD_CONFLICT",
      "BOOT_PORT_FORWARD_IN_USE",
      "BOOT_MOUNT_INVALID",
      "BOOT_MOUNT_HOST_NOT_FOUND",
      "BOOT_MOUNTDISK_TOOL_MISSING",
      "BOOT_MOUNTDISK_BUILD_FAILED",
      "BOOT_LIVE_MOUNT_OVERRIDE_UNKNOWN",
      "BOOT_PACK_FAILED",
      "BOOT_NO_SPACE",
      "BOOT_GUEST_FAILED",
      "BOOT_READY_TIMEOUT",
      "BOOT_TIMEOUT",
      "BOOT_DETACHED_READINESS_FAILED",
      "BOOT_STATE_DIR_UNUSABLE",
      "BOOT_SNAPSHOT_NOT_FOUND",
      "BOOT_SNAPSHOT_INVALID",
      "BOOT_SNAPSHOT_MISMATCH",
      "BOOT_SNAPSHOT_FOREIGN",
      "BOOT_SNAPSHOT_ENGINE_INVALID",
      "BOOT_REJUVENATION_FAILED",
      "FORK_MEMORY_BACKPRESSURE"
    )
  )
) {
  override get retryable(): boolean {
    const { cause, code } = this
    // the cause says why a detached VM was not ready: a kernel that panics will panic again
    const isCauseFinal = code === "BOOT_DETACHED_READINESS_FAILED" && isMachinenError(cause) && !cause.retryable
    return super.retryable && !isCauseFinal
  }
}

/** gvproxy, the program that serves a guest's network card, is missing or cannot be run. */
export class GvproxyError extends withRetryable(
  Schema.TaggedError<GvproxyError>()("GvproxyError", fields("GVPROXY_NOT_FOUND"))
) {}

/** A running VM could not be saved as a bundle. The VM keeps running, and no partial bundle remains. */
export class SnapshotError extends withRetryable(
  Schema.TaggedError<SnapshotError>()(
    "SnapshotError",
    fields(
      "SNAPSHOT_OPTION_INVALID",
      "SNAPSHOT_NO_DISK",
      "SNAPSHOT_DUMP_FAILED",
      "SNAPSHOT_TIMEOUT",
      "SNAPSHOT_MOUNT_BUSY"
    )
  )
) {}

/** A command could not be run, or ended in a way that the caller wanted as an error. */
export class ExecError extends withRetryable(
  Schema.TaggedError<ExecError>()("ExecError", {
    ...fields(
      "EXEC_AGENT_UNAVAILABLE",
      "EXEC_AGENT_TIMEOUT",
      "EXEC_NONZERO_EXIT",
      "EXEC_PROTOCOL",
      "EXEC_COMMAND_NOT_FOUND",
      "EXEC_NOT_EXECUTABLE",
      "EXEC_CWD_INVALID",
      "EXEC_ARGUMENT_INVALID",
      "EXEC_ARGUMENTS_TOO_LARGE",
      "EXEC_TERMINAL_SIZE_INVALID",
      "EXEC_NO_TERMINAL",
      "EXEC_SESSION_INVALID",
      "EXEC_SESSION_NOT_FOUND",
      "EXEC_SESSION_IN_USE",
      "EXEC_CANCELLED",
      "EXEC_MOUNT_BUSY",
      "EXEC_GUEST_BUSY",
      "EXEC_SECRET_UNKNOWN",
      "EXEC_OUTPUT_TOO_LARGE",
      "EXEC_VM_ENDED",
      "EXEC_VM_FAILED",
      "EXEC_FAILED"
    ),
    /** `EXEC_NONZERO_EXIT`: the command's exit code, 128 + signal when a signal ended it. */
    exitCode: Schema.optional(Schema.Int)
  })
) {}

/** A file or tree could not be copied into or out of a guest. */
export class FilesError extends withRetryable(
  Schema.TaggedError<FilesError>()(
    "FilesError",
    fields(
      "FILES_HOST_DIR_NOT_FOUND",
      "FILES_HOST_IO",
      "FILES_AGENT_UNAVAILABLE",
      "FILES_NOT_FOUND",
      "FILES_NO_SPACE",
      "FILES_PATH_INVALID",
      "FILES_RANGE_INVALID",
      "FILES_WATCH_LIMIT",
      "FILES_TOO_LARGE",
      "FILES_PROTOCOL",
      "FILES_GUEST_BUSY",
      "FILES_GUEST_IO"
    )
  )
) {}

/** Secrets did not reach a guest. No field holds a secret's value. */
export class SecretsError extends withRetryable(
  Schema.TaggedError<SecretsError>()("SecretsError", fields("SECRETS_VALUE_INVALID", "SECRETS_AGENT_UNAVAILABLE"))
) {}

/** A port of the host could not be forwarded to a guest, or one connection to the guest failed. */
export class TunnelError extends withRetryable(
  Schema.TaggedError<TunnelError>()(
    "TunnelError",
    fields(
      "TUNNEL_PORT_IN_USE",
      "TUNNEL_PORT_PRIVILEGED",
      "TUNNEL_ADDRESS_INVALID",
      "TUNNEL_TARGET_INVALID",
      "TUNNEL_REFUSED",
      "TUNNEL_BROKEN",
      "TUNNEL_AGENT_UNAVAILABLE"
    )
  )
) {}

/** The registry of running VMs refused: unknown VM, name in use, name not valid; or its files cannot be read or written. */
export class RegistryError extends withRetryable(
  Schema.TaggedError<RegistryError>()(
    "RegistryError",
    fields(
      "REGISTRY_VM_NOT_FOUND",
      "REGISTRY_VM_UNREACHABLE",
      "REGISTRY_NAME_IN_USE",
      "REGISTRY_NAME_INVALID",
      "REGISTRY_IO"
    )
  )
) {}

/** An image could not be turned into a bootable root filesystem. */
export class ProvisionError extends withRetryable(
  Schema.TaggedError<ProvisionError>()(
    "ProvisionError",
    fields(
      "PROVISION_BASE_NOT_FOUND",
      "PROVISION_KERNEL_NOT_FOUND",
      "PROVISION_DTB_NOT_FOUND",
      "PROVISION_ASSETS_DIR_INVALID",
      "PROVISION_INSTALL_HOOK_FAILED",
      "PROVISION_DISK_TOO_SMALL",
      "PROVISION_TIMEOUT",
      "PROVISION_OUT_UNWRITABLE",
      "PROVISION_OPTION_INVALID",
      "ROOTFS_IMG_TOOL_MISSING",
      "ROOTFS_IMG_NO_SPACE",
      "ROOTFS_IMG_TOO_LARGE",
      "ROOTFS_IMG_BUILD_FAILED",
      "IMAGE_NOT_FOUND",
      "IMAGE_INVALID",
      "IMAGE_IN_USE",
      "IMAGE_NAME_INVALID",
      "IMAGE_PULL_FAILED",
      "ROOTFS_IMG_IO"
    )
  )
) {}

/** A set of sandboxes has no sandbox of that id, or has one already. */
export class SandboxError extends withRetryable(
  Schema.TaggedError<SandboxError>()("SandboxError", fields("SANDBOX_ID_DUPLICATE", "SANDBOX_ID_UNKNOWN"))
) {}

/** An initramfs could not be packed. A file that was at the output path is unchanged. */
export class MkinitramfsError extends withRetryable(
  Schema.TaggedError<MkinitramfsError>()(
    "MkinitramfsError",
    fields(
      "MKINITRAMFS_BUNDLE_INVALID",
      "MKINITRAMFS_WORKSPACE_INVALID",
      "MKINITRAMFS_WORKSPACE_TOO_LARGE",
      "MKINITRAMFS_BASE_EXTRACT_FAILED",
      "MKINITRAMFS_INIT_MISSING"
    )
  )
) {}

/** The CLI's arguments are not valid. Raised before any side effect. */
export class ParseError extends withRetryable(
  Schema.TaggedError<ParseError>()(
    "ParseError",
    fields(
      "PARSE_FLAG_UNKNOWN",
      "PARSE_FLAG_MISSING_VALUE",
      "PARSE_FLAG_DUPLICATE",
      "PARSE_FLAG_MALFORMED",
      "PARSE_PORT_INVALID",
      "PARSE_ARGUMENT_MISSING",
      "PARSE_ARGUMENT_UNKNOWN",
      "PARSE_ARGUMENT_INVALID",
      "PARSE_COMMAND_UNKNOWN",
      "PARSE_ENVIRONMENT_INVALID"
    )
  )
) {}

/** An asset that set-up provides (kernel, guest binary, shim, base image) is missing or could not be built. */
export class AssetError extends withRetryable(
  Schema.TaggedError<AssetError>()(
    "AssetError",
    fields(
      "ASSET_MISSING",
      "ASSET_UNREADABLE",
      "ASSET_BUILD_FAILED",
      "ASSET_PREBUILT_INVALID",
      "ASSET_SOURCE_MISSING",
      "SETUP_NOT_ROOT",
      "SETUP_PACKAGE_UNAVAILABLE",
      "SETUP_TOOL_MISSING"
    )
  )
) {}

/** The hypervisor refused, or cannot be reached, on its own control socket. */
export class VmmControlFailed extends withRetryable(
  Schema.TaggedError<VmmControlFailed>()("VmmControlFailed", {
    ...fields(),
    code: Schema.Literal("VMM_CONTROL_FAILED", "VMM_PAUSED").pipe(
      Schema.propertySignature,
      Schema.withConstructorDefault(() => "VMM_CONTROL_FAILED" as const)
    )
  })
) {}

/** All errors that a caller can get; each operation lists those that it can raise. */
export const MachinenError = Schema.Union(
  BootError,
  SnapshotError,
  ExecError,
  FilesError,
  SecretsError,
  TunnelError,
  RegistryError,
  ProvisionError,
  MkinitramfsError,
  ParseError,
  AssetError,
  SandboxError,
  GvproxyError,
  VmmControlFailed
)
export type MachinenError = typeof MachinenError.Type
/** Whether a value is one of these errors. */
export const isMachinenError: (u: unknown) => u is MachinenError = Schema.is(MachinenError)

const causes = (cause: unknown): ReadonlyArray<string> => {
  if (cause === undefined || cause === null) return []
  if (!(cause instanceof Error)) return [String(cause)]
  return [cause.message, ...causes(cause.cause)]
}

/** Formats an error: `(CODE): message`, then one indented line for each cause. */
export const format = (error: MachinenError): string =>
  [`(${error.code}): ${error.message}`, ...causes(error.cause).map((line) => `  caused by: ${line}`)].join("\n")

/**
 * Formats an error for a terminal: what happened, why, the console's last lines where they help, and what to do. Text of the guest is escaped,
 * so that it cannot steer the terminal.
 */
export const render = (error: MachinenError): string =>
  printable(
    [
      format(error),
      ...(error.console === undefined ? [] : ["  last console lines:", ...indent(error.console)]),
      ...(error.hint === undefined ? [] : [`  hint: ${error.hint}`])
    ].join("\n"),
    { lines: true }
  )

const indent = (text: string) =>
  text
    .trimEnd()
    .split("\n")
    .slice(-15)
    .map((line) => `    ${line.trimEnd()}`)
