import { spawn } from "node:child_process"
import { createHash } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Deferred, Effect, Option, Runtime } from "effect"
import { commandLine, defaultBinary } from "../backends/qemu/commandLine.ts"
import * as Initramfs from "../src/guest/Initramfs.ts"
import { Assets } from "../src/host/Assets.ts"
import { HostProbe } from "../src/machine/HostProbe.ts"
import { MachineSpec, VmId } from "../src/machine/MachineSpec.ts"
import * as command from "../src/platform/command.ts"
import { Settings } from "../src/Settings.ts"
import { BenchError, type Variant } from "./harness.ts"

const source = path.join(import.meta.dirname, "raw-init", "init.rs")
const marker = "raw-init: up"

/** Builds the raw guest's only program, once for each version of its source. */
const buildInit = Effect.gen(function* () {
  const fs = yield* FileSystem.FileSystem
  const { cacheDir } = yield* Settings
  const hash = createHash("sha256")
    .update(yield* fs.readFile(source))
    .digest("hex")
  const program = path.join(cacheDir, "bench", `raw-init-${hash.slice(0, 12)}`)
  if (yield* fs.exists(program)) return program
  yield* fs.makeDirectory(path.dirname(program), { recursive: true })
  const staging = `${program}.${process.pid}`
  const { code, stderr } = yield* command.run([
    "rustc",
    ...["--edition", "2024", "--target", "x86_64-unknown-linux-gnu", "-o", staging],
    ...["opt-level=2", "panic=abort", "strip=symbols", "relocation-model=static"].flatMap((option) => ["-C", option]),
    ...["-nostartfiles", "-nostdlib", "-static"].flatMap((option) => ["-C", `link-arg=${option}`]),
    source
  ])
  if (code !== 0) return yield* new BenchError({ message: `${source} cannot be built: ${stderr.trim()}` })
  yield* fs.rename(staging, program)
  return program
})

/** Arguments of our command line that the raw machine does not need: guest channel and control socket. */
const ours = /^(chardev=qmp|socket,id=(qmp|channel)|virtio-serial-device|virtserialport)/

/** Our own command line without these arguments, and with the console on stdout. */
const strip = (argv: ReadonlyArray<string>): ReadonlyArray<string> =>
  argv.flatMap((argument, at) => {
    if (ours.test(argument) || ours.test(argv[at + 1] ?? "")) return []
    // there is no shim and no memfd of its own; a memfd that QEMU makes costs the same
    if (argument.startsWith("memory-backend-file"))
      return [argument.replace("-file", "-memfd").replace(/,mem-path=[^,]*/, "")]
    return argument.startsWith("socket,id=console") ? ["stdio,id=console,signal=off"] : [argument]
  })

export interface Machine {
  readonly memoryMib: number
  readonly vcpus: number
}

/**
 * Starts QEMU from Node, with the kernel and machine of our own VMs and an init that prints one line. `marker` is the least time that a boot takes
 * on this host, `exit` is QEMU's end.
 */
export const make = Effect.fn("rawQemu.make")(function* (machine: Machine) {
  const fs = yield* FileSystem.FileSystem
  const { home, vmm } = yield* Settings
  const assets = yield* Assets
  const probe = yield* HostProbe
  const { accel } = yield* probe.accelerator

  // in this bench's home, so that the leak check finds a leftover QEMU by its command line
  const initrd = path.join(home, "raw-initrd.cpio")
  const archive = Initramfs.cpio([
    { name: ".", mode: 0o040755 },
    { name: "dev", mode: 0o040755 },
    { name: "dev/console", mode: 0o020600, device: [5, 1] },
    { name: "init", mode: 0o100755, data: yield* fs.readFile(yield* buildInit) }
  ])
  yield* fs.writeFile(initrd, archive)

  const spec = new MachineSpec({
    ...machine,
    id: VmId.make("f00000000000"),
    dir: home,
    start: { _tag: "Kernel", kernel: yield* assets.kernel, initrd },
    disks: []
  })
  const [binary, ...argv] = commandLine(spec, {
    binary: Option.getOrElse(vmm, () => defaultBinary),
    accel,
    tscKhz: accel === "tcg" ? yield* probe.tscKhz : 0,
    controlPath: "unused"
  })
  const args = strip(argv)
  const variant: Variant = { name: "raw", released: false, run: (probe) => runOnce(binary, args, probe.mark) }
  return { variant, argv: [binary, ...args] }
})

const runOnce = Effect.fnUntraced(function* (
  binary: string,
  args: ReadonlyArray<string>,
  mark: (label: string) => Effect.Effect<void>
) {
  const seen = yield* Deferred.make<void, BenchError>()
  const ended = yield* Deferred.make<number | null>()
  const runSync = Runtime.runSync(yield* Effect.runtime())
  let output = ""
  yield* Effect.acquireRelease(
    Effect.sync(() => {
      const child = spawn(binary, args, { stdio: ["ignore", "pipe", "pipe"] })
      const read = (chunk: Buffer) => {
        output += chunk.toString()
        if (output.includes(marker)) runSync(Deferred.succeed(seen, undefined))
      }
      child.stdout.on("data", read)
      child.stderr.on("data", read)
      child.on("error", (cause) =>
        runSync(Deferred.fail(seen, new BenchError({ message: "QEMU cannot be run", cause })))
      )
      child.on("close", (code) =>
        runSync(Effect.zipRight(Deferred.fail(seen, early(output)), Deferred.succeed(ended, code)))
      )
      return child
    }),
    (child) =>
      Effect.zipRight(
        Effect.sync(() => child.kill("SIGKILL")),
        Deferred.await(ended)
      )
  )
  yield* Deferred.await(seen).pipe(
    Effect.timeoutFail({ duration: "30 seconds", onTimeout: () => new BenchError({ message: `no marker: ${output}` }) })
  )
  yield* mark("marker")
  const code = yield* Deferred.await(ended)
  yield* mark("exit")
  if (code !== 0) return yield* new BenchError({ message: `raw QEMU ended with code ${code}: ${output}` })
})

const early = (output: string) => new BenchError({ message: `raw QEMU ended before its marker: ${output}` })
