import * as os from "node:os"
import * as path from "node:path"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Effect, identity, Layer, Option, Schema } from "effect"
import { BootError } from "../../src/errors.ts"
import { Assets } from "../../src/host/Assets.ts"
import { type AcceleratorChoice, HostProbe } from "../../src/machine/HostProbe.ts"
import { VmId } from "../../src/machine/MachineSpec.ts"
import { Registry } from "../../src/machine/Registry.ts"
import { Shim } from "../../src/machine/Shim.ts"
import { ShimPlan } from "../../src/machine/ShimPlan.ts"
import { VmEntry } from "../../src/machine/VmEntry.ts"
import { writeCacheFile } from "../../src/platform/cacheFile.ts"
import * as command from "../../src/platform/command.ts"
import * as fileState from "../../src/platform/fileState.ts"
import * as HostLock from "../../src/platform/HostLock.ts"
import { memoizeSuccess } from "../../src/platform/memoizeSuccess.ts"
import * as processes from "../../src/platform/processes.ts"
import { Settings } from "../../src/Settings.ts"
import { bare, consoleFd, defaultBinary, kernelArguments, machine, serialConsole } from "./commandLine.ts"

const kvmDevice = "/dev/kvm"

/** Time limit of a probe. A kernel without a root panics and resets in under 1 s on a working KVM, in about 1.3 s on one nested in TCG. */
const kvmDeadline = "6 seconds"

/** Time limit of the question for the VMM's version. QEMU answers in 15 ms on an idle host; a VMM that hangs must not hold up a restore for ever. */
const versionTimeout = "10 seconds"

/**
 * How long a failed probe counts. The failure may be temporary (a busy host, a device that another hypervisor holds), but a probe that hangs costs
 * its whole time limit.
 */
const retryAfterMs = 10 * 60_000

const emptyRecord = () => ({})

/** Whether KVM works. `untilMs` (Unix milliseconds): until when the finding counts; absent: until the host reboots. */
const KvmFinding = Schema.Struct({
  works: Schema.Boolean,
  reason: Schema.String,
  untilMs: Schema.optional(Schema.Int)
})
type KvmFinding = typeof KvmFinding.Type

/** Findings since the host's boot: versions by the state of the VMM's file, and whether KVM works, by VMM and kernel. */
const Findings = Schema.Struct({
  tscKhz: Schema.optional(Schema.Int),
  versions: Schema.optionalWith(Schema.Record({ key: Schema.String, value: Schema.String }), { default: emptyRecord }),
  kvm: Schema.optionalWith(Schema.Record({ key: Schema.String, value: KvmFinding }), { default: emptyRecord })
})
type Findings = typeof Findings.Type
const noFindings: Findings = { versions: {}, kvm: {} }
const FindingsJson = Schema.parseJson(Findings)

/** Probes the host with QEMU and keeps the answers until the host reboots, in `<cacheDir>/host-<boot id>.json`. */
export const layer = Layer.effect(
  HostProbe,
  Effect.gen(function* () {
    const fs = yield* FileSystem.FileSystem
    const executor = yield* CommandExecutor.CommandExecutor
    const settings = yield* Settings
    const assets = yield* Assets
    const shim = yield* Shim
    const registry = yield* Registry
    const bootId = yield* processes.bootId
    const findingsPath = path.join(settings.cacheDir, `host-${bootId}.json`)
    const binary = Option.getOrElse(settings.vmm, () => defaultBinary)

    const read: Effect.Effect<Findings> = fs.readFileString(findingsPath).pipe(
      Effect.flatMap(Schema.decode(FindingsJson)),
      Effect.orElseSucceed(() => noFindings)
    )

    /** Keeps a finding. Never fails: a lost finding costs another probe. */
    const remember = (and: (known: Findings) => Findings) =>
      read.pipe(
        Effect.flatMap((known) => Schema.encode(FindingsJson)(and(known))),
        Effect.flatMap((text) => writeCacheFile(fs, findingsPath, text)),
        Effect.ignore
      )

    const measureTsc = Effect.gen(function* () {
      const { code, stdout } = yield* command
        .run([yield* assets.shim, "tsc-khz"])
        .pipe(Effect.provideService(CommandExecutor.CommandExecutor, executor))
      const khz = Number(stdout.trim())
      if (code !== 0 || !Number.isSafeInteger(khz) || khz <= 0) {
        return yield* Effect.fail(new Error(`the shim answered ${JSON.stringify(stdout)}, code ${code}`))
      }
      return khz
    }).pipe(
      Effect.mapError(
        (cause) =>
          new BootError({
            code: "BOOT_VMM_FAILED",
            message: `the host's TSC rate could not be measured: ${cause.message}`,
            hint: "run `machinen doctor`",
            cause
          })
      )
    )

    const tscKhz = Effect.gen(function* () {
      const known = (yield* read).tscKhz
      if (known !== undefined) return known
      const measured = yield* measureTsc
      yield* remember((known) => ({ ...known, tscKhz: measured }))
      return measured
    })

    /** QEMU's version. Asking takes 15 ms, so the answer is kept by the state of the file. */
    const vmmVersion = Effect.gen(function* () {
      const dirs = (process.env["PATH"] ?? "").split(path.delimiter)
      const places = binary.includes("/") ? [binary] : dirs.map((dir) => path.join(dir, binary))
      const subject = JSON.stringify(yield* Effect.firstSuccessOf(places.map(fileState.read)))
      const known = (yield* read).versions[subject]
      if (known !== undefined) return known
      const { stdout } = yield* command.run([binary, "--version"]).pipe(
        Effect.timeoutFail({
          duration: versionTimeout,
          onTimeout: () => new Error(`it did not answer within ${versionTimeout}`)
        })
      )
      const version = /version (\S+)/.exec(stdout)?.[1]
      if (version === undefined)
        return yield* Effect.fail(new Error(`it answered ${JSON.stringify(stdout.slice(0, 80))}`))
      yield* remember((known) => ({ ...known, versions: { ...known.versions, [subject]: version } }))
      return version
    }).pipe(
      Effect.provideService(CommandExecutor.CommandExecutor, executor),
      Effect.mapError(
        (cause) =>
          new BootError({
            code: "BOOT_VMM_MISSING",
            message: `${binary} does not tell its version: ${cause.message}`,
            hint: "`machinen doctor` tells what is missing or broken on this host",
            cause
          })
      )
    )

    /** Boots our kernel without a root: on a working KVM it panics and resets, and QEMU ends with code 0. */
    const bootOnKvm = Effect.gen(function* () {
      const id = VmId.make(`f${Date.now().toString(16).padStart(11, "0").slice(-11)}`)
      // in the VMs' directory, because paths there are short enough for sockets
      const dir = yield* registry.scratch
      const controlPath = path.join(dir, "c")
      const running = yield* shim.start(
        yield* assets.shim,
        new ShimPlan({
          version: 1,
          id,
          dir,
          files: [],
          vmm: {
            argv: [
              binary,
              ...["-M", machine, "-accel", "kvm", "-cpu", "host", "-m", "128M"],
              ...bare,
              ...["-kernel", yield* assets.kernel, "-append", kernelArguments("kvm", 0)],
              ...serialConsole(consoleFd)
            ],
            env: {}
          },
          channel: null,
          console: { fd: consoleFd, logPath: path.join(dir, "console.log"), maxBytes: 65536 },
          outputLogPath: path.join(dir, "output.log"),
          vmmLogPath: path.join(dir, "vmm.log"),
          controlPath,
          entryPath: path.join(dir, "entry.json"),
          entry: new VmEntry({
            version: 1,
            id,
            state: "booting",
            bootId,
            owner: yield* processes.self,
            detached: false,
            backend: "qemu",
            accel: "kvm",
            image: "none",
            memoryMib: 128,
            vcpus: 1,
            createdAt: Date.now(),
            vsockPath: path.join(dir, "v"),
            controlPath
          }),
          cleanup: [],
          detached: false,
          graceMs: 0
        })
      )
      const exit = yield* Effect.timeoutOption(running.exited, kvmDeadline)
      if (Option.isNone(exit)) {
        yield* running.kill
        return temporaryFailure(`${kvmDevice} is there, but our kernel hangs on it (probed for ${kvmDeadline})`)
      }
      const { consoleTail, vmm, vmmLogTail } = exit.value
      if (consoleTail.includes("Kernel panic") && vmm.code === 0) {
        return { works: true, reason: `${kvmDevice} works: our kernel booted on it` }
      }
      const reason = `${kvmDevice} is there, but QEMU cannot use it: ${lastLine(vmmLogTail)}`
      // QEMU aborts (SIGABRT) when KVM fails it; other ends may have temporary causes
      return vmm.signal === os.constants.signals.SIGABRT ? { works: false, reason } : temporaryFailure(reason)
    }).pipe(Effect.scoped)

    const knownKvm = (subject: string) =>
      Effect.map(read, ({ kvm }) =>
        Option.filter(
          Option.fromNullable(kvm[subject]),
          ({ untilMs }) => untilMs === undefined || (Date.now() < untilMs && untilMs <= Date.now() + retryAfterMs)
        )
      )

    const probeKvm = Effect.gen(function* () {
      const subject = `${binary} ${yield* Effect.orElseSucceed(assets.kernel, () => "")}`
      const known = yield* knownKvm(subject)
      if (Option.isSome(known)) return known.value
      return yield* Effect.gen(function* () {
        // another process may have probed while this one waited for the lock
        const known = yield* knownKvm(subject)
        if (Option.isSome(known)) return known.value
        const found = yield* bootOnKvm
        yield* remember((known) => ({ ...known, kvm: { ...known.kvm, [subject]: found } }))
        return found
      }).pipe(
        HostLock.withLock(path.join(settings.cacheDir, "probe.lock"), identity),
        // a probe that could not be run is no lasting finding: it is tried again
        Effect.catchAll((error) => Effect.succeed(temporaryFailure(`KVM could not be probed: ${error.message}`)))
      )
    })

    const accelerator = Effect.gen(function* () {
      if (settings.accel !== "auto") {
        return lastingChoice({ accel: settings.accel, reason: `MACHINEN_ACCEL=${settings.accel}` })
      }
      const usable = yield* Effect.isSuccess(fs.access(kvmDevice, { readable: true, writable: true }))
      if (!usable) {
        const there = yield* Effect.orElseSucceed(fs.exists(kvmDevice), () => false)
        const why = there ? `no permission to open ${kvmDevice}` : `there is no ${kvmDevice}`
        return lastingChoice({ accel: "tcg", reason: `${why}; guests are emulated` })
      }
      const { reason, untilMs, works } = yield* probeKvm
      const choice: AcceleratorChoice = works
        ? { accel: "kvm", reason }
        : { accel: "tcg", reason: `${reason}; guests are emulated` }
      return { choice, isEstablished: untilMs === undefined }
    })

    return HostProbe.of({
      accelerator: Effect.map(
        yield* memoizeSuccess(accelerator, ({ isEstablished }) => isEstablished),
        ({ choice }) => choice
      ),
      tscKhz: yield* memoizeSuccess(tscKhz),
      vmmVersion: yield* memoizeSuccess(vmmVersion)
    })
  })
)

const lastingChoice = (choice: AcceleratorChoice) => ({ choice, isEstablished: true })

const temporaryFailure = (reason: string): KvmFinding => ({ works: false, reason, untilMs: Date.now() + retryAfterMs })

const lastLine = (text: string) => text.trim().split("\n").at(-1) ?? ""
