/** The Effect API. `Machinen` is the service, `layer` provides it on this host. */

export type { Booted } from "./boot/boot.ts"
export type { Prepared, PrepareOptions } from "./boot/prepare.ts"
export type { BuildProgress, Provisioned, ProvisionOptions } from "./boot/provision.ts"
export * from "./errors.ts"
export type { AgentClient } from "./guest/Agent.ts"
export {
  DirectoryEntry,
  FileChange,
  FileStat,
  GuestStats,
  Rejuvenation,
  TerminalSession
} from "./guest/AgentProtocol.ts"
export type { CommandOutput, CommandSpec, ExecOptions, ExecResult, MainCommand, RunningCommand } from "./guest/Exec.ts"
export type { FileRange, WriteFileOptions } from "./guest/Files.ts"
export { StoredSecrets } from "./guest/SecretStore.ts"
export type { Terminal, TerminalCommand, TerminalOptions, TerminalSize } from "./guest/Terminal.ts"
export type { TunnelConnection, TunnelListener } from "./guest/Tunnel.ts"
export { ImageConfig } from "./image/ImageConfig.ts"
export * as Initramfs from "./initramfs/index.ts"
export { type BootFailure, type Inspection, Machinen, type SnapshotFailure } from "./Machinen.ts"
export type { BootOptions } from "./machine/BootOptions.ts"
export { ExitStatus, VmId, VmName } from "./machine/MachineSpec.ts"
export type { Leftover } from "./machine/Registry.ts"
export type { Secrets } from "./machine/Secrets.ts"
export { ExitRecord } from "./machine/ShimPlan.ts"
export type { TunnelMapping, TunnelTarget } from "./machine/TunnelAddress.ts"
export { VmEntry } from "./machine/VmEntry.ts"
export { layer } from "./runtime/layers.ts"
export { Settings } from "./Settings.ts"
export type { Bundle } from "./snapshot/Bundle.ts"
export { BundleManifest, EngineName } from "./snapshot/BundleManifest.ts"
export type { Forked, ForkOptions } from "./snapshot/fork.ts"
export type { RestoreOptions } from "./snapshot/restore.ts"
export type { LostFile, Restored } from "./snapshot/revive.ts"
export type { Snapshot, SnapshotOptions } from "./snapshot/snapshot.ts"
export type { MemoryStats, Vm } from "./vm/Vm.ts"
