import * as NodeContext from "@effect/platform-node/NodeContext"
import { Layer } from "effect"
import * as QemuProbe from "../../backends/qemu/QemuProbe.ts"
import * as QemuVmm from "../../backends/qemu/QemuVmm.ts"
import { Agent } from "../Agent.ts"
import { Assets } from "../Assets.ts"
import { Doctor } from "../Doctor.ts"
import { Machinen } from "../Machinen.ts"
import { Registry } from "../Registry.ts"
import { RootfsImage } from "../RootfsImage.ts"
import { Settings } from "../Settings.ts"
import { Setup } from "../Setup.ts"
import { Shim } from "../Shim.ts"
import { Vsock } from "../Vsock.ts"

/** Platform, settings and the services that know no VMM. */
const foundation = Layer.mergeAll(Assets.layer, Registry.layer, Shim.layer, Vsock.layer).pipe(
  Layer.provideMerge(Settings.layer),
  Layer.provideMerge(NodeContext.layer)
)

/** The one place where services meet their implementations. */
export const layer = Layer.mergeAll(Machinen.layer, Doctor.layer, Setup.layer).pipe(
  Layer.provideMerge(QemuVmm.layer),
  Layer.provideMerge(QemuProbe.layer),
  Layer.provideMerge(Layer.mergeAll(Agent.layer, RootfsImage.layer)),
  Layer.provideMerge(foundation)
)
