import * as net from "node:net"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer, Stream } from "effect"
import * as Fake from "../../../backends/fake/Fake.ts"
import { commandLine, devices } from "../../../backends/qemu/commandLine.ts"
import * as QemuVmm from "../../../backends/qemu/QemuVmm.ts"
import { HostProbe } from "../../../src/machine/HostProbe.ts"
import { MachineSpec, type Share } from "../../../src/machine/MachineSpec.ts"
import { Registry } from "../../../src/machine/Registry.ts"
import { Shim, type ShimHandle } from "../../../src/machine/Shim.ts"
import { VmEntry } from "../../../src/machine/VmEntry.ts"
import { Vmm } from "../../../src/machine/Vmm.ts"
import { Settings } from "../../../src/Settings.ts"
import { temporaryHome } from "../../fixtures.ts"

/** A monitor that answers every command, and refuses some. */
const monitor = (socket: string, refused: ReadonlySet<string>) =>
  Effect.acquireRelease(
    Effect.async<{ readonly server: net.Server; readonly commands: Array<string> }>((resume) => {
      const commands: Array<string> = []
      const server = net.createServer((client) => {
        client.write('{"QMP":{}}\n')
        client.on("error", () => {})
        client.on("data", (data) => {
          for (const line of data.toString().trim().split("\n")) {
            const { execute, id } = JSON.parse(line)
            commands.push(execute)
            const error = { class: "GenericError", desc: "not now" }
            const answer = execute === "query-status" ? { running: true } : {}
            client.write(`${JSON.stringify(refused.has(execute) ? { error, id } : { return: answer, id })}\n`)
          }
        })
      })
      server.listen(socket, () => resume(Effect.succeed({ server, commands })))
    }),
    ({ server }) => Effect.sync(() => void server.close())
  )

const entryOf = (home: string) =>
  new VmEntry({
    version: 1,
    id: VmEntry.fields.id.make("abcdef012345"),
    state: "running",
    bootId: "",
    owner: { pid: 1, startTime: 1 },
    detached: false,
    backend: "qemu",
    accel: "tcg",
    image: "micro",
    memoryMib: 64,
    vcpus: 1,
    network: "none",
    createdAt: 0,
    vsockPath: path.join(home, "vsock.sock"),
    controlPath: path.join(home, "shim.sock"),
    vmmControlPath: path.join(home, "qmp.sock")
  })

/** Saves a machine, lets it go on and commits; returns what came of the commit, and what the shim was asked to commit. */
const saved = (refused: ReadonlySet<string>) => {
  const home = temporaryHome()
  return Effect.gen(function* () {
    const vmm = yield* Vmm
    const { commands } = yield* monitor(path.join(home, "qmp.sock"), refused)
    let commits = 0
    const never = Effect.never
    const shim: ShimHandle = {
      shim: { pid: 1, startTime: 1 },
      vmm: { pid: 1, startTime: 1 },
      exited: never,
      stop: () => never,
      kill: never,
      detach: Effect.void,
      logs: () => Stream.empty,
      rename: () => Effect.void,
      capture: () => Effect.succeed({ copy: Effect.succeed(1), commit: Effect.sync(() => void commits++) })
    }
    const { commit, whileStopped } = yield* vmm.attach(entryOf(home), shim).save({ files: [], remove: [] })
    yield* Effect.scoped(whileStopped)
    const outcome = yield* Effect.either(commit)
    return { commands, commits, outcome: outcome._tag === "Left" ? outcome.left.message : "committed" }
  }).pipe(
    Effect.scoped,
    Effect.provide(
      QemuVmm.layer.pipe(
        Layer.provide(
          Layer.succeed(HostProbe, {
            accelerator: Effect.succeed({ accel: "tcg" as const, reason: "" }),
            tscKhz: Effect.succeed(1),
            vmmVersion: Effect.succeed("1")
          })
        ),
        Layer.provide(Fake.layer),
        Layer.provide(Shim.layer),
        Layer.provide(Registry.layer),
        Layer.provide(Settings.layerTest(home)),
        Layer.provide(NodeContext.layer)
      )
    )
  )
}

describe("saving a machine", () => {
  it.effect("is committed when the machine goes on again", () =>
    Effect.gen(function* () {
      const { commands, commits, outcome } = yield* saved(new Set())
      assert.deepStrictEqual([outcome, commits], ["committed", 1])
      assert.deepStrictEqual(
        commands.filter((command) => !command.startsWith("qmp_")),
        ["query-status", "stop", "cont"]
      )
    })
  )

  it.effect("is not committed when QEMU does not let it go on: the shim is to undo it then", () =>
    Effect.gen(function* () {
      const { commits, outcome } = yield* saved(new Set(["cont"]))
      assert.strictEqual(commits, 0)
      assert.include(outcome, "not now")
    })
  )
})

describe("a machine's command line", () => {
  const spec = (shares: ReadonlyArray<Share>) =>
    new MachineSpec({
      id: VmEntry.fields.id.make("abcdef012345"),
      dir: "/vms/a",
      start: { _tag: "Kernel", kernel: "/k", initrd: "/i" },
      memoryMib: 64,
      vcpus: 1,
      disks: [{ id: "root", path: "/d", readOnly: true }],
      shares
    })
  const options = { binary: "qemu", accel: "tcg", tscKhz: 1, controlPath: "/c" } as const

  it("has one port for all shares, behind the channel's, and as it is in the fingerprint", () => {
    const share = (tag: string): Share => ({ tag, path: "/srv", readOnly: false })
    const ports = (line: ReadonlyArray<string>) => line.filter((word) => word.includes("share"))
    const none = commandLine(spec([]), options)
    const port = ["socket,id=share,fd=8", "virtserialport,chardev=share,name=machinen.share"]
    assert.deepStrictEqual(ports(none).slice(1), [])
    for (const shares of [[share("a")], [share("a"), share("b")]]) {
      const line = commandLine(spec(shares), options)
      assert.deepStrictEqual(ports(line).slice(1), port)
      const plugged = line.filter((_, i) => line[i - 1] === "-device")
      assert.deepStrictEqual(plugged, devices({ disks: spec([]).disks, network: false, shares: true }))
      assert.deepStrictEqual(plugged.slice(0, 3), [
        "virtio-serial-device",
        "virtserialport,chardev=channel,name=machinen.channel",
        port[1]
      ])
    }
  })
})
