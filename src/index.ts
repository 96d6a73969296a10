/** The Effect API. `Machinen` is the service, `layer` provides it on this host. */
export type {
  AgentClient,
  CommandOutput,
  CommandSpec,
  ExecResult,
  RunningCommand,
  WriteFileOptions
} from "./Agent.ts"
export { FileStat, GuestStats } from "./AgentProtocol.ts"
export type { Booted } from "./boot.ts"
export type { BootOptions } from "./domain/BootOptions.ts"
export * from "./domain/errors.ts"
export { ExitRecord } from "./domain/ShimPlan.ts"
export { ExitStatus, VmId, VmName } from "./domain/Vm.ts"
export { VmEntry } from "./domain/VmEntry.ts"
export { type BootFailure, Machinen } from "./Machinen.ts"
export type { Leftover } from "./Registry.ts"
export { layer } from "./runtime/layers.ts"
export { Settings } from "./Settings.ts"
export type { MemoryStats, Vm } from "./Vm.ts"
