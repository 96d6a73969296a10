import type { FileSystem } from "@effect/platform"
import { Context, Effect, Layer, type Scope } from "effect"
import { Agent } from "./Agent.ts"
import type { Assets } from "./Assets.ts"
import { type Booted, boot } from "./boot.ts"
import type { BootOptions } from "./domain/BootOptions.ts"
import type { AssetError, BootError, ExecError, ProvisionError, RegistryError } from "./domain/errors.ts"
import type { VmEntry } from "./domain/VmEntry.ts"
import { type Leftover, Registry } from "./Registry.ts"
import type { RootfsImage } from "./RootfsImage.ts"
import type { Settings } from "./Settings.ts"
import { Shim } from "./Shim.ts"
import * as Vm from "./Vm.ts"
import { Vmm } from "./Vmm.ts"

export type BootFailure = BootError | RegistryError | ProvisionError | AssetError | ExecError

/** microVMs on this host: the one service a program needs. */
export class Machinen extends Context.Tag("machinen/Machinen")<
  Machinen,
  {
    /**
     * Boots a VM. It ends with the scope, unless it is detached. A `command` is not started yet: `vm.startMain` does, so that none of its
     * output is lost.
     */
    readonly boot: (options: BootOptions) => Effect.Effect<Booted, BootFailure, Scope.Scope>
    /** A handle on a running VM by pid, name or id. Closing nothing ends it: it belongs to who booted it. */
    readonly attach: (reference: string) => Effect.Effect<Vm.Vm, RegistryError>
    readonly list: Effect.Effect<ReadonlyArray<VmEntry>, RegistryError>
    /** Removes what dead VMs left; a dry run only tells. */
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
      const services = yield* Effect.context<
        Settings | Registry | RootfsImage | Assets | Vmm | Agent | FileSystem.FileSystem
      >()
      return Machinen.of({
        boot: (options) =>
          Effect.mapInputContext(boot(options), (scope: Context.Context<Scope.Scope>) =>
            Context.merge(services, scope)
          ),
        attach: Effect.fn("Machinen.attach")(function* (reference) {
          const entry = yield* registry.find(reference)
          const running = yield* shim.attach(entry)
          return Vm.make(entry, vmm.attach(entry, running), agent.client(entry.vsockPath))
        }),
        list: registry.list,
        gc: registry.reconcile
      })
    })
  )
}
