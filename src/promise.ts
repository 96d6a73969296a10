/**
 * The Promise API: the same VMs for programs that do not use Effect. Promises reject with a MachinenError (`isMachinenError`), which has a stable
 * `code`, and a `hint` where the caller can do something; after an AbortSignal they reject with the signal's reason. Options with values that
 * this version cannot honour are refused (`BOOT_OPTION_INVALID`), never ignored.
 */
import { isMachinenError as isOurs, type MachinenError } from "./errors.ts"
import { make } from "./promise/client.ts"
import * as layers from "./runtime/layers.ts"

export * from "./errors.ts"
export { format as formatMachinenError } from "./errors.ts"
export { bootPty, type PtyBootOptions, type PtyVmHandle } from "./promise/bootPty.ts"
export { make } from "./promise/client.ts"
export type { VsockExecPtyOptions } from "./promise/execPty.ts"
export * from "./promise/hostMemory.ts"
export * from "./promise/mountdisk.ts"
export * from "./promise/packers.ts"
export { type OnOutputListener, type SandboxEntry, Sandboxes, type SandboxVm } from "./promise/Sandboxes.ts"
export { Supervisor, type SupervisorOptions } from "./promise/Supervisor.ts"
export type * from "./promise/types.ts"
export * from "./promise/vsock.ts"
export { buildWriteFileCmd, buildWriteFileCmds } from "./promise/writeFileCommands.ts"

/** The API on this host's real services. */
export const { attach, boot, list, provision, restore, runGc } = make(layers.layer)

/** Whether an error is a MachinenError, with `code` if that is given. */
export const isMachinenError = (error: unknown, code?: ErrorCode): error is MachinenError =>
  isOurs(error) && (code === undefined || error.code === code)
export type ErrorCode = MachinenError["code"]
