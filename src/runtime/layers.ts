import * as NodeContext from "@effect/platform-node/NodeContext"
import { Context, Effect, Layer } from "effect"
import * as Criu from "../../backends/criu/Criu.ts"
import * as QemuProbe from "../../backends/qemu/QemuProbe.ts"
import * as QemuVmm from "../../backends/qemu/QemuVmm.ts"
import * as Vmstate from "../../backends/vmstate/Vmstate.ts"
import { Agent } from "../guest/Agent.ts"
import { Vsock } from "../guest/Vsock.ts"
import { Assets } from "../host/Assets.ts"
import { Doctor } from "../host/Doctor.ts"
import { Setup } from "../host/Setup.ts"
import { ImageStore } from "../image/ImageStore.ts"
import { RootfsImage } from "../image/RootfsImage.ts"
import { Machinen } from "../Machinen.ts"
import { Registry } from "../machine/Registry.ts"
import { Shim } from "../machine/Shim.ts"
import { Mountdisk } from "../mount/Mountdisk.ts"
import { Settings } from "../Settings.ts"
import { FileHasher } from "../snapshot/FileHasher.ts"
import { SnapshotEngine, SnapshotEngines } from "../snapshot/SnapshotEngine.ts"
import { Gvproxy } from "../vm/Gvproxy.ts"

/** The platform, the settings, and the services that do not need a VMM. */
const foundation = Layer.mergeAll(Assets.layer, Registry.layer, Shim.layer, Vsock.layer).pipe(
  Layer.provideMerge(Settings.layer),
  Layer.provideMerge(NodeContext.layer)
)

/** For callers that only pack archives: no VMM, no registry. */
export const packing = Assets.layer.pipe(Layer.provideMerge(Settings.layer), Layer.provideMerge(NodeContext.layer))

type Engine<R> = Layer.Layer<SnapshotEngine, never, R>

/** The engines by name; the first one is the default. */
const byName = <R>(engines: ReadonlyArray<Engine<R>>) =>
  Layer.scoped(
    SnapshotEngines,
    Effect.map(Effect.forEach(engines, Layer.build), (built) => {
      const all = built.map((context) => Context.get(context, SnapshotEngine))
      return new Map(all.map((engine) => [engine.name, engine]))
    })
  )

/** For callers that know a VM by its socket alone. */
export const agent = Layer.provide(Agent.layer, foundation)

/** Removes what killed processes have left, before anything new is made. */
const reconcileAtStart = Layer.effectDiscard(
  Effect.flatMap(Registry, (registry) => registry.reconcile()).pipe(
    Effect.catchAll((error) => Effect.logWarning("reconcile failed", error))
  )
)

/** Joins all services with their implementations and these engines. Without `reconcileAtStart`, for callers that examine leftovers themselves. */
export const withEngines = <R>(...engines: ReadonlyArray<Engine<R>>) =>
  Layer.mergeAll(Machinen.layer, Doctor.layer, ImageStore.layer, Setup.layer).pipe(
    Layer.provideMerge(byName(engines)),
    Layer.provideMerge(QemuVmm.layer),
    Layer.provideMerge(QemuProbe.layer),
    Layer.provideMerge(Mountdisk.layer),
    Layer.provideMerge(Layer.mergeAll(Agent.layer, RootfsImage.layer, FileHasher.layer, Gvproxy.layer)),
    Layer.provideMerge(foundation)
  )

/** All services, without the removal of what dead VMs left. */
export const layerWithoutReconcile = withEngines(Vmstate.layer, Criu.layer)

/** All services. Building them first removes what dead VMs left. */
export const layer = Layer.provideMerge(reconcileAtStart, layerWithoutReconcile)
