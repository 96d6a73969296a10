import { randomUUID } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Cause, Duration, Effect, Option, Schema, Stream } from "effect"
import { ProvisionError } from "../errors.ts"
import * as baseAssets from "../host/baseAssets.ts"
import { configFile, type ImageConfig, ImageConfigJson, isEmpty, overlaid } from "../image/ImageConfig.ts"
import { RootfsImage } from "../image/RootfsImage.ts"
import { type BootOptions, defaultImage } from "../machine/BootOptions.ts"
import { type ExitRecord, howEnded } from "../machine/ShimPlan.ts"
import * as compressed from "../platform/compressed.ts"
import { given } from "../platform/given.ts"
import * as processes from "../platform/processes.ts"
import { tarEntry } from "../platform/tarEntry.ts"
import { Settings } from "../Settings.ts"
import { consoleTail, shownConsole } from "../vm/consoleTail.ts"
import * as PhaseTimer from "../vm/PhaseTimer.ts"
import type { Vm } from "../vm/Vm.ts"
import { type Booted, boot } from "./boot.ts"

/** Progress of a build. */
export type BuildProgress =
  | { readonly _tag: "Phase"; readonly phase: "boot" | "install" | "archive" | "prebake" }
  /** Bytes of the root filesystem that the guest has sent so far; reported from time to time. */
  | { readonly _tag: "Archived"; readonly bytes: number }

/** Options of a build. Every option but `install` and `out` has a default. */
export interface ProvisionOptions<E = unknown, R = never> {
  /** The image that is built upon, as `image` of a boot. Default: the rootfs of MACHINEN_ASSETS_DIR, else `debian`. */
  readonly base?: string
  /** The hook that changes the base. Commands run as root. */
  readonly install: (vm: Vm) => Effect.Effect<void, E, R>
  /**
   * The tarball to write: gzip, or plain with the ending `.tar`. Missing parents are made. An existing file is replaced when the build is done.
   */
  readonly out: string
  /** The image's configuration, which overlays the base's. */
  readonly config?: ImageConfig
  /** Network of the build's VM. Default `nat`. */
  readonly network?: BootOptions["network"]
  readonly memoryMib?: BootOptions["memoryMib"]
  readonly vcpus?: number
  /** Most bytes that the build may write to its disk. Default 8 GiB; the file is sparse and grows as the guest writes. */
  readonly diskSizeBytes?: number
  /** Most bytes of the root filesystem as a tar stream. Default MACHINEN_IMAGE_LIMIT_MIB. */
  readonly maxImageBytes?: number
  /** Time limit of boot, hook and archive together, in milliseconds. Default 10 minutes. */
  readonly timeoutMs?: number
  /** Latest mtime in the image (seconds since 1970): the same build then gives the same image. Default: files keep their mtimes. */
  readonly newest?: number
  /** True (default): makes the image's base now, not at its first boot. If that fails, the build succeeds all the same. */
  readonly prebake?: boolean
  readonly onProgress?: (progress: BuildProgress) => Effect.Effect<void>
}

/** A built image. */
export interface Provisioned {
  /** Absolute path of the tarball. */
  readonly imagePath: string
  readonly sizeBytes: number
  readonly sha256: string
  readonly elapsedMs: number
  /** Milliseconds by phase. */
  readonly phases: ReadonlyMap<string, number>
}

const defaultDiskBytes = 8 * 1024 ** 3
const defaultTimeoutMs = 600_000

/**
 * Builds an image within the time limit: boots a VM of the base, runs the hook in it, and writes the VM's root filesystem to a tarball. The tarball
 * gets its name only when all of it is on disk. A build that fails, is interrupted or killed leaves an older file as it was. Fails with
 * PROVISION_*, ROOTFS_IMG_* or the error of the boot; the hook's failure becomes PROVISION_INSTALL_HOOK_FAILED.
 */
export const provision = Effect.fn("provision")(
  function* <E, R>(options: ProvisionOptions<E, R>) {
    const settings = yield* Settings
    const images = yield* RootfsImage
    const timer = yield* PhaseTimer.make
    const limitMs = options.timeoutMs ?? defaultTimeoutMs
    const maxBytes = options.maxImageBytes ?? settings.imageLimitBytes
    const said = (progress: BuildProgress) => options.onProgress?.(progress) ?? Effect.void
    yield* checkOptions(limitMs, maxBytes, options.newest)
    const out = path.resolve(options.out)

    let stage: "boot" | "install" | "archive" = "boot"
    const enter = (next: typeof stage) =>
      Effect.suspend(() => {
        stage = next
        return said({ _tag: "Phase", phase: next })
      })
    const written = yield* Effect.scoped(
      Effect.gen(function* () {
        const draft = yield* draftOf(out)
        const own = Option.isSome(settings.baseAssetsDir) ? baseAssets.resolve("rootfs") : Effect.succeed(defaultImage)
        const base = options.base ?? (yield* own)
        const built = Effect.scoped(
          Effect.gen(function* () {
            yield* enter("boot")
            const { baked, vm } = yield* bootBase(base, options).pipe(timer.phase("boot"))
            yield* enter("install")
            yield* runHook(vm, options.install).pipe(timer.phase("install"))
            yield* enter("archive")
            const bytes = archive(vm, overlaid(baked, options.config ?? {}), options.newest, maxBytes, said)
            const plain = out.endsWith(".tar")
            return yield* compressed.write(draft, bytes, { plain }).pipe(
              Effect.mapError((e) => (e instanceof ProvisionError ? e : outUnwritable(out, e))),
              whileRunning(vm),
              timer.phase("archive")
            )
          })
        ).pipe(Effect.timeoutFail({ duration: limitMs, onTimeout: () => timedOut(limitMs, stage) }))
        const result = yield* built
        yield* rename(draft, out)
        return result
      })
    )
    if (options.prebake ?? true) {
      yield* said({ _tag: "Phase", phase: "prebake" })
      yield* images.ensure(out).pipe(
        Effect.catchAll((error) => Effect.logWarning(`the first boot of ${out} will have to unpack it`, error)),
        timer.phase("prebake")
      )
    }
    const provisioned: Provisioned = {
      imagePath: out,
      ...written,
      elapsedMs: timer.totalMs(),
      phases: timer.phases()
    }
    return provisioned
  },
  Effect.annotateLogs({ service: "provision" })
)

const checkOptions = (limitMs: number, maxBytes: number, newest: number | undefined) => {
  const bad = (message: string) =>
    new ProvisionError({
      code: "PROVISION_OPTION_INVALID",
      message,
      hint: "leave it out for the default, which `machinen provision --help` tells"
    })
  if (!(limitMs > 0)) return bad(`a build cannot have ${limitMs} ms`)
  if (!(maxBytes > 0)) return bad(`an image cannot have ${maxBytes} bytes`)
  if (newest !== undefined && !(Number.isSafeInteger(newest) && newest >= 0)) {
    return bad(`${newest} is no time in seconds since 1970`)
  }
  return Effect.void
}

/** A draft beside `out`. Its name holds the process that makes it, so that drafts of killed builds are recognised and removed. */
const draftOf = Effect.fnUntraced(function* (out: string) {
  const fs = yield* FileSystem.FileSystem
  const dir = path.dirname(out)
  const prefix = `.${path.basename(out)}.building-`
  const unwritable = Effect.mapError((cause: Error) => outUnwritable(out, cause))
  yield* unwritable(fs.makeDirectory(dir, { recursive: true }))
  const there = yield* Effect.option(fs.stat(out))
  if (there._tag === "Some" && there.value.type !== "File") {
    return yield* outUnwritable(out, new Error("there is something there that is not a file"))
  }
  const bootId = yield* processes.bootId
  for (const name of yield* unwritable(fs.readDirectory(dir))) {
    if (!name.startsWith(prefix)) continue
    const [pid, startTime, boot] = name.slice(prefix.length).split("-")
    const maker = { pid: Number(pid), startTime: Number(startTime) }
    const alive = boot === bootId.slice(0, 8) && (yield* processes.isAlive(maker))
    if (!alive) yield* Effect.ignore(fs.remove(path.join(dir, name), { force: true }))
  }
  const me = yield* processes.self
  const owner = `${me.pid}-${me.startTime}-${bootId.slice(0, 8)}`
  const draft = path.join(dir, `${prefix}${owner}-${randomUUID().slice(0, 8)}`)
  return yield* Effect.acquireRelease(
    unwritable(Effect.as(fs.writeFile(draft, new Uint8Array(0), { flag: "wx" }), draft)),
    (draft) => Effect.ignore(fs.remove(draft, { force: true }))
  )
})

const rename = Effect.fnUntraced(function* (draft: string, out: string) {
  const fs = yield* FileSystem.FileSystem
  yield* fs.rename(draft, out).pipe(
    Effect.zipRight(Effect.scoped(Effect.flatMap(fs.open(path.dirname(out), { flag: "r" }), (dir) => dir.sync))),
    Effect.mapError((cause) => outUnwritable(out, cause))
  )
})

const bootBase = <E, R>(base: string, options: ProvisionOptions<E, R>) =>
  Effect.gen(function* () {
    const images = yield* RootfsImage
    const baked = yield* Effect.flatMap(images.resolve(base), images.config)
    const { vm }: Booted = yield* boot({
      image: base,
      // makes Debian's package tools ask no questions
      env: { DEBIAN_FRONTEND: "noninteractive" },
      user: "0:0",
      cwd: "/",
      rootDiskSizeBytes: options.diskSizeBytes ?? defaultDiskBytes,
      ...given({ network: options.network, memoryMib: options.memoryMib, vcpus: options.vcpus }),
      // a template has a machine id and files that are not the image's
      prepared: false
    })
    return { vm, baked }
  }).pipe(
    Effect.mapError((error) =>
      error.code === "BOOT_IMAGE_NOT_FOUND"
        ? new ProvisionError({
            code: "PROVISION_BASE_NOT_FOUND",
            message: `there is no base "${base}" to build upon`,
            ...given({ hint: error.hint }),
            cause: error
          })
        : error
    )
  )

const runHook = <E, R>(vm: Vm, install: (vm: Vm) => Effect.Effect<void, E, R>) =>
  install(vm).pipe(
    Effect.sandbox,
    // an interruption is no failure of the hook
    Effect.catchAll((cause) =>
      Cause.isInterruptedOnly(cause) ? Effect.failCause(cause as Cause.Cause<never>) : Effect.fail(Cause.squash(cause))
    ),
    Effect.catchAll((error) => Effect.flatMap(hookFailed(vm, error), Effect.fail)),
    whileRunning(vm)
  )

/** Fails when the VM ends during the work, with the console's last lines. */
const whileRunning =
  (vm: Vm) =>
  <A, E, R>(work: Effect.Effect<A, E, R>) =>
    Effect.raceFirst(
      work,
      Effect.flatMap(vm.wait, (exit) => vmEnded(exit))
    )

const vmEnded = (exit: ExitRecord) =>
  new ProvisionError({
    code: "PROVISION_INSTALL_HOOK_FAILED",
    message: `the build's VM ended before the build was done: ${howEnded(exit)}`,
    hint: "did a command of the build power it off, or did it run out of memory?",
    ...shownConsole(exit.consoleTail)
  })

const hookFailed = Effect.fnUntraced(function* (vm: Vm, failure: unknown) {
  // within a span Effect fails with a copy of the error
  const error = Cause.originalError(failure)
  // the connection ends before the end of the VM is reported, which says why
  const code = error instanceof Error && "code" in error ? error.code : undefined
  if (["EXEC_AGENT_UNAVAILABLE", "EXEC_VM_ENDED", "EXEC_VM_FAILED", "FILES_AGENT_UNAVAILABLE"].includes(String(code))) {
    const ended = yield* Effect.timeoutOption(Effect.disconnect(vm.wait), "2 seconds")
    if (Option.isSome(ended)) return vmEnded(ended.value)
  }
  const console = yield* consoleTail(vm)
  const free = yield* vm.stats.pipe(
    Effect.map((stats) => stats.diskFreeBytes),
    Effect.timeout("2 seconds"),
    Effect.orElseSucceed(() => Number.POSITIVE_INFINITY)
  )
  const message = error instanceof Error ? error.message : String(error)
  const full = free < fullBelow || code === "FILES_NO_SPACE"
  return new ProvisionError({
    code: full ? "PROVISION_DISK_TOO_SMALL" : "PROVISION_INSTALL_HOOK_FAILED",
    message: full ? `the build's disk is full: ${message}` : `the build failed: ${message}`,
    ...(full ? { hint: "give the build a larger disk (`--disk`, diskSizeBytes)" } : {}),
    ...shownConsole(console),
    cause: error
  })
})

/** A guest disk with fewer free bytes counts as full. */
const fullBelow = 1024 * 1024

/** The root filesystem as a tar stream that begins with the image's configuration. */
const archive = (
  vm: Vm,
  config: ImageConfig,
  newest: number | undefined,
  maxBytes: number,
  said: (progress: BuildProgress) => Effect.Effect<void>
) => {
  let bytes = 0
  let toldAt = 0
  const limited = vm.image(given({ newest })).pipe(
    Stream.mapError(
      (cause) =>
        new ProvisionError({
          code: "PROVISION_INSTALL_HOOK_FAILED",
          message: `the root filesystem could not be taken out of the guest: ${cause.message}`,
          cause
        })
    ),
    Stream.tap((piece) => {
      bytes += piece.length
      if (bytes > maxBytes) return tooLarge(maxBytes)
      if (bytes - toldAt < progressEvery) return Effect.void
      toldAt = bytes
      return said({ _tag: "Archived", bytes })
    })
  )
  const head = isEmpty(config)
    ? Stream.empty
    : Stream.fromEffect(
        Effect.map(Schema.encode(ImageConfigJson)(config), (json) => tarEntry(`./${configFile}`, Buffer.from(json)))
      )
  return Stream.concat(Stream.orDie(head), limited)
}

const progressEvery = 16 * 1024 * 1024

const tooLarge = (maxBytes: number) =>
  new ProvisionError({
    code: "PROVISION_DISK_TOO_SMALL",
    message: `the root filesystem is larger than ${Math.floor(maxBytes / 1024 ** 2)} MiB, which is as much as this image may have`,
    hint: "remove what is not needed at the end of the build, or raise the limit (`--max-size`, maxImageBytes, MACHINEN_IMAGE_LIMIT_MIB)"
  })

const timedOut = (limitMs: number, stage: string) =>
  new ProvisionError({
    code: "PROVISION_TIMEOUT",
    message: `the build took longer than ${Duration.format(Duration.millis(limitMs))}; it was ended in its step "${stage}"`,
    hint: "raise the limit (`--timeout`, timeoutMs); does a command of it wait for input?"
  })

const outUnwritable = (out: string, cause: Error) => {
  const full = "code" in cause && cause.code === "ENOSPC"
  return new ProvisionError({
    code: "PROVISION_OUT_UNWRITABLE",
    message: `${out} cannot be written: ${cause.message}`,
    hint: full ? "free some space there" : "check the owner and the permissions of the directory",
    cause
  })
}
