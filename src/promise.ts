/**
 * The Promise API: the same VMs for programs that do not use Effect. What rejects is one of our errors (`isMachinenError`), with a stable
 * `code`, and a `hint` where there is something to be done; what an AbortSignal ended rejects with its reason. Options of the reference
 * that this version cannot honour are refused (`BOOT_OPTION_INVALID`), never ignored.
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

/** On this host's real services. */
export const { attach, boot, list, provision, restore, runGc } = make(layers.layer)

/** Whether it is one of ours, of that code if one is given. */
export const isMachinenError = (error: unknown, code?: ErrorCode): error is MachinenError =>
  isOurs(error) && (code === undefined || error.code === code)
export type ErrorCode = MachinenError["code"]
