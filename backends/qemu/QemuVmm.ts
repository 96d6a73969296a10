import * as path from "node:path"
import { Effect, Layer, Option } from "effect"
import { Assets } from "../../src/Assets.ts"
import { BootError } from "../../src/domain/errors.ts"
import { ShimPlan } from "../../src/domain/ShimPlan.ts"
import { HostProbe } from "../../src/HostProbe.ts"
import { Settings } from "../../src/Settings.ts"
import { Shim, type ShimHandle } from "../../src/Shim.ts"
import { Vmm, type VmmHandle } from "../../src/Vmm.ts"
import { channelFd, commandLine, consoleFd, defaultBinary } from "./commandLine.ts"
import * as Qmp from "./Qmp.ts"

const consoleLogBytes = 1024 * 1024
const greetingDeadline = "2 seconds"

/** NR_CPUS of our kernel (kernel/config). */
const maxVcpus = 16

const controlPath = (dir: string) => path.join(dir, "qmp.sock")

/** Machines as QEMU processes, one for each VM, under KVM or TCG as the host allows. */
export const layer = Layer.effect(
  Vmm,
  Effect.gen(function* () {
    const shim = yield* Shim
    const probe = yield* HostProbe
    const assets = yield* Assets
    const settings = yield* Settings
    const binary = Option.getOrElse(settings.vmm, () => defaultBinary)

    const handle = (qmpPath: string, running: ShimHandle): VmmHandle => {
      const once = (command: string) =>
        Effect.scoped(Effect.flatMap(Qmp.connect(qmpPath, greetingDeadline), (qmp) => qmp.execute(command))).pipe(
          Effect.asVoid
        )
      return { ...running, pause: once("stop"), resume: once("cont") }
    }

    return Vmm.of({
      capabilities: Effect.map(probe.accelerator, ({ accel }) => ({ backend: "qemu", accel, maxVcpus })),
      controlPath,
      launch: Effect.fn("QemuVmm.launch")(function* (spec, { cleanup, entry, files, graceMs }) {
        const shimBinary = yield* assets.shim.pipe(Effect.mapError(assetMissing))
        const { accel } = yield* probe.accelerator
        const tscKhz = accel === "tcg" ? yield* probe.tscKhz : 0
        const [argv0, ...argv] = commandLine(spec, { binary, accel, tscKhz, controlPath: controlPath(spec.dir) })
        const running = yield* shim.start(
          shimBinary,
          new ShimPlan({
            version: 1,
            id: spec.id,
            dir: spec.dir,
            files,
            vmm: { argv: [argv0, ...argv], env: {} },
            channel: { fd: channelFd, vsockPath: entry.vsockPath, resume: false },
            console: { fd: consoleFd, logPath: path.join(spec.dir, "console.log"), maxBytes: consoleLogBytes },
            outputLogPath: path.join(spec.dir, "output.log"),
            vmmLogPath: path.join(spec.dir, "vmm.log"),
            controlPath: entry.controlPath,
            entryPath: path.join(spec.dir, "entry.json"),
            entry,
            cleanup,
            detached: entry.detached,
            graceMs
          })
        )
        return handle(controlPath(spec.dir), running)
      }),
      attach: (entry, running) => handle(entry.vmmControlPath ?? controlPath(path.dirname(entry.controlPath)), running)
    })
  })
)

const assetMissing = (cause: Error) =>
  new BootError({
    code: "BOOT_VMM_MISSING",
    message: "the shim has not been built",
    hint: "run `machinen install`",
    cause
  })
