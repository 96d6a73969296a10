import { FileSystem } from "@effect/platform"
import { Context, Effect, Layer, type Scope } from "effect"
import { type Booted, boot } from "./boot/boot.ts"
import { type Prepared, type PrepareOptions, prepare } from "./boot/prepare.ts"
import { type Provisioned, type ProvisionOptions, provision } from "./boot/provision.ts"
import { collect } from "./boot/templates.ts"
import type {
  AssetError,
  BootError,
  ExecError,
  GvproxyError,
  ProvisionError,
  RegistryError,
  SecretsError,
  SnapshotError
} from "./errors.ts"
import { Agent } from "./guest/Agent.ts"
import { Assets } from "./host/Assets.ts"
import { RootfsImage } from "./image/RootfsImage.ts"
import type { BootOptions } from "./machine/BootOptions.ts"
import { type Leftover, Registry } from "./machine/Registry.ts"
import { Shim } from "./machine/Shim.ts"
import type { VmEntry } from "./machine/VmEntry.ts"
import { Vmm } from "./machine/Vmm.ts"
import { Mountdisk } from "./mount/Mountdisk.ts"
import { Settings } from "./Settings.ts"
import * as Bundle from "./snapshot/Bundle.ts"
import { misfits } from "./snapshot/compatibility.ts"
import { FileHasher } from "./snapshot/FileHasher.ts"
import { type Recorded, unasked } from "./snapshot/foreignBundle.ts"
import { type Forked, type ForkOptions, fork } from "./snapshot/fork.ts"
import { type RestoreOptions, restore } from "./snapshot/restore.ts"
import type { Restored } from "./snapshot/revive.ts"
import { SnapshotEngines } from "./snapshot/SnapshotEngine.ts"
import { checkSnapshot, type Snapshot, type SnapshotOptions, snapshot } from "./snapshot/snapshot.ts"
import { Gvproxy } from "./vm/Gvproxy.ts"
import * as Vm from "./vm/Vm.ts"

/** What `inspect` finds out about a bundle. */
export interface Inspection {
  readonly bundle: Bundle.Bundle
  /** Why this host cannot restore the bundle; empty when it can. */
  readonly misfits: ReadonlyArray<string>
  /** What the options of a restore must ask for, because the bundle is not this user's own; empty for the user's own bundles. */
  readonly unasked: ReadonlyArray<Recorded>
}

export type SnapshotFailure = SnapshotError | BootError | RegistryError
export type BootFailure =
  | BootError
  | RegistryError
  | ProvisionError
  | AssetError
  | GvproxyError
  | ExecError
  | SecretsError

type Services =
  | Settings
  | Registry
  | RootfsImage
  | Mountdisk
  | Assets
  | FileHasher
  | Gvproxy
  | Vmm
  | Agent
  | SnapshotEngines
  | FileSystem.FileSystem

/** microVMs on this host: the one service that a program needs. */
export class Machinen extends Context.Tag("machinen/Machinen")<
  Machinen,
  {
    /**
     * Boots a VM. Closing the scope ends it, unless it is detached. The main command is not started yet: `vm.startMain` starts it, so that none of
     * its output is lost.
     *
     * Main errors, by what is at fault:
     * - an option: BOOT_OPTION_INVALID for one that is unknown, BOOT_MEMORY_INVALID and others like it for a value, SECRETS_VALUE_INVALID
     * - the image: BOOT_IMAGE_NOT_FOUND, BOOT_IMAGE_INVALID, IMAGE_PULL_FAILED, IMAGE_INVALID, ROOTFS_IMG_* while it is made bootable
     * - a mount: BOOT_MOUNT_INVALID, BOOT_MOUNT_HOST_NOT_FOUND, BOOT_MOUNTDISK_*
     * - the name: REGISTRY_NAME_INVALID, REGISTRY_NAME_IN_USE
     * - a port of the host: BOOT_PORT_FORWARD_INVALID, BOOT_PORT_FORWARD_CONFLICT (two of the options), BOOT_PORT_FORWARD_IN_USE
     * - the host: ASSET_MISSING, GVPROXY_NOT_FOUND, BOOT_VMM_MISSING, BOOT_VMM_FAILED, BOOT_NO_SPACE, BOOT_STATE_DIR_UNUSABLE, REGISTRY_IO
     * - the guest: BOOT_GUEST_FAILED when it ends before it is ready, BOOT_READY_TIMEOUT when it is silent; with `detached` both are the cause of
     *   BOOT_DETACHED_READINESS_FAILED
     */
    readonly boot: (options: BootOptions) => Effect.Effect<Booted, BootFailure, Scope.Scope>
    /**
     * Makes the template of a machine, unless it exists. Boots of the same shape then start from it instead of a kernel. Main errors: those of `boot`
     * and `snapshot`.
     */
    readonly prepare: (options: PrepareOptions) => Effect.Effect<Prepared, BootFailure | SnapshotError>
    /** Builds an image: boots a base, runs the hook in it, and writes its root filesystem to a tarball. */
    readonly provision: <E, R = never>(options: ProvisionOptions<E, R>) => Effect.Effect<Provisioned, BootFailure, R>
    /**
     * Saves a running VM as a bundle. Unless `leaveRunning`, the VM ends. Main errors: SNAPSHOT_OPTION_INVALID, BOOT_SNAPSHOT_ENGINE_INVALID,
     * SNAPSHOT_TIMEOUT, SNAPSHOT_MOUNT_BUSY (a process holds files of a live mount), SNAPSHOT_DUMP_FAILED (the directory cannot be used, or the VM
     * could not be saved).
     */
    readonly snapshot: (vm: Vm.Vm, options: SnapshotOptions) => Effect.Effect<Snapshot, SnapshotFailure>
    /** Fails as `snapshot` would because of its options or the VM. Touches nothing. */
    readonly checkSnapshot: (vm: Vm.Vm, options: SnapshotOptions) => Effect.Effect<void, SnapshotFailure>
    /**
     * Reads a bundle's manifest, and says whether this host can restore the bundle. Main errors: BOOT_SNAPSHOT_NOT_FOUND, BOOT_SNAPSHOT_INVALID,
     * BOOT_SNAPSHOT_MISMATCH (the bundle has another format).
     */
    readonly inspect: (snapDir: string) => Effect.Effect<Inspection, BootFailure>
    /** Reads all of a bundle. Returns the names of damaged blobs. Fails as `inspect` does when it cannot read the manifest. */
    readonly verify: (snapDir: string) => Effect.Effect<ReadonlyArray<string>, BootError>
    /**
     * Starts a VM that continues where the bundle's source was saved. Closing the scope ends it, unless it is detached.
     *
     * Main errors, beside those of `boot` about options, the name, ports, the host and the guest:
     * - BOOT_SNAPSHOT_NOT_FOUND, BOOT_SNAPSHOT_INVALID: there is no bundle, or it is damaged
     * - BOOT_SNAPSHOT_MISMATCH: this host, or another image, cannot go on with it
     * - BOOT_SNAPSHOT_FOREIGN: another user made it, and the options do not ask for what it would do on this host
     * - BOOT_SNAPSHOT_ENGINE_INVALID: this build does not have the engine that made it
     * - BOOT_MEMORY_INVALID, BOOT_OPTION_INVALID: the engine saved the whole machine, whose memory or network cannot be changed
     * - BOOT_LIVE_MOUNT_OVERRIDE_UNKNOWN: the source had no live mount there
     * - BOOT_REJUVENATION_FAILED: the restored guest did not take an identity of its own
     */
    readonly restore: (options: RestoreOptions) => Effect.Effect<Restored, BootFailure, Scope.Scope>
    /**
     * Starts siblings of a running VM, which keeps running. Closing the scope ends the siblings, unless they are detached.
     *
     * Main errors, beside those of `boot` about options, the name, ports, the host and the guest:
     * - FORK_MEMORY_BACKPRESSURE: the host has too little free memory
     * - BOOT_OPTION_INVALID, BOOT_PORT_FORWARD_CONFLICT: several siblings were to have one name, or one port of the host
     * - BOOT_SNAPSHOT_ENGINE_INVALID, SNAPSHOT_TIMEOUT, SNAPSHOT_MOUNT_BUSY, SNAPSHOT_DUMP_FAILED: the source could not be saved
     * - BOOT_LIVE_MOUNT_OVERRIDE_UNKNOWN, BOOT_REJUVENATION_FAILED: as of `restore`
     */
    readonly fork: (vm: Vm.Vm, options?: ForkOptions) => Effect.Effect<Forked, BootFailure | SnapshotError, Scope.Scope>
    /**
     * A handle on a running VM by pid, name or the first digits (four or more) of its id. The handle does not own the VM and needs no scope. Fails
     * with REGISTRY_VM_NOT_FOUND when no VM or several fit, or the VM is still being started, and with REGISTRY_IO.
     */
    readonly attach: (reference: string) => Effect.Effect<Vm.Vm, RegistryError>
    /** The entries of live VMs, oldest first. */
    readonly list: Effect.Effect<ReadonlyArray<VmEntry>, RegistryError>
    /** Removes what dead VMs left, and templates that cannot be used any more. With `dryRun` only lists them. */
    readonly gc: (options?: { readonly dryRun?: boolean }) => Effect.Effect<ReadonlyArray<Leftover>, RegistryError>
  }
>() {
  static readonly layer = Layer.effect(
    Machinen,
    Effect.gen(function* () {
      const registry = yield* Registry
      const shim = yield* Shim
      const vmm = yield* Vmm
      const agent = yield* Agent
      const built = yield* Effect.context<Services>()
      // Only the services that the operations need: the context in which this layer is built also has a scope and a span of its own.
      const services = Context.pick(
        Settings,
        Registry,
        RootfsImage,
        Mountdisk,
        Assets,
        FileHasher,
        Gvproxy,
        Vmm,
        Agent,
        SnapshotEngines,
        FileSystem.FileSystem
      )(built)
      /** Runs an operation on these services, whatever the caller's context holds. The caller's scope and span stay. */
      const provided = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.provide(effect, services)
      const sourceOf = (vm: Vm.Vm) => ({ entry: vm.entry, machine: vm.machine, agent: vm })
      return Machinen.of({
        boot: (options) => provided(boot(options)),
        prepare: (options) => provided(prepare(options)),
        provision: <E, R>(options: ProvisionOptions<E, R>) =>
          // the hook belongs to the caller, so it runs on the caller's services
          Effect.contextWithEffect((own: Context.Context<R>) =>
            provided(provision({ ...options, install: (vm) => Effect.provide(options.install(vm), own) }))
          ),
        snapshot: (vm, options) => provided(snapshot(sourceOf(vm), options)),
        checkSnapshot: (vm, options) => provided(checkSnapshot(sourceOf(vm), options)),
        restore: (options) => provided(restore(options)),
        fork: (vm, options) => provided(fork(sourceOf(vm), options)),
        inspect: (snapDir) =>
          provided(
            Effect.gen(function* () {
              const bundle = yield* Bundle.read(snapDir)
              return { bundle, misfits: yield* misfits(bundle, {}), unasked: unasked(bundle, {}) }
            })
          ),
        verify: (snapDir) => provided(Effect.flatMap(Bundle.read(snapDir), Bundle.verify)),
        attach: Effect.fn("Machinen.attach")(function* (reference) {
          const entry = yield* registry.find(reference)
          const running = yield* shim.attach(entry)
          return Vm.make(entry, vmm.attach(entry, running), agent.client(entry.vsockPath, running.exited))
        }),
        list: registry.list,
        gc: (options) =>
          provided(
            Effect.zipWith(registry.reconcile(options), collect(options), (dead, unused) => [...dead, ...unused])
          )
      })
    })
  )
}
