import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Option } from "effect"
import { commandLine, defaultBinary } from "../backends/qemu/commandLine.ts"
import * as Qmp from "../backends/qemu/Qmp.ts"
import { Assets } from "../src/host/Assets.ts"
import { HostProbe } from "../src/machine/HostProbe.ts"
import { type Disk, MachineSpec, VmId } from "../src/machine/MachineSpec.ts"
import { Settings } from "../src/Settings.ts"
import { newDirectory } from "./files.ts"
import { BenchError } from "./harness.ts"
import * as rawRestore from "./rawRestore.ts"

const say = Buffer.from("run\n")
const answers = ["word\n", "ended\n"] as const

/**
 * All of the guest's software: for every line on the port it writes a word, runs a command (fork, exec, wait) and writes that it has ended. The
 * command is a path, because a name could be a builtin of the shell.
 */
const script = `exec 3<>/dev/vport0p1; while read -r line <&3; do echo word >&3; /bin/true; echo ended >&3; done`

/** The command line with our kernel, machine and devices, and the image's shell as the only process: no initramfs and no program of ours. */
const argvOf = Effect.fnUntraced(function* (spec: MachineSpec, controlPath: string) {
  const { vmm } = yield* Settings
  const probe = yield* HostProbe
  const { accel } = yield* probe.accelerator
  const [binary, ...args] = commandLine(spec, {
    binary: Option.getOrElse(vmm, () => defaultBinary),
    accel,
    tscKhz: accel === "tcg" ? yield* probe.tscKhz : 0,
    controlPath
  })
  // the kernel passes arguments that it does not know on to init; no "--", because QEMU appends arguments about its devices
  const without = args.flatMap((argument, at) => {
    if (argument === "-initrd" || args[at - 1] === "-initrd") return []
    return args[at - 1] === "-append" ? [`${argument} root=/dev/vda ro init=/bin/sh -c "${script}"`] : [argument]
  })
  return [binary, ...without] as const
})

/** Boots such a guest, lets it run its command once, and saves it. Its memory is the file that QEMU had mapped. */
export const saved = Effect.fn("rawExec.saved")(function* (
  image: "micro" | "debian",
  memoryMib: number,
  vcpus: number
) {
  const fs = yield* FileSystem.FileSystem
  const assets = yield* Assets
  const dir = yield* newDirectory("raw-exec")
  const files = { memory: path.join(dir, "memory"), state: path.join(dir, "state") }
  const disks: ReadonlyArray<Disk> = [{ id: "root", path: yield* assets.base(image), readOnly: true }]
  yield* fs.writeFile(files.memory, new Uint8Array(0))
  yield* fs.truncate(files.memory, memoryMib * 2 ** 20)
  const controlPath = path.join(dir, "qmp.sock")
  const spec = new MachineSpec({
    id: VmId.make("f00000000000"),
    dir,
    start: { _tag: "Kernel", kernel: yield* assets.kernel, initrd: "none" },
    memoryMib,
    vcpus,
    disks
  })
  yield* Effect.scoped(
    Effect.gen(function* () {
      const running = yield* rawRestore.run(
        yield* argvOf(spec, controlPath),
        { memory: files.memory },
        { say, answers }
      )
      yield* Effect.all(running.answers)
      const qmp = yield* Qmp.connect(controlPath, "2 seconds")
      yield* qmp.execute("stop")
      yield* qmp.execute("xen-save-devices-state", { filename: files.state, live: false })
    })
  ).pipe(
    Effect.catchTag("VmmControlFailed", (cause) => new BenchError({ message: `raw guest: ${cause.message}`, cause }))
  )
  const machine: rawRestore.Saved = { ...files, memoryMib, vcpus, disks }
  return machine
})

/** Restores such a guest by QEMU alone. Returns two waits: for the guest's word, and for the command's end. */
export const start = Effect.fn("rawExec.start")(function* (ready: rawRestore.Ready) {
  const running = yield* rawRestore.run(yield* rawRestore.argvOf(ready), ready, { say, answers })
  const [word, ended] = running.answers
  if (word === undefined || ended === undefined) return yield* Effect.dieMessage("two answers were asked for")
  return { pid: running.pid, word, ended }
})
