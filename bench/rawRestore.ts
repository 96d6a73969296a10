import { type ChildProcess, spawn } from "node:child_process"
import { randomBytes } from "node:crypto"
import { closeSync, openSync } from "node:fs"
import { Socket } from "node:net"
import * as path from "node:path"
import { Deferred, Effect, Option, Runtime } from "effect"
import { channelFd, commandLine, consoleFd, defaultBinary, memoryFd, stateFd } from "../backends/qemu/commandLine.ts"
import * as Qmp from "../backends/qemu/Qmp.ts"
import { type Disk, MachineSpec, VmId } from "../src/domain/Vm.ts"
import { HostProbe } from "../src/HostProbe.ts"
import type { Bundle } from "../src/index.ts"
import { Settings } from "../src/Settings.ts"
import type { Vm } from "../src/Vm.ts"
import { copy, newDirectory } from "./files.ts"
import { BenchError } from "./harness.ts"

/** A saved machine as plain files. */
export interface Saved {
  readonly state: string
  readonly memory: string
  readonly memoryMib: number
  readonly vcpus: number
  /** In the order of the machine's devices; those that are written are copied for each that goes on. */
  readonly disks: ReadonlyArray<Disk>
}

/** A saved machine with disks of its own, ready to be started once. */
export interface Ready extends Saved {
  readonly dir: string
}

export const ofBundle = ({ dir, manifest }: Bundle): Saved => ({
  state: path.join(dir, "state"),
  memory: path.join(dir, "memory"),
  memoryMib: manifest.memoryMib,
  vcpus: manifest.vcpus,
  disks: manifest.disks.map(({ id, source }) =>
    source._tag === "Blob"
      ? { id, path: path.join(dir, source.name), readOnly: false }
      : { id, path: source.path, readOnly: true }
  )
})

/** Copies what the machine will write; not part of what raw QEMU is measured for. */
export const prepare = Effect.fn("rawRestore.prepare")(function* (saved: Saved) {
  const dir = yield* newDirectory("raw")
  const disks = yield* Effect.forEach(saved.disks, (disk) => {
    const own = path.join(dir, `${disk.id}.img`)
    return disk.readOnly ? Effect.succeed(disk) : Effect.as(copy([disk.path], own), { ...disk, path: own })
  })
  const ready: Ready = { ...saved, disks, dir }
  return ready
})

/** The hello of a host that takes over a running guest, behind zeros that complete whatever was torn (docs/protocol.md §1). */
const greeting = () => {
  const hello = Buffer.concat([Buffer.from([1, 0, 0, 0, 17, 1]), randomBytes(16), Buffer.from([0x5a])])
  return { hello, bytes: Buffer.concat([Buffer.alloc(65_544), hello]) }
}

/** Our own command line for that machine. */
export const argvOf = Effect.fnUntraced(function* ({ dir, disks, memory, memoryMib, state, vcpus }: Ready) {
  const { vmm } = yield* Settings
  const { accel } = yield* (yield* HostProbe).accelerator
  const start = { _tag: "Saved", state, memory } as const
  const spec = new MachineSpec({ id: VmId.make("f00000000000"), dir, start, memoryMib, vcpus, disks })
  const binary = Option.getOrElse(vmm, () => defaultBinary)
  // only a kernel's arguments have need of the TSC's rate
  return commandLine(spec, { binary, accel, tscKhz: 0, controlPath: path.join(dir, "qmp.sock") })
})

/**
 * QEMU, started by Node as the shim would start it, goes on as the saved machine; done when the guest has answered this host's hello. Nothing
 * of machinen runs on the host; the guest answers the channel and stays as it was saved. It ends with the scope.
 */
export const start = Effect.fn("rawRestore.start")(function* (ready: Ready) {
  const [binary, ...args] = yield* argvOf(ready)
  const answered = yield* Deferred.make<void, BenchError>()
  const ended = yield* Deferred.make<void>()
  const runSync = Runtime.runSync(yield* Effect.runtime())
  const { bytes, hello } = greeting()
  const child = yield* Effect.acquireRelease(
    Effect.try({
      try: () => {
        const [memory, state] = [openSync(ready.memory, "r+"), openSync(ready.state, "r")]
        const stdio: Array<"ignore" | "pipe" | number> = ["ignore", "ignore", "pipe"]
        stdio[channelFd] = stdio[consoleFd] = "pipe"
        stdio[memoryFd] = memory
        stdio[stateFd] = state
        const child: ChildProcess = spawn(binary, args, { stdio })
        for (const fd of [memory, state]) closeSync(fd)
        let said = ""
        child.stderr?.on("data", (chunk: Buffer) => {
          said += chunk.toString()
        })
        let heard = Buffer.alloc(0)
        const channel = socketOf(child, channelFd)
        channel.on("data", (chunk: Buffer) => {
          heard = Buffer.concat([heard, chunk])
          if (heard.includes(hello)) runSync(Deferred.succeed(answered, undefined))
        })
        channel.write(bytes)
        socketOf(child, consoleFd).resume()
        child.on("error", (cause) =>
          runSync(
            Effect.zipRight(
              Deferred.fail(answered, new BenchError({ message: "QEMU cannot be run", cause })),
              Deferred.succeed(ended, undefined)
            )
          )
        )
        child.on("close", () =>
          runSync(
            Effect.zipRight(
              Deferred.fail(answered, new BenchError({ message: `raw QEMU ended before the guest's answer: ${said}` })),
              Deferred.succeed(ended, undefined)
            )
          )
        )
        return child
      },
      catch: (cause) => new BenchError({ message: "raw QEMU cannot be started", cause })
    }),
    (child) =>
      Effect.zipRight(
        Effect.sync(() => child.kill("SIGKILL")),
        Deferred.await(ended)
      )
  )
  yield* Deferred.await(answered).pipe(
    Effect.timeoutFail({
      duration: "30 seconds",
      onTimeout: () => new BenchError({ message: "the guest of raw QEMU has not answered within 30 s" })
    })
  )
  if (child.pid === undefined) return yield* new BenchError({ message: "raw QEMU has no pid" })
  return child.pid
})

const socketOf = (child: ChildProcess, fd: number): Socket => {
  const end = child.stdio[fd]
  if (!(end instanceof Socket)) throw new Error(`descriptor ${fd} is no socket`)
  // QEMU's death resets it; `close` tells
  return end.on("error", () => {})
}

/**
 * Saves a machine that runs, by hand: QEMU stops it, writes its devices and lets it go on; cp copies memory and disks meanwhile. Only for one
 * that was booted: a restored one's memory is not in a file.
 */
export const save = Effect.fn("rawRestore.save")(
  function* (vm: Vm) {
    const { disks = [], memoryMib, vcpus, vmmControlPath = "" } = vm.entry
    const dir = yield* newDirectory("saved")
    const qmp = yield* Qmp.connect(vmmControlPath, "2 seconds")
    const into = (disk: Disk): Disk => (disk.readOnly ? disk : { ...disk, path: path.join(dir, `${disk.id}.img`) })
    const saved: Saved = {
      state: path.join(dir, "state"),
      memory: path.join(dir, "memory"),
      memoryMib,
      vcpus,
      disks: disks.map(into)
    }
    const stopped = performance.now()
    yield* Effect.acquireUseRelease(
      qmp.execute("stop"),
      () =>
        Effect.all(
          [
            qmp.execute("xen-save-devices-state", { filename: saved.state, live: false }),
            copy([`/proc/${vm.pid}/fd/${memoryFd}`], saved.memory),
            ...disks.flatMap((disk) => (disk.readOnly ? [] : [copy([disk.path], into(disk).path)]))
          ],
          { concurrency: "unbounded", discard: true }
        ),
      () => Effect.ignore(qmp.execute("cont"))
    )
    return { saved, pausedMs: performance.now() - stopped }
  },
  Effect.catchTag("VmmControlFailed", (cause) => new BenchError({ message: `by hand: ${cause.message}`, cause }))
)
