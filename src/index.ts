/** The Effect API. `Machinen` is the service, `layer` provides it on this host. */
export type {
  AgentClient,
  CommandOutput,
  CommandSpec,
  ExecOptions,
  ExecResult,
  FileRange,
  MainCommand,
  RunningCommand,
  WriteFileOptions
} from "./Agent.ts"
export { DirectoryEntry, FileChange, FileStat, GuestStats, Rejuvenation, TerminalSession } from "./AgentProtocol.ts"
export type { Bundle } from "./Bundle.ts"
export type { Booted } from "./boot.ts"
export type { BootOptions } from "./domain/BootOptions.ts"
export { BundleManifest, EngineName } from "./domain/BundleManifest.ts"
export * from "./domain/errors.ts"
export { ImageConfig } from "./domain/ImageConfig.ts"
export type { Secrets } from "./domain/Secrets.ts"
export { ExitRecord } from "./domain/ShimPlan.ts"
export type { TunnelMapping, TunnelTarget } from "./domain/TunnelAddress.ts"
export { ExitStatus, VmId, VmName } from "./domain/Vm.ts"
export { VmEntry } from "./domain/VmEntry.ts"
export type { Forked, ForkOptions } from "./fork.ts"
export * as Initramfs from "./InitramfsPackers.ts"
export { type BootFailure, type Inspection, Machinen, type SnapshotFailure } from "./Machinen.ts"
export type { Prepared, PrepareOptions } from "./prepare.ts"
export type { BuildProgress, Provisioned, ProvisionOptions } from "./provision.ts"
export type { Leftover } from "./Registry.ts"
export type { Restored, RestoreOptions } from "./restore.ts"
export { layer } from "./runtime/layers.ts"
export { Entrusted } from "./SecretStore.ts"
export { Settings } from "./Settings.ts"
export type { Snapshot, SnapshotOptions } from "./snapshot.ts"
export type { Terminal, TerminalCommand, TerminalOptions, TerminalSize } from "./Terminal.ts"
export type { TunnelConnection, TunnelListener } from "./Tunnel.ts"
export type { MemoryStats, Vm } from "./Vm.ts"
