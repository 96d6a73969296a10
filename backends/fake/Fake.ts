import { Context, Deferred, Effect, FiberId, Layer, Option, Ref, Stream } from "effect"
import {
  AssetError,
  BootError,
  ExecError,
  FilesError,
  ProvisionError,
  SecretsError,
  TunnelError
} from "../../src/errors.ts"
import { Agent, type AgentClient } from "../../src/guest/Agent.ts"
import { Assets } from "../../src/host/Assets.ts"
import { RootfsImage } from "../../src/image/RootfsImage.ts"
import type { MachineSpec } from "../../src/machine/MachineSpec.ts"
import type { ShimHandle } from "../../src/machine/Shim.ts"
import { ExitRecord } from "../../src/machine/ShimPlan.ts"
import { CaptureFailed } from "../../src/machine/shimControl.ts"
import { type ShimOptions, Vmm, VmmControlFailed, type VmmHandle } from "../../src/machine/Vmm.ts"
import { Mountdisk } from "../../src/mount/Mountdisk.ts"
import { DigestFailed, FileHasher } from "../../src/snapshot/FileHasher.ts"
import { SnapshotEngines } from "../../src/snapshot/SnapshotEngine.ts"
import { Gvproxy } from "../../src/vm/Gvproxy.ts"

/** Steps of a boot that can be made to fail, or never to end. */
const steps = ["kernel", "init", "image", "upper", "listen", "launch", "doorbell", "detach"] as const
export type Step = (typeof steps)[number]
export type FaultMode = "fail" | "hang" | "work"

/** Lets a test watch and steer the fake host. */
export class Fake extends Context.Tag("machinen/Fake")<
  Fake,
  {
    /** Events in order: acquired (`launch+`), released (`launch-`), asked for. */
    readonly events: Effect.Effect<ReadonlyArray<string>>
    readonly when: (step: Step, mode: FaultMode) => Effect.Effect<void>
    /** Completes when a boot has reached the step. */
    readonly reached: (step: Step) => Effect.Effect<void>
    /** Ends the VMM of the VM that was launched last, after it has printed `console`. */
    readonly crash: (console: string) => Effect.Effect<void>
    readonly launched: Effect.Effect<ReadonlyArray<{ readonly spec: MachineSpec; readonly supervision: ShimOptions }>>
  }
>() {}

const ended = (reason: ExitRecord["reason"], consoleTail: string) =>
  new ExitRecord({
    vmm: { code: 0, signal: null },
    main: null,
    orderly: reason === "stop",
    reason,
    consoleTail,
    vmmLogTail: ""
  })

const noAgent = Effect.fail(new ExecError({ code: "EXEC_AGENT_UNAVAILABLE", message: "a fake guest runs nothing" }))
const noSecrets = Effect.fail(
  new SecretsError({ code: "SECRETS_AGENT_UNAVAILABLE", message: "a fake guest keeps no secret" })
)
const noTunnel = Effect.fail(
  new TunnelError({ code: "TUNNEL_AGENT_UNAVAILABLE", message: "a fake guest serves nobody" })
)
const nowhere = Effect.fail(new FilesError({ code: "FILES_AGENT_UNAVAILABLE", message: "a fake guest has no files" }))

/** The agent of a guest that does not exist: no operation is expected. */
const silent: AgentClient = {
  secrets: () => noSecrets,
  forgetSecrets: noSecrets,
  list: () => nowhere,
  makeDirectory: () => nowhere,
  rename: () => nowhere,
  remove: () => nowhere,
  watch: () => nowhere,
  connect: () => noTunnel,
  tunnel: () => noTunnel,
  start: () => noAgent,
  terminal: () => noAgent,
  sessions: noAgent,
  killSession: () => noAgent,
  exec: () => noAgent,
  execRaw: () => noAgent,
  startMain: () => noAgent,
  startMainDetached: noAgent,
  writeFile: () => nowhere,
  readFile: () => Stream.fromEffect(nowhere),
  push: () => nowhere,
  pull: () => nowhere,
  image: () => Stream.fromEffect(nowhere),
  stat: () => nowhere,
  freeze: () => noAgent,
  rejuvenate: () => noAgent,
  dump: () => noAgent,
  revive: () => noAgent,
  setClock: noAgent,
  stats: noAgent
}

const noMachine = Effect.fail(new VmmControlFailed({ message: "a fake has no machine" }))
const unsupported = { pause: noMachine, resume: noMachine, save: () => noMachine }

/** In-memory services for everything below the boot pipeline that would need a hypervisor. The registry is the real one. */
export const layer = Layer.unwrapEffect(
  Effect.gen(function* () {
    const log = yield* Ref.make<ReadonlyArray<string>>([])
    const modes = yield* Ref.make<ReadonlyMap<Step, FaultMode>>(new Map())
    const running = yield* Ref.make<
      ReadonlyArray<{ spec: MachineSpec; supervision: ShimOptions; exited: Deferred.Deferred<ExitRecord> }>
    >([])
    const note = (event: string) => Ref.update(log, (events) => [...events, event])
    const reached = new Map<Step, Deferred.Deferred<void>>(
      yield* Effect.forEach(steps, (step) => Effect.map(Deferred.make<void>(), (deferred) => [step, deferred] as const))
    )
    const reachedOf = (step: Step) => reached.get(step) ?? Deferred.unsafeMake<void>(FiberId.none)
    const at = <E>(step: Step, failure: E) =>
      Effect.flatMap(
        Effect.zipRight(Deferred.succeed(reachedOf(step), undefined), Ref.get(modes)),
        (set): Effect.Effect<void, E> => {
          const mode = set.get(step)
          if (mode === undefined || mode === "work") return Effect.void
          return mode === "fail" ? Effect.fail(failure) : Effect.never
        }
      )
    const asset = (step: Step) =>
      at(step, new AssetError({ code: "ASSET_MISSING", message: `no ${step}` })).pipe(
        // a small file that exists, because the initramfs is really packed
        Effect.as("/proc/sys/kernel/ostype")
      )

    const handle = (exited: Deferred.Deferred<ExitRecord>): VmmHandle => {
      const end = (reason: "stop" | "kill") =>
        note(reason).pipe(
          Effect.zipRight(Deferred.succeed(exited, ended(reason, ""))),
          Effect.zipRight(Deferred.await(exited))
        )
      const shim: ShimHandle = {
        shim: { pid: 2 ** 22 + 1, startTime: 1 },
        vmm: { pid: 2 ** 22 + 2, startTime: 1 },
        exited: Deferred.await(exited),
        stop: () => end("stop"),
        kill: end("kill"),
        detach: Effect.zipRight(
          at("detach", new BootError({ code: "BOOT_DETACHED_READINESS_FAILED", message: "it does not let go" })),
          note("detach")
        ),
        logs: () => Stream.make(Buffer.from("fake console\n")),
        capture: () => Effect.fail(new CaptureFailed({ code: "ESRCH", message: "a fake has no shim" })),
        rename: () => note("rename")
      }
      return { ...shim, ...unsupported }
    }

    return Layer.mergeAll(
      Layer.succeed(Fake, {
        events: Ref.get(log),
        reached: (step) => Deferred.await(reachedOf(step)),
        when: (step, mode) => Ref.update(modes, (set) => new Map(set).set(step, mode)),
        crash: (console) =>
          Effect.flatMap(Ref.get(running), (all) =>
            Effect.forEach(all.slice(-1), ({ exited }) => Deferred.succeed(exited, ended("vmm", console)))
          ).pipe(Effect.asVoid),
        launched: Ref.get(running)
      }),
      Layer.succeed(
        Assets,
        Assets.of({
          kernel: asset("kernel"),
          init: asset("init"),
          shim: asset("kernel"),
          share: asset("kernel"),
          gvproxy: asset("kernel"),
          base: () => asset("image"),
          identity: () => Effect.succeed({ directory: "fake", inputs: "" }),
          damaged: () => Effect.succeed([]),
          discard: () => Effect.void,
          find: () => Effect.succeedNone,
          build: () => Effect.void
        })
      ),
      Layer.succeed(Gvproxy, { command: Effect.succeed(["/gvproxy"] as const) }),
      Layer.succeed(
        RootfsImage,
        RootfsImage.of({
          resolve: () =>
            at("image", new BootError({ code: "BOOT_IMAGE_NOT_FOUND", message: "no image" })).pipe(Effect.as("/base")),
          config: () => Effect.succeed({}),
          add: () => Effect.die("a fake has no store"),
          names: Effect.succeed([]),
          setName: () => Effect.void,
          collectLayers: Effect.void,
          noteBundle: () => Effect.void,
          checkDisk: (image) => Effect.succeed(image),
          ensure: () => Effect.succeed("/base"),
          upperTemplate: () =>
            at("upper", new ProvisionError({ code: "ROOTFS_IMG_NO_SPACE", message: "no space" })).pipe(
              Effect.as("/upper")
            )
        })
      ),
      Layer.succeed(
        Mountdisk,
        Mountdisk.of({
          cacheDir: "/mountdisk",
          collect: () => Effect.succeed([]),
          tool: Effect.succeed(Option.none()),
          lower: () => Effect.succeed({ lowerPath: "/lower", key: "lower" }),
          upperTemplate: () => Effect.succeed("/upper"),
          upper: () => Effect.succeed("/upper")
        })
      ),
      Layer.succeed(
        Agent,
        Agent.of({
          client: () => silent,
          doorbell: () =>
            Effect.acquireRelease(
              at("listen", new ExecError({ code: "EXEC_AGENT_UNAVAILABLE", message: "no socket" })).pipe(
                Effect.interruptible,
                Effect.zipRight(note("listen+"))
              ),
              () => note("listen-")
            ).pipe(Effect.as(at("doorbell", new ExecError({ code: "EXEC_PROTOCOL", message: "it rang wrongly" }))))
        })
      ),
      Layer.succeed(SnapshotEngines, new Map()),
      Layer.succeed(FileHasher, {
        of: () => new DigestFailed({ message: "a fake has no files" }),
        remembered: () => new DigestFailed({ message: "a fake has no files" })
      }),
      Layer.succeed(
        Vmm,
        Vmm.of({
          capabilities: Effect.succeed({ backend: "fake", accel: "tcg", maxVcpus: 4 }),
          controlPath: () => undefined,
          launch: (spec, supervision) =>
            Effect.acquireRelease(
              Effect.gen(function* () {
                yield* Effect.interruptible(at("launch", new BootError({ code: "BOOT_VMM_FAILED", message: "no VMM" })))
                const exited = yield* Deferred.make<ExitRecord>()
                yield* Ref.update(running, (all) => [...all, { spec, supervision, exited }])
                yield* note("launch+")
                return exited
              }),
              (exited) => Effect.zipRight(note("launch-"), Deferred.succeed(exited, ended("owner-lost", "")))
            ).pipe(Effect.map(handle)),
          fingerprint: () => Effect.fail(new BootError({ code: "BOOT_VMM_MISSING", message: "a fake is no machine" })),
          kernelArguments: Effect.succeed(""),
          attach: (_entry, shim) => ({ ...shim, ...unsupported })
        })
      )
    )
  })
)
