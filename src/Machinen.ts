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
     */
    readonly boot: (options: BootOptions) => Effect.Effect<Booted, BootFailure, Scope.Scope>
    /** Makes the template of a machine, unless it exists. Boots of the same shape then start from it instead of a kernel. */
    readonly prepare: (options: PrepareOptions) => Effect.Effect<Prepared, BootFailure | SnapshotError>
    /** Builds an image: boots a base, runs the hook in it, and writes its root filesystem to a tarball. */
    readonly provision: <E, R = never>(options: ProvisionOptions<E, R>) => Effect.Effect<Provisioned, BootFailure, R>
    /** Saves a running VM as a bundle. Unless `leaveRunning`, the VM ends. */
    readonly snapshot: (vm: Vm.Vm, options: SnapshotOptions) => Effect.Effect<Snapshot, SnapshotFailure>
    /** Fails as `snapshot` would because of its options or the VM. Touches nothing. */
    readonly checkSnapshot: (vm: Vm.Vm, options: SnapshotOptions) => Effect.Effect<void, SnapshotFailure>
    /** Reads a bundle's manifest, and says whether this host can restore the bundle. */
    readonly inspect: (snapDir: string) => Effect.Effect<Inspection, BootFailure>
    /** Reads all of a bundle. Returns the names of damaged blobs. */
    readonly verify: (snapDir: string) => Effect.Effect<ReadonlyArray<string>, BootError>
    /** Starts a VM that continues where the bundle's source was saved. Closing the scope ends it, unless it is detached. */
    readonly restore: (options: RestoreOptions) => Effect.Effect<Restored, BootFailure, Scope.Scope>
    /** Starts siblings of a running VM, which keeps running. Closing the scope ends the siblings, unless they are detached. */
    readonly fork: (vm: Vm.Vm, options?: ForkOptions) => Effect.Effect<Forked, BootFailure | SnapshotError, Scope.Scope>
    /** A handle on a running VM by pid, name or id. The handle does not own the VM and needs no scope. */
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
