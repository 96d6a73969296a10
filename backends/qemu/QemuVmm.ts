import * as path from "node:path"
import { Effect, Layer, Option, Ref, Schema } from "effect"
import { BootError } from "../../src/errors.ts"
import { Assets } from "../../src/host/Assets.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import { MachineFingerprint } from "../../src/machine/MachineSpec.ts"
import { hostSocket } from "../../src/machine/Network.ts"
import { Shim, type ShimHandle } from "../../src/machine/Shim.ts"
import { ShimPlan } from "../../src/machine/ShimPlan.ts"
import { Vmm, VmmControlFailed, type VmmHandle } from "../../src/machine/Vmm.ts"
import { given } from "../../src/platform/given.ts"
import { Settings } from "../../src/Settings.ts"
import {
  channelFd,
  commandLine,
  consoleFd,
  cpu,
  defaultBinary,
  devices,
  kernelArguments,
  machine,
  memoryFd,
  netFd,
  shareFd,
  stateFd
} from "./commandLine.ts"
import * as Qmp from "./Qmp.ts"

const consoleLogBytes = 1024 * 1024
/** gvproxy serves one guest: a small heap that is collected often is enough. */
const gvproxyEnv = { GOMEMLIMIT: "64MiB", GOMAXPROCS: "2" }

const greetingDeadline = "2 seconds"

/** Most vCPUs: NR_CPUS of our kernel (kernel/config). */
const maxVcpus = 16

const controlPath = (dir: string) => path.join(dir, "qmp.sock")

/** Runs each machine as a QEMU process, under KVM where it works, else under TCG. */
export const layer = Layer.effect(
  Vmm,
  Effect.gen(function* () {
    const shim = yield* Shim
    const probe = yield* HostProbe
    const assets = yield* Assets
    const settings = yield* Settings
    const binary = Option.getOrElse(settings.vmm, () => defaultBinary)

    const handle = <E>(qmpPath: string, running: ShimHandle<E>): VmmHandle<E> => {
      const connect = Qmp.connect(qmpPath, greetingDeadline)
      const once = (command: string) =>
        Effect.scoped(Effect.flatMap(connect, (qmp) => qmp.execute(command))).pipe(Effect.asVoid)
      return {
        ...running,
        pause: once("stop"),
        resume: once("cont"),
        save: ({ files, machine, remove }) =>
          Effect.gen(function* () {
            // a paused guest cannot freeze its processes, and only its user may resume it
            if (!(yield* Effect.scoped(Effect.flatMap(connect, isRunning)))) {
              return yield* new VmmControlFailed({ code: "VMM_PAUSED", message: "the VM is paused" })
            }
            const capture = yield* running.capture({
              memory: machine?.memory,
              shares: machine?.shares,
              files,
              undo: { remove, socket: qmpPath, lines: goOn }
            })
            // If QEMU does not let the guest go on, `commit` fails. The shim then undoes the save and tries to let the guest go on itself.
            const stuck = yield* Ref.make(Option.none<VmmControlFailed>())
            const letGoOn = (qmp: Qmp.Qmp) =>
              Effect.catchAll(qmp.execute("cont"), (error) => Ref.set(stuck, Option.some(error)))
            const commit = Effect.gen(function* () {
              const failure = yield* Ref.get(stuck)
              if (Option.isSome(failure)) return yield* stillStopped(failure.value)
              yield* capture.commit
            })
            const whileStopped = Effect.gen(function* () {
              const qmp = yield* connect
              yield* Effect.acquireRelease(qmp.execute("stop"), () => letGoOn(qmp))
              if (machine !== undefined)
                yield* qmp.execute("xen-save-devices-state", { filename: machine.state, live: false })
              yield* capture.copy
            })
            return { whileStopped, commit }
          })
      }
    }

    return Vmm.of({
      capabilities: Effect.map(probe.accelerator, ({ accel }) => ({ backend: "qemu", accel, maxVcpus })),
      controlPath,
      launch: Effect.fn("QemuVmm.launch")(function* (spec, { cleanup, entry, files, graceMs, network }) {
        const shimBinary = yield* assets.shim.pipe(Effect.mapError(assetMissing))
        const { accel } = yield* probe.accelerator
        const tscKhz = accel === "tcg" ? yield* probe.tscKhz : 0
        const { start } = spec
        const [argv0, ...argv] = commandLine(spec, { binary, accel, tscKhz, controlPath: controlPath(spec.dir) })
        const running = yield* shim.start(
          shimBinary,
          new ShimPlan({
            version: 1,
            id: spec.id,
            dir: spec.dir,
            files,
            vmm: { argv: [argv0, ...argv], env: {} },
            channel: { fd: channelFd, vsockPath: entry.vsockPath, resume: start._tag === "Saved" },
            memory:
              start._tag === "Saved"
                ? { fd: memoryFd, from: start.memory }
                : { fd: memoryFd, sizeBytes: spec.memoryMib * 2 ** 20 },
            inherit: start._tag === "Saved" ? [{ fd: stateFd, path: start.state }] : [],
            console: { fd: consoleFd, logPath: path.join(spec.dir, "console.log"), maxBytes: consoleLogBytes },
            ...(network === undefined
              ? {}
              : {
                  network: {
                    fd: netFd,
                    // names the VM in the process's environment, because the command line does not
                    gvproxy: { argv: network.gvproxy, env: { ...gvproxyEnv, MACHINEN_VM_DIR: spec.dir } },
                    forwards: network.forwards.map((forward) => ({
                      host: hostSocket(forward),
                      guestPort: forward.guestPort
                    }))
                  }
                }),
            ...(spec.shares.length === 0
              ? {}
              : {
                  shares: {
                    fd: shareFd,
                    argv: [yield* assets.share.pipe(Effect.mapError(assetMissing))] as const,
                    // names the VM in the process's environment, because the command line does not
                    env: { MACHINEN_VM_DIR: spec.dir },
                    parts: spec.shares,
                    ...(start._tag === "Saved" ? given({ state: start.shares }) : {})
                  }
                }),
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
      fingerprint: Effect.fn("QemuVmm.fingerprint")(function* (plugged) {
        const { accel } = yield* probe.accelerator
        return new MachineFingerprint({
          backend: "qemu",
          vmmVersion: yield* probe.vmmVersion,
          machine,
          accel,
          cpu: cpu[accel],
          tscKhz: yield* probe.tscKhz,
          devices: devices(plugged)
        })
      }),
      kernelArguments: Effect.map(probe.accelerator, ({ accel }) => kernelArguments(accel, 0)),
      attach: (entry, running) => handle(entry.vmmControlPath ?? controlPath(path.dirname(entry.controlPath)), running)
    })
  })
)

/** The monitor commands by which the shim lets a machine go on after its saver has died. */
const goOn = ["qmp_capabilities", "cont"].map((execute) => JSON.stringify({ execute, id: `undo ${execute}` }))

const stillStopped = (cause: VmmControlFailed) =>
  new VmmControlFailed({ message: `the VM does not go on: ${cause.message}`, cause })

const isRunning = (qmp: Qmp.Qmp) =>
  Effect.map(qmp.execute("query-status"), (status) =>
    Option.exists(Schema.decodeUnknownOption(Schema.Struct({ running: Schema.Boolean }))(status), (s) => s.running)
  )

const assetMissing = (cause: Error) =>
  new BootError({
    code: "BOOT_VMM_MISSING",
    message: "the shim has not been built",
    hint: "run `machinen install`",
    cause
  })
