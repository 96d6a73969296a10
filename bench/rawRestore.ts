import { type ChildProcess, spawn } from "node:child_process"
import { randomBytes } from "node:crypto"
import { closeSync, openSync } from "node:fs"
import { Socket } from "node:net"
import * as path from "node:path"
import { Deferred, Effect, Option, Runtime } from "effect"
import { channelFd, commandLine, consoleFd, defaultBinary, memoryFd, stateFd } from "../backends/qemu/commandLine.ts"
import * as Qmp from "../backends/qemu/Qmp.ts"
import type { Bundle } from "../src/index.ts"
import { HostProbe } from "../src/machine/HostProbe.ts"
import { type Disk, MachineSpec, VmId } from "../src/machine/MachineSpec.ts"
import { Settings } from "../src/Settings.ts"
import { channelVersion } from "../src/snapshot/BundleManifest.ts"
import type { Vm } from "../src/vm/Vm.ts"
import { copy, newDirectory } from "./files.ts"
import { BenchError } from "./harness.ts"

/** Boot options of VMs that raw QEMU can restore: with disks and a channel, without a network card. */
export const asRaw = { network: "none", prepared: false } as const

/** A saved machine as plain files. */
export interface Saved {
  readonly state: string
  readonly memory: string
  readonly memoryMib: number
  readonly vcpus: number
  /** In the order of the machine's devices. Writable disks are copied for each restore. */
  readonly disks: ReadonlyArray<Disk>
}

/** A saved machine with its own copies of the writable disks, which can be started once. */
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

/** Copies the writable disks. Not part of the measured time. */
export const prepare = Effect.fn("rawRestore.prepare")(function* (saved: Saved) {
  const dir = yield* newDirectory("raw")
  const disks = yield* Effect.forEach(saved.disks, (disk) => {
    const own = path.join(dir, `${disk.id}.img`)
    return disk.readOnly ? Effect.succeed(disk) : Effect.as(copy([disk.path], own), { ...disk, path: own })
  })
  const ready: Ready = { ...saved, disks, dir }
  return ready
})

/** The hello of a host that takes over a running guest, behind the pads that complete a torn frame (docs/protocol.md §1.2). */
const greeting = () => {
  const hello = Buffer.concat([Buffer.from([1, 0, 0, 0, 17, channelVersion]), randomBytes(16), Buffer.from([0x5a])])
  return { hello, bytes: Buffer.concat([Buffer.alloc(65_544), hello]) }
}

/** Our own command line for the machine. */
export const argvOf = Effect.fnUntraced(function* ({ dir, disks, memory, memoryMib, state, vcpus }: Ready) {
  const { vmm } = yield* Settings
  const { accel } = yield* (yield* HostProbe).accelerator
  const start = { _tag: "Saved", state, memory } as const
  const spec = new MachineSpec({ id: VmId.make("f00000000000"), dir, start, memoryMib, vcpus, disks })
  const binary = Option.getOrElse(vmm, () => defaultBinary)
  // only the arguments of a kernel need the TSC's rate
  return commandLine(spec, { binary, accel, tscKhz: 0, controlPath: path.join(dir, "qmp.sock") })
})

/** The bytes that the host sends to a guest, and the answers that it expects, in this order. */
export interface Talk {
  readonly say: Uint8Array
  readonly answers: ReadonlyArray<string | Uint8Array>
}

/**
 * Starts QEMU from Node as the shim would, with the descriptors of our own command line. Each expected answer on the channel completes one of the
 * returned effects. The scope ends QEMU.
 */
export const run = Effect.fn("rawRestore.run")(function* (
  [binary, ...args]: readonly [string, ...ReadonlyArray<string>],
  files: { readonly memory: string; readonly state?: string },
  { answers, say }: Talk
) {
  const expected = yield* Effect.forEach(answers, (bytes) =>
    Effect.map(Deferred.make<void, BenchError>(), (heard) => ({ bytes: Buffer.from(bytes), heard }))
  )
  const ended = yield* Deferred.make<void>()
  const runSync = Runtime.runSync(yield* Effect.runtime())
  const fail = (error: BenchError) =>
    runSync(
      Effect.zipRight(
        Effect.forEach(expected, ({ heard }) => Deferred.fail(heard, error)),
        Deferred.succeed(ended, undefined)
      )
    )
  const child = yield* Effect.acquireRelease(
    Effect.try({
      try: () => {
        const stdio: Array<"ignore" | "pipe" | number> = ["ignore", "ignore", "pipe"]
        stdio[channelFd] = stdio[consoleFd] = "pipe"
        const memory = openSync(files.memory, "r+")
        const state = files.state === undefined ? [] : [openSync(files.state, "r")]
        stdio[memoryFd] = memory
        for (const fd of state) stdio[stateFd] = fd
        const child: ChildProcess = spawn(binary, args, { stdio })
        for (const fd of [memory, ...state]) closeSync(fd)
        let said = ""
        const keep = (chunk: Buffer) => {
          said = (said + chunk.toString()).slice(-2000)
        }
        child.stderr?.on("data", keep)
        socketOf(child, consoleFd).on("data", keep)
        let [heard, next] = [Buffer.alloc(0), 0]
        const channel = socketOf(child, channelFd)
        channel.on("data", (chunk: Buffer) => {
          heard = Buffer.concat([heard, chunk])
          for (let one = expected[next]; one !== undefined; one = expected[++next]) {
            const at = heard.indexOf(one.bytes)
            if (at < 0) break
            heard = heard.subarray(at + one.bytes.length)
            runSync(Deferred.succeed(one.heard, undefined))
          }
        })
        channel.write(say)
        child.on("error", (cause) => fail(new BenchError({ message: "QEMU cannot be run", cause })))
        child.on("close", () => fail(new BenchError({ message: `raw QEMU ended before the guest's answer: ${said}` })))
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
  if (child.pid === undefined) return yield* new BenchError({ message: "raw QEMU has no pid" })
  return {
    pid: child.pid,
    answers: expected.map(({ heard }) =>
      Effect.timeoutFail(Deferred.await(heard), {
        duration: "30 seconds",
        onTimeout: () => new BenchError({ message: "the guest of raw QEMU has not answered within 30 s" })
      })
    )
  }
})

/** Restores the saved machine by QEMU alone. Completes when the guest has answered this host's hello. */
export const start = Effect.fn("rawRestore.start")(function* (ready: Ready) {
  const { bytes, hello } = greeting()
  const { answers, pid } = yield* run(yield* argvOf(ready), ready, { say: bytes, answers: [hello] })
  yield* Effect.all(answers)
  return pid
})

const socketOf = (child: ChildProcess, fd: number): Socket => {
  const end = child.stdio[fd]
  if (!(end instanceof Socket)) throw new Error(`descriptor ${fd} is no socket`)
  // QEMU's death resets the socket; `close` reports it
  return end.on("error", () => {})
}

/**
 * Saves a running machine by hand: QEMU stops it and writes its devices, cp copies memory and disks, QEMU lets it go on. Only for a booted
 * machine, because a restored machine's memory is not in one file.
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
